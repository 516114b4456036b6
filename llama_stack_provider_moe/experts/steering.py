"""What acts on routers while a model trains: expert choice, jitter, and the biases of aux-loss-free balancing.

All of it rests outside of training steps, so that a model is evaluated, and a reference computed ahead, as it will run.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.experts.balance import bias_step, expert_choice, jitter
from llama_stack_provider_moe.experts.layout import ExpertLayout
from llama_stack_provider_moe.experts.routing import probabilities
from llama_stack_provider_moe.experts.settings import ResolvedMoe

ROUTER_BIAS = "router_bias.safetensors"


class Steering:
    """Hooks on the routers of a model, and its biases.

    To be made before a `RoutingRecorder`, which then sees what was chosen in the end.

    Args:
        model: with or without adapters.
        layout: of it.
        resolved: what was decided.
    """

    def __init__(self, model: nn.Module, layout: ExpertLayout, resolved: ResolvedMoe) -> None:
        self._layout = layout
        self._resolved = resolved
        self._active = False
        self._attention_mask: Tensor | None = None
        self._model = model
        # The model's own may be bf16, in which steps of 0.001 would be rounded away.
        self._exact = {layer: bias.detach().float().clone() for layer, bias in self._biases.items()}
        self.attach(model)

    @property
    def _biases(self) -> dict[int, Tensor]:
        """The model's own, found anew: a buffer is another one once its model was moved to another device."""
        return self._layout.biases(self._model) if self._resolved.load_balancing == "aux_free" else {}

    def attach(self, model: nn.Module) -> None:
        """Act on this model's routers too, a reference beside the one that trains."""
        for router in self._layout.routers(model).values():
            if self._resolved.router_jitter:
                router.register_forward_pre_hook(self._add_noise)
            if self._resolved.load_balancing == "expert_choice":
                choose = _choice if self._layout.grouped_mm else _llama4_choice
                router.register_forward_hook(partial(self._choose, choose))

    def act(self, attention_mask: Tensor | None) -> None:
        """Until `rest`, passes are a training step's, their backward included.

        Args:
            attention_mask: (batch, sequence) of the passes, 0 where a token is padding.
        """
        self._active, self._attention_mask = True, attention_mask

    def rest(self) -> None:
        """Passes are an evaluation's: nothing acts."""
        self._active, self._attention_mask = False, None

    def after_step(self, counts: dict[int, Tensor]) -> None:
        """Move the biases of `aux_free` by the loads (E,) of an optimiser step's tokens, layer by layer."""
        with torch.no_grad():
            for layer, bias in self._biases.items():
                if layer in counts:
                    exact_E = self._exact[layer].view(-1)
                    exact_E += bias_step(counts[layer].to(exact_E), self._resolved.bias_rate)
                    bias.copy_(self._exact[layer])

    def save(self, folder: Path) -> None:
        """Write the biases of `aux_free` beside a model or adapter; nothing where there are none."""
        if self._exact:
            save_file(
                {self._name(layer): bias.contiguous() for layer, bias in self._exact.items()}, folder / ROUTER_BIAS
            )

    def restore(self, folder: Path) -> None:
        """Read them back.

        Raises:
            CheckpointError: they are missing, or of another model.
        """
        if not self._exact:
            return
        try:
            found = load_file(folder / ROUTER_BIAS)
        except OSError as error:
            raise CheckpointError(f"{folder / ROUTER_BIAS} can't be read: {error}") from error
        if set(found) != {self._name(layer) for layer in self._exact}:
            raise CheckpointError(f"{folder / ROUTER_BIAS} is of another model: it has {sorted(found)[:3]}")
        with torch.no_grad():
            for layer, bias in self._biases.items():
                self._exact[layer].copy_(found[self._name(layer)])
                bias.copy_(self._exact[layer])

    def _name(self, layer: int) -> str:
        assert self._layout.bias_path is not None
        return self._layout.path(layer, self._layout.bias_path)

    def _add_noise(self, router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (self._active and torch.is_grad_enabled()):
            return None
        return jitter(inputs[0], self._resolved.router_jitter), *inputs[1:]

    def _choose(self, choose: Any, router: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> Any:
        if not self._active:
            return None
        logits_TE = outputs[self._layout.logits_at].reshape(-1, self._layout.num_experts)
        probs_TE = probabilities(logits_TE, self._layout.scoring)
        taken_TE = expert_choice(probs_TE, self._layout.top_k, self._attention_mask)
        experts_E = torch.arange(self._layout.num_experts, device=taken_TE.device)
        index_TE = torch.where(taken_TE, experts_E, self._layout.num_experts)
        return choose(outputs, probs_TE, taken_TE, index_TE)


def restore_biases(folder: Path, model: nn.Module, layout: ExpertLayout) -> None:
    """Give a model, not to be trained further, the biases that lie beside its adapter; nothing where none do.

    Raises:
        CheckpointError: they are of another model.
    """
    if not (folder / ROUTER_BIAS).is_file():
        return
    found, biases = load_file(folder / ROUTER_BIAS), layout.biases(model)
    assert layout.bias_path is not None or not biases
    names = {layout.path(layer, layout.bias_path or ""): layer for layer in biases}
    if set(found) != set(names):
        raise CheckpointError(f"{folder / ROUTER_BIAS} is of another model: it has {sorted(found)[:3]}")
    with torch.no_grad():
        for name, layer in names.items():
            biases[layer].copy_(found[name])


def _choice(outputs: tuple[Tensor, ...], probs_TE: Tensor, taken_TE: Tensor, index_TE: Tensor) -> tuple[Tensor, ...]:
    """Logits as they were, weights (T, E) and experts (T, E).

    The weights are in the model's own unit: what it would give its own choice, by their probabilities. Where experts
    take the very tokens that would have chosen them, they are what they would have been.
    """
    logits, weights_TK, index_TK = outputs
    own = weights_TK.reshape(index_TK.shape).float().sum(dim=-1, keepdim=True)
    unit = own / probs_TE.gather(1, index_TK).sum(dim=-1, keepdim=True)
    weights_TE = (probs_TE * unit).masked_fill(~taken_TE, 0).to(weights_TK.dtype)
    return logits, weights_TE, index_TE


def _llama4_choice(
    outputs: tuple[Tensor, ...], probs_TE: Tensor, taken_TE: Tensor, index_TE: Tensor
) -> tuple[Tensor, ...]:
    """Llama 4's own weight is the sigmoid of a logit, whatever the others are; a third part tells the experts."""
    scores_TE, logits_TE = outputs
    return logits_TE.float().sigmoid().masked_fill(~taken_TE, 0).to(scores_TE.dtype), logits_TE, index_TE
