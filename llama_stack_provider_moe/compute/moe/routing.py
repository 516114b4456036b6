"""Router decisions: balance losses as pure functions, and a recorder of every layer's decisions.

Shapes: T tokens (batch x sequence, flattened), E experts, K experts per token (top-k). Everything is computed in fp32,
whatever the dtype of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.routing_sums import ALL, Key, LayerRouting, RoutingSums, Tally, packed
from llama_stack_provider_moe.compute.moe.scoring import Scoring, probabilities

# Sum over the processes that share a batch, without a gradient; the identity in a job with one process.
Total = Callable[[Tensor], Tensor]


def local_sum(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def switch_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    num_experts: int,
    attention_mask: Tensor | None = None,
    *,
    scoring: Scoring = "softmax",
    chosen: Sequence[Tensor] | None = None,
    total: Total = local_sum,
) -> Tensor:
    """Switch Transformer's balance loss in its top-k form (arXiv 2101.03961, eq. 4): E * sum_e f_e * P_e.

    f_e is the number of a token's K choices that are e, P_e its probability of e, both as means over the tokens of
    all layers; the loss is K at perfect balance. It equals the `aux_loss` of transformers' models.

    Args:
        router_logits: (T, E) for each layer.
        top_k: K.
        num_experts: E.
        attention_mask: (batch, sequence), 0 for padding; None: all tokens count.
        scoring: how the router turns logits into scores; DeepSeek-V3's loss (arXiv 2412.19437, eq. 17) uses sigmoid.
        chosen: (T, K) for each layer, the experts chosen; None: the K most likely.
        total: sum over the processes that share a batch. f_e and the number of tokens are then those of the whole batch
            (as in arXiv 2501.11873), and the result is this process's part of the loss: the parts add up to the loss of
            the batch, and so do their gradients.
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


def router_z_loss(logits_TE: Tensor, attention_mask: Tensor | None = None, total: Total = local_sum) -> Tensor:
    """Router z-loss of one layer (ST-MoE, arXiv 2202.08906, eq. 5): mean over tokens of logsumexp(logits)^2.

    `total`: see `switch_loss`.
    """
    weight_T = token_weights(attention_mask, logits_TE)
    return weight_T @ logits_TE.float().logsumexp(dim=-1).square() / total(weight_T.sum())


def _tally(probs_TE: Tensor, chosen_TK: Tensor, weight_T: Tensor) -> Tally:
    return Tally(
        counts_E=count_choices(chosen_TK, weight_T, probs_TE.shape[-1]),
        probs_E=weight_T @ probs_TE,
        entropy=weight_T @ torch.special.entr(probs_TE).sum(dim=-1),
        tokens=weight_T.sum(),
    )


def usage(layer: int, probs_TE: Tensor, chosen_TK: Tensor, attention_mask: Tensor | None = None) -> LayerRouting:
    """How one layer used its experts, from probabilities and chosen experts, over the tokens that are not padding.

    Args:
        layer: number of the layer.
        probs_TE: routing probabilities.
        chosen_TK: experts chosen.
        attention_mask: (batch, sequence), 0 for padding; None: no padding.
    """
    tally = _tally(probs_TE.float(), chosen_TK, token_weights(attention_mask, probs_TE))
    (found,) = RoutingSums.of({(ALL, layer): tally}, [(ALL, layer)], probs_TE.shape[1], probs_TE.device).read().layers
    return found


class RoutingRecorder:
    """Records the decisions of every router of a model, only inside `with recorder.recording(mask):`.

    Gradient checkpointing (non-reentrant) runs a layer again in backward, after the `with`, so nothing counts twice.
    Inside the `with`, only passes in the gradient mode of its start count: a pass of a reference model under `no_grad`
    within a training step is not recorded.
    """

    def __init__(self, model: nn.Module, layout: ExpertLayout) -> None:
        self.layout = layout
        self._tallies: dict[int, Tally] = {}
        self._logits: dict[int, list[Tensor]] = {}
        self._chosen: dict[int, list[Tensor]] = {}
        self._own: dict[int, list[Tensor]] = {}
        # Tells what a layer's router would have chosen where it is made to use other experts (`replay`).
        self.own_choice: Callable[[int], Tensor | None] | None = None
        self._counts: dict[int, Tensor] = {}
        self._parts: dict[str, Tensor] = {}
        self._part_tallies: dict[tuple[str, int], Tally] = {}
        self._attention_mask: Tensor | None = None
        self._device = next(model.parameters()).device
        self._open = False
        self._first_alone = False
        self._grad_mode = False
        self._handles = [
            router.register_forward_hook(partial(self._record, layer))
            for layer, router in layout.routers(model).items()
        ]

    @contextmanager
    def recording(
        self, attention_mask: Tensor | None, parts: Mapping[str, Tensor] | None = None, first_alone: bool = False
    ) -> Iterator[None]:
        """Record the passes inside.

        Args:
            attention_mask: (batch, sequence) of those passes, 0 for padding; None: no padding.
            parts: name -> (batch, sequence), 1 for tokens that are also counted separately under that name.
            first_alone: if there are several passes (a model, then its reference), only the first counts.
        """
        self._first_alone = first_alone
        self._attention_mask = attention_mask
        self._parts = dict(parts or {})
        self._logits, self._chosen, self._own = {}, {}, {}
        self._grad_mode = torch.is_grad_enabled()
        self._open = True
        try:
            yield
        finally:
            self._open = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record no pass inside, within a recording."""
        was_open, self._open = self._open, False
        try:
            yield
        finally:
            self._open = was_open

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Keep recordings inside separate from earlier ones, and discard them afterwards."""
        kept = self._tallies, self._logits, self._chosen, self._own, self._counts, self._part_tallies
        self._tallies, self._logits, self._chosen, self._own, self._counts, self._part_tallies = {}, {}, {}, {}, {}, {}
        try:
            yield
        finally:
            self._tallies, self._logits, self._chosen, self._own, self._counts, self._part_tallies = kept

    def switch_loss(self, total: Total = local_sum) -> float:
        """`switch_loss` of everything recorded since the last `take`, as one batch, over all processes.

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self._tallies:
            raise RuntimeError("no router ran inside a recording")
        experts = self.layout.choices
        summed = total(packed(self._balanced(self._tallies), self._device).sum(dim=0))  # also summed over layers
        counts_E, probs_E, tokens = summed[:experts], summed[experts : 2 * experts], summed[-1]
        return float(experts * (counts_E * probs_E).sum() / tokens.square())

    @property
    def attention_mask(self) -> Tensor | None:
        """Mask of the last recording."""
        return self._attention_mask

    def logits(self) -> list[Tensor]:
        """Router logits (T, E) of the last recording, layer by layer, with their gradient.

        Raises:
            RuntimeError: nothing was recorded (reentrant checkpointing runs the layers without gradients).
        """
        if not self._logits:
            raise RuntimeError("no router ran in the gradient mode of the recording; is checkpointing reentrant?")
        return [logits_TE for passes in self._balanced(self._logits) for logits_TE in passes]

    def chosen(self) -> list[Tensor]:
        """The experts (T, K) that routers chose themselves, in the order of `logits`; E means none.

        A balance loss counts these, also where replay makes a router use others: they are what its logits lead to.
        Losses of transformers' models and of Megatron-Core do so too, by the largest logits.
        """
        return [chosen_TK for passes in self._balanced(self._own) for chosen_TK in passes]

    def chosen_in(self, layer: int) -> Tensor:
        """The experts (T, K) that ran in a layer's last pass, also where ids of tokens or replay fix them."""
        return self._chosen[layer][-1]

    def last_choice(self, layer: int) -> tuple[Tensor, Tensor]:
        """The experts (K,) chosen for the last position of the last pass through a layer, and their scores (K,).

        A score is the expert's share of the router's scores, see `scoring.probabilities`.
        """
        chosen_K = self._chosen[layer][-1][-1]
        probs_E = probabilities(self._logits[layer][-1][-1].detach(), self.layout.scoring)
        return chosen_K, probs_E[chosen_K]

    def forget_passes(self) -> None:
        """Drop the logits and choices of the passes so far, which take memory; the figures of `take` stay."""
        self._logits, self._chosen, self._own = {}, {}, {}

    def _balanced[Each](self, by_layer: dict[int, Each]) -> list[Each]:
        """Of the layers whose router chooses; where a token's id fixes its experts, nothing can be balanced."""
        return [each for layer, each in by_layer.items() if layer not in self.layout.by_token_layers]

    def z_loss(self, total: Total = local_sum) -> Tensor:
        """Router z-loss of the last recording, mean over layers, with its gradient; `total`: see `switch_loss`."""
        losses = [router_z_loss(logits_TE, self._attention_mask, total) for logits_TE in self.logits()]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def take_counts(self, total: Total = local_sum) -> dict[int, Tensor]:
        """Layer -> tokens per expert (E,) since the last `take_counts`; `total` sums over processes."""
        counts, self._counts = self._counts, {}
        if total is local_sum or not counts:
            return counts
        summed_LE = total(torch.stack([counts[layer] for layer in sorted(counts)]))
        return dict(zip(sorted(counts), summed_LE, strict=True))

    def take(self, total: Total = local_sum) -> list[LayerRouting]:
        """Routing of every layer since the last `take`, in order; empty if no token was recorded."""
        tallies = {(ALL, layer): tally for layer, tally in self._tallies.items()}
        self._tallies, self._logits, self._chosen, self._own = {}, {}, {}, {}
        return self._summed(tallies, (ALL,), total).read().layers

    def take_parts(self, names: Sequence[str] = (), total: Total = local_sum) -> dict[str, list[LayerRouting]]:
        """Routing of each part since the last `take_parts`; parts without tokens are left out.

        Args:
            names: names of all parts that any process may have seen.
            total: sum over processes.
        """
        tallies, self._part_tallies = self._part_tallies, {}
        parts = names if total is not local_sum else {part for part, _ in tallies}
        return self._summed(tallies, sorted(parts), total).read().parts

    def take_sums(self, names: Sequence[str], total: Total = local_sum) -> RoutingSums:
        """What `take` and `take_parts` would return, as sums on the device; no process waits for its device.

        Args:
            names: names of all parts that any process may have seen.
            total: sum over processes.
        """
        tallies = {(ALL, layer): tally for layer, tally in self._tallies.items()} | self._part_tallies
        unknown = {part for part, _ in self._part_tallies} - {*names}
        assert not unknown, f"parts {sorted(unknown)} are not among {names}"
        self._tallies, self._part_tallies, self._logits, self._chosen, self._own = {}, {}, {}, {}, {}
        return self._summed(tallies, (ALL, *sorted(names)), total)

    def _summed(self, tallies: Mapping[Key, Tally], parts: Sequence[str], total: Total) -> RoutingSums:
        keys = [(part, layer) for part in parts for layer in self.layout.moe_layers]
        sums = RoutingSums.of(tallies, keys, self.layout.choices, self._device)
        return RoutingSums(sums.keys, total(sums.packed_KS)) if keys else sums

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _record(self, layer: int, router: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        if not self._open or torch.is_grad_enabled() != self._grad_mode:
            return
        if self._first_alone and layer in self._logits:
            return
        layout = self.layout
        logits_TE = outputs[layout.logits_at].reshape(-1, layout.choices)
        # A checkpointed layer must save the same tensors for backward when it runs again without this hook. So
        # everything here runs without gradients, and `z_loss` uses the gradient of the logits themselves.
        self._logits.setdefault(layer, []).append(logits_TE)
        with torch.no_grad():
            detached_TE = logits_TE.detach()
            chosen_TK = chosen_experts(layout, outputs, detached_TE)
            self._chosen.setdefault(layer, []).append(chosen_TK)
            own_TK = None if self.own_choice is None else self.own_choice(layer)
            self._own.setdefault(layer, []).append(chosen_TK if own_TK is None else own_TK)
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
    """1.0 for tokens that count, 0.0 for padding: (T,) fp32 on the device of `rows` (T, ...)."""
    if attention_mask is None:
        return torch.ones(rows.shape[0], device=rows.device)
    if attention_mask.numel() != rows.shape[0]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the router saw {rows.shape[0]} tokens"
        )
    return attention_mask.reshape(-1).to(device=rows.device, dtype=torch.float32)


def count_choices(chosen_TK: Tensor, weight_T: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen: (E,); index E means none.

    Uses `scatter_add`, because `bincount` waits for the GPU.
    """
    counts = torch.zeros(num_experts + 1, device=chosen_TK.device)
    return counts.scatter_add(0, chosen_TK.reshape(-1), weight_T.repeat_interleave(chosen_TK.shape[-1]))[:num_experts]


def chosen_experts(layout: ExpertLayout, outputs: tuple[Tensor, ...], logits_TE: Tensor) -> Tensor:
    """(T, K) from the outputs of a router, or (T, E) if experts chose tokens; E means none."""
    if layout.chosen_at < len(outputs):  # Llama 4's router returns only scores and logits
        return outputs[layout.chosen_at].reshape(logits_TE.shape[0], -1)
    return logits_TE.topk(layout.top_k, dim=-1).indices
