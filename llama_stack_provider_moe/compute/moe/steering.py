"""Changes to routers during training: expert choice, jitter, and the biases of aux-loss-free balancing.

All of it is off outside training steps, so that evaluations and a precomputed reference see the model as it will run.
"""

from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe.balance import bias_step, expert_choice, jitter
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe
from llama_stack_provider_moe.compute.moe.scoring import probabilities
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.spec.moe import ROUTER_BIAS_FILE

ROUTER_BIAS = ROUTER_BIAS_FILE
_LLAMA4_EXPERTS = "Llama4TextExperts"


class _Choice(Protocol):
    def __call__(
        self, outputs: tuple[Tensor, ...], probs_TE: Tensor, taken_TE: Tensor, index_TE: Tensor
    ) -> tuple[Tensor, ...]: ...


class Steering:
    """Hooks on the routers of a model, and its biases.

    Create it before a `RoutingRecorder`, which then sees the final choice.

    Args:
        model: with or without adapters.
        layout: the model's layout.
        resolved: the job's `moe` block, resolved.
    """

    def __init__(self, model: nn.Module, layout: ExpertLayout, resolved: ResolvedMoe) -> None:
        self._layout = layout
        self._resolved = resolved
        self._active = False
        self._attention_mask: Tensor | None = None
        self._model = model
        # The model's biases may be bf16, where steps of 0.001 would be rounded away.
        self._exact = {layer: bias.detach().float().clone() for layer, bias in self._biases.items()}
        self.attach(model)

    @property
    def _biases(self) -> dict[int, Tensor]:
        """The model's biases, looked up each time: moving a model to another device replaces its buffers."""
        return self._layout.biases(self._model) if self._resolved.load_balancing == "aux_free" else {}

    def attach(self, model: nn.Module) -> None:
        """Add the hooks to another model's routers too, such as a reference model."""
        for layer, router in self._layout.routers(model).items():
            if layer in self._layout.by_token_layers:  # it has no choice that could be steered
                continue
            if self._resolved.router_jitter:
                router.register_forward_pre_hook(self._add_noise)
            if self._resolved.load_balancing == "expert_choice":
                choose = _llama4_choice if self._layout.experts_class == _LLAMA4_EXPERTS else _choice
                router.register_forward_hook(partial(self._choose, choose))

    def act(self, attention_mask: Tensor | None) -> None:
        """Start a training step: the hooks act until `rest`, in forward and backward.

        Args:
            attention_mask: (batch, sequence) of the step, 0 for padding.
        """
        self._active, self._attention_mask = True, attention_mask

    def rest(self) -> None:
        """End a training step: the hooks do nothing."""
        self._active, self._attention_mask = False, None

    def after_step(self, counts: dict[int, Tensor]) -> None:
        """Move the biases of `aux_free` by each layer's load (E,) over the tokens of an optimiser step."""
        with torch.no_grad():
            for layer, bias in self._biases.items():
                if layer in counts:
                    exact_E = self._exact[layer].view(-1)
                    exact_E += bias_step(counts[layer].to(exact_E), self._resolved.bias_rate)
                    bias.copy_(self._exact[layer])

    def save(self, folder: Path) -> None:
        """Write the biases of `aux_free` beside a model or adapter; without `aux_free`, write nothing."""
        if self._exact:
            save_file(
                {self._name(layer): bias.contiguous() for layer, bias in self._exact.items()}, folder / ROUTER_BIAS
            )

    def restore(self, folder: Path) -> None:
        """Read the biases back.

        Raises:
            CheckpointError: they are missing or belong to another model.
        """
        if not self._exact:
            return
        try:
            found = load_file(folder / ROUTER_BIAS)
        except OSError as error:
            raise CheckpointError(f"{folder / ROUTER_BIAS} can't be read: {error}") from error
        if set(found) != {self._name(layer) for layer in self._exact}:
            raise CheckpointError(f"{folder / ROUTER_BIAS} belongs to another model: it has {sorted(found)[:3]}")
        with torch.no_grad():
            for layer, bias in self._biases.items():
                self._exact[layer].copy_(found[self._name(layer)])
                bias.copy_(self._exact[layer])

    def _name(self, layer: int) -> str:
        assert self._layout.bias_path is not None
        return self._layout.path(layer, self._layout.bias_path)

    def _add_noise(self, router: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not (self._active and torch.is_grad_enabled()):
            return None
        return jitter(inputs[0], self._resolved.router_jitter), *inputs[1:]

    def _choose(
        self, choose: _Choice, router: nn.Module, inputs: object, outputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if not self._active:
            return None
        logits_TE = outputs[self._layout.logits_at].reshape(-1, self._layout.choices)
        probs_TE = probabilities(logits_TE, self._layout.scoring)
        taken_TE = expert_choice(probs_TE, self._layout.top_k, self._attention_mask)
        experts_E = torch.arange(self._layout.choices, device=taken_TE.device)
        index_TE = torch.where(taken_TE, experts_E, self._layout.choices)
        return choose(outputs, probs_TE, taken_TE, index_TE)


def restore_biases(folder: Path, model: nn.Module, layout: ExpertLayout) -> None:
    """Load the biases saved beside an adapter into a model that will not train further; do nothing if there are none.

    Raises:
        CheckpointError: they belong to another model.
    """
    if not (folder / ROUTER_BIAS).is_file():
        return
    found, biases = load_file(folder / ROUTER_BIAS), layout.biases(model)
    assert layout.bias_path is not None or not biases
    names = {layout.path(layer, layout.bias_path or ""): layer for layer in biases}
    if set(found) != set(names):
        raise CheckpointError(f"{folder / ROUTER_BIAS} belongs to another model: it has {sorted(found)[:3]}")
    with torch.no_grad():
        for name, layer in names.items():
            biases[layer].copy_(found[name])


def _choice(outputs: tuple[Tensor, ...], probs_TE: Tensor, taken_TE: Tensor, index_TE: Tensor) -> tuple[Tensor, ...]:
    """Unchanged logits, weights (T, E) and experts (T, E).

    Weights are scaled like the model's own: in proportion to the probabilities, with the ratio that the model uses for
    its own choice. If experts take exactly the tokens that would have chosen them, the weights do not change.
    """
    logits, weights_TK, index_TK, *others = outputs
    own = weights_TK.reshape(index_TK.shape).float().sum(dim=-1, keepdim=True)
    unit = own / probs_TE.gather(1, index_TK).sum(dim=-1, keepdim=True)
    weights_TE = (probs_TE * unit).masked_fill(~taken_TE, 0).to(weights_TK.dtype)
    return logits, weights_TE, index_TE, *others


def _llama4_choice(
    outputs: tuple[Tensor, ...], probs_TE: Tensor, taken_TE: Tensor, index_TE: Tensor
) -> tuple[Tensor, ...]:
    """In Llama 4 a weight is the sigmoid of one logit, independent of the others; the third output has the experts."""
    scores_TE, logits_TE = outputs
    return logits_TE.float().sigmoid().masked_fill(~taken_TE, 0).to(scores_TE.dtype), logits_TE, index_TE
