"""What routers decide: balance losses as pure functions, and a recorder of every layer's decisions.

Shapes: T tokens (batch x sequence, flattened), E experts, K experts a token (top-k). Everything is computed in
fp32 whatever the model's dtype.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.experts.families import Scoring
from llama_stack_provider_moe.experts.layout import ExpertLayout

# The sum over the processes that share a batch, without a gradient; a job of one process has the identity.
Total = Callable[[Tensor], Tensor]


def own(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


@dataclass(frozen=True)
class LayerRouting:
    """How one layer's router used its experts; shares and entropies (nats) over the tokens that count."""

    layer: int
    share: list[float]
    min: float
    max: float
    cv: float
    dead: int
    load_entropy: float
    token_entropy: float


def probabilities(logits_TE: Tensor, scoring: Scoring) -> Tensor:
    """Routing probabilities (T, E): softmax of the logits, or sigmoid scores divided by their sum."""
    logits_TE = logits_TE.float()
    if scoring == "softmax":
        return logits_TE.softmax(dim=-1)
    scores_TE = logits_TE.sigmoid()
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True)


def switch_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    num_experts: int,
    attention_mask: Tensor | None = None,
    *,
    scoring: Scoring = "softmax",
    chosen: Sequence[Tensor] | None = None,
    total: Total = own,
) -> Tensor:
    """Switch Transformer's balance loss in its top-k form (arXiv 2101.03961, eq. 4): E * sum_e f_e * P_e.

    f_e is the number of a token's K choices that are e, P_e its probability of e, both as means over the tokens of
    all layers; the loss is K at perfect balance. Equals the `aux_loss` of transformers' models.

    Args:
        router_logits: (T, E) of each layer.
        attention_mask: (batch, sequence), 0 where a token is padding; None: all tokens count.
        scoring: what the router makes of its logits; DeepSeek-V3's loss (arXiv 2412.19437, eq. 17) is the sigmoid one.
        chosen: (T, K) of each layer, the experts chosen; None: the K most likely.
        total: where processes share a batch, f_e and the number of tokens are those of all of it (as in arXiv
            2501.11873), and what is returned is this process's part of the loss: the parts' sum is the batch's, and so
            is that of their gradients.
    """
    weight_T = token_weights(attention_mask, router_logits[0])
    counts_E = torch.zeros(num_experts, device=router_logits[0].device)
    probs_E = torch.zeros_like(counts_E)
    for layer, logits_TE in enumerate(router_logits):
        probs_TE = probabilities(logits_TE, scoring).to(counts_E.device)
        chosen_TK = probs_TE.topk(top_k, dim=-1).indices if chosen is None else chosen[layer].to(counts_E.device)
        counts_E = counts_E + count_choices(chosen_TK, weight_T, num_experts)
        probs_E = probs_E + weight_T @ probs_TE
    rows = weight_T.sum() * len(router_logits)
    summed = total(torch.cat([counts_E, rows.reshape(1)]))
    counts_E, rows = summed[:-1], summed[-1]
    return num_experts * (counts_E / rows * (probs_E / rows)).sum()


def router_z_loss(logits_TE: Tensor, attention_mask: Tensor | None = None, total: Total = own) -> Tensor:
    """Router z-loss of one layer (ST-MoE, arXiv 2202.08906, eq. 5): mean over tokens of logsumexp(logits)^2.

    `total`: see `switch_loss`.
    """
    weight_T = token_weights(attention_mask, logits_TE)
    return weight_T @ logits_TE.float().logsumexp(dim=-1).square() / total(weight_T.sum())


@dataclass
class _Tally:
    """Sums over tokens, kept on the device until they are read."""

    counts_E: Tensor
    probs_E: Tensor
    entropy: Tensor
    tokens: Tensor

    def __add__(self, other: "_Tally") -> "_Tally":
        return _Tally(
            self.counts_E + other.counts_E,
            self.probs_E + other.probs_E,
            self.entropy + other.entropy,
            self.tokens + other.tokens,
        )

    def packed(self) -> Tensor:
        """As one tensor, for a sum over processes."""
        return torch.cat([self.counts_E, self.probs_E, self.entropy.reshape(1), self.tokens.reshape(1)]).double()


def _unpacked(packed: Tensor) -> _Tally:
    experts = (packed.numel() - 2) // 2
    return _Tally(packed[:experts], packed[experts : 2 * experts], packed[-2], packed[-1])


def _tally(probs_TE: Tensor, chosen_TK: Tensor, weight_T: Tensor) -> _Tally:
    return _Tally(
        counts_E=count_choices(chosen_TK, weight_T, probs_TE.shape[-1]),
        probs_E=weight_T @ probs_TE,
        entropy=weight_T @ torch.special.entr(probs_TE).sum(dim=-1),
        tokens=weight_T.sum(),
    )


def usage(layer: int, probs_TE: Tensor, chosen_TK: Tensor, attention_mask: Tensor | None = None) -> LayerRouting:
    """Use of one layer's experts: probabilities and the experts chosen, over the tokens that are no padding."""
    return _summary(layer, _tally(probs_TE.float(), chosen_TK, token_weights(attention_mask, probs_TE)))


def _summary(layer: int, tally: _Tally) -> LayerRouting:
    counts = tally.counts_E.tolist()
    tokens = tally.tokens.item()
    total = sum(counts)
    share = [count / total for count in counts]
    mean = 1 / len(share)
    variance = sum((part - mean) ** 2 for part in share) / len(share)
    return LayerRouting(
        layer=layer,
        share=share,
        min=min(share),
        max=max(share),
        cv=math.sqrt(variance) / mean,
        dead=counts.count(0.0),
        load_entropy=torch.special.entr(tally.probs_E / tokens).sum().item(),
        token_entropy=tally.entropy.item() / tokens,
    )


class RoutingRecorder:
    """Records what every router of a model decides, inside `with recorder.recording(mask):` and nowhere else.

    Gradient checkpointing (non-reentrant) runs a layer again in backward, when the `with` is over: nothing counts
    twice. Inside it, only passes count that run in the gradient mode in which it was entered: a reference model's
    pass under `no_grad`, within a training step, is not the policy's.
    """

    def __init__(self, model: nn.Module, layout: ExpertLayout) -> None:
        self.layout = layout
        self._tallies: dict[int, _Tally] = {}
        self._logits: dict[int, list[Tensor]] = {}
        self._chosen: dict[int, list[Tensor]] = {}
        self._counts: dict[int, Tensor] = {}
        self._parts: dict[str, Tensor] = {}
        self._part_tallies: dict[tuple[str, int], _Tally] = {}
        self._attention_mask: Tensor | None = None
        self._device = next(model.parameters()).device
        self._open = False
        self._grad_mode = False
        self._handles = [
            router.register_forward_hook(partial(self._decided, layer))
            for layer, router in layout.routers(model).items()
        ]

    @contextmanager
    def recording(self, attention_mask: Tensor | None, parts: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Record the passes inside.

        Args:
            attention_mask: (batch, sequence) of those passes, 0 where a token is padding; None: no padding.
            parts: name -> (batch, sequence), 1 at the tokens that are also counted apart, under that name.
        """
        self._attention_mask = attention_mask
        self._parts = dict(parts or {})
        self._logits, self._chosen = {}, {}
        self._grad_mode = torch.is_grad_enabled()
        self._open = True
        try:
            yield
        finally:
            self._open = False

    @property
    def attention_mask(self) -> Tensor | None:
        """Of the last recording."""
        return self._attention_mask

    def logits(self) -> list[Tensor]:
        """Router logits (T, E) of the last recording, layer by layer, with their gradient.

        Raises:
            RuntimeError: nothing was recorded (reentrant checkpointing runs the layers without gradients).
        """
        if not self._logits:
            raise RuntimeError("no router ran in the gradient mode of the recording; is checkpointing reentrant?")
        return [logits_TE for passes in self._logits.values() for logits_TE in passes]

    def chosen(self) -> list[Tensor]:
        """The experts (T, K) that were chosen, in the order of `logits`; E stands for none."""
        return [chosen_TK for passes in self._chosen.values() for chosen_TK in passes]

    def z_loss(self, total: Total = own) -> Tensor:
        """Router z-loss of the last recording, the mean over its layers, with its gradient; `total`: `switch_loss`."""
        losses = [router_z_loss(logits_TE, self._attention_mask, total) for logits_TE in self.logits()]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def take_counts(self, total: Total = own) -> dict[int, Tensor]:
        """Tokens that each expert of a layer got, (E,), since the last `take_counts`; `total`: in all processes."""
        counts, self._counts = self._counts, {}
        if total is own or not counts:
            return counts
        summed_LE = total(torch.stack([counts[layer] for layer in sorted(counts)]))
        return dict(zip(sorted(counts), summed_LE, strict=True))

    def take(self, total: Total = own) -> list[LayerRouting]:
        """Every layer's routing since the last `take`, in order; empty where no token was recorded."""
        tallies, self._tallies = self._tallies, {}
        self._logits, self._chosen = {}, {}
        if total is not own and tallies:
            summed = total(torch.stack([tallies[layer].packed() for layer in sorted(tallies)]))
            tallies = {layer: _unpacked(packed) for layer, packed in zip(sorted(tallies), summed, strict=True)}
        return [_summary(layer, tally) for layer, tally in sorted(tallies.items()) if tally.tokens.item() > 0]

    def take_parts(self, names: Sequence[str] = (), total: Total = own) -> dict[str, list[LayerRouting]]:
        """Routing of each part by itself since the last `take_parts`; a part without a token is left out.

        Args:
            names: of all parts that any process may have seen.
            total: the sum over processes.
        """
        tallies, self._part_tallies = self._part_tallies, {}
        if total is not own and names:
            keys = [(part, layer) for part in sorted(names) for layer in self.layout.moe_layers]
            nothing = torch.zeros(2 * self.layout.num_experts + 2, dtype=torch.float64, device=self._device)
            mine = [tallies[key].packed() if key in tallies else nothing for key in keys]
            tallies = {key: _unpacked(packed) for key, packed in zip(keys, total(torch.stack(mine)), strict=True)}
        found: dict[str, list[LayerRouting]] = {}
        for (part, layer), tally in sorted(tallies.items()):
            if tally.tokens.item() > 0:
                found.setdefault(part, []).append(_summary(layer, tally))
        return found

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _decided(self, layer: int, router: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        if not self._open or torch.is_grad_enabled() != self._grad_mode:
            return
        layout = self.layout
        logits_TE = outputs[layout.logits_at].reshape(-1, layout.num_experts)
        # A checkpointed layer must save the same tensors for backward when it runs again without this hook: what is
        # computed here is computed without gradients, and the logits' own gradient is left to `z_loss`.
        self._logits.setdefault(layer, []).append(logits_TE)
        with torch.no_grad():
            detached_TE = logits_TE.detach()
            chosen_TK = chosen_experts(layout, outputs, detached_TE)
            self._chosen.setdefault(layer, []).append(chosen_TK)
            weight_T = token_weights(self._attention_mask, detached_TE)
            probs_TE = probabilities(detached_TE, layout.scoring)
            tally = _tally(probs_TE, chosen_TK, weight_T)
            self._tallies[layer] = self._tallies[layer] + tally if layer in self._tallies else tally
            for part, mask in self._parts.items():
                of_part = _tally(probs_TE, chosen_TK, token_weights(mask, detached_TE))
                before = self._part_tallies.get((part, layer))
                self._part_tallies[part, layer] = of_part if before is None else before + of_part
            seen = self._counts.get(layer)
            self._counts[layer] = tally.counts_E if seen is None else seen + tally.counts_E


def token_weights(attention_mask: Tensor | None, rows: Tensor) -> Tensor:
    """1.0 for each token that counts, 0.0 for padding: (T,) fp32 on the device of `rows` (T, ...)."""
    if attention_mask is None:
        return torch.ones(rows.shape[0], device=rows.device)
    if attention_mask.numel() != rows.shape[0]:
        raise ValueError(
            f"attention_mask has {tuple(attention_mask.shape)} entries, but the router saw {rows.shape[0]} tokens"
        )
    return attention_mask.reshape(-1).to(device=rows.device, dtype=torch.float32)


def count_choices(chosen_TK: Tensor, weight_T: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen: (E,), E itself standing for none.

    `scatter_add` and not `bincount`, which waits for the GPU.
    """
    counts = torch.zeros(num_experts + 1, device=chosen_TK.device)
    return counts.scatter_add(0, chosen_TK.reshape(-1), weight_T.repeat_interleave(chosen_TK.shape[-1]))[:num_experts]


def chosen_experts(layout: ExpertLayout, outputs: tuple[Tensor, ...], logits_TE: Tensor) -> Tensor:
    """(T, K) from what a router's forward gave, or (T, E) where experts chose tokens; E stands for none."""
    if layout.chosen_at < len(outputs):  # Llama 4's gives its scores and logits only
        return outputs[layout.chosen_at].reshape(logits_TE.shape[0], -1)
    return logits_TE.topk(layout.top_k, dim=-1).indices
