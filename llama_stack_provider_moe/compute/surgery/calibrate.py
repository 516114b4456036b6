"""What calibration rows show: how often and how much each expert contributes, and what a surgery does to the loss.

The families' own modules compute everything. An expert's output f_j(x) is that of its module for one chosen expert with
weight 1, so it includes biases, gates and norms as the family has them.

Shapes: T tokens, E experts, K experts per token, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.methods.surgery import reap_scores
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.masking import masked_experts
from llama_stack_provider_moe.compute.moe.routing import chosen_experts, count_choices
from llama_stack_provider_moe.compute.moe.scoring import probabilities
from llama_stack_provider_moe.errors import DataError, LayoutError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.surgery import Criterion

# Experts that get each token once for every expert, times its score, and zeros where it was not chosen.
SCALED_INPUTS = ("Llama4TextExperts",)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """Figures (L, E) in fp64 over the tokens that are not padding, in the order of the layers with experts.

    Attributes:
        count_LE: tokens that chose the expert.
        contribution_LE: sum over them of router weight times norm of the expert's output.
        probability_LE: mean routing probability over all tokens, chosen or not.
        tokens: number of tokens.
    """

    count_LE: Tensor
    contribution_LE: Tensor
    probability_LE: Tensor
    tokens: int

    def scores(self, by: Criterion) -> Tensor:
        """Scores (L, E) of the experts; the higher, the more they matter."""
        return self.count_LE if by == "usage" else reap_scores(self.contribution_LE, self.count_LE)


@dataclass(frozen=True)
class Losses:
    """Mean over tokens: the loss in nats before and after, and the KL divergence from the model before to it after.

    `moved` is the greatest change of a logit.
    """

    before: float
    after: float
    kl: float
    moved: float
    tokens: int


def calibrate(
    model: nn.Module,
    layout: ExpertLayout,
    prompts: Sequence[Prompt],
    batch_size: int,
    contributions: bool = True,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Run the rows through the model once and add up what its experts do.

    Args:
        model: in evaluation mode.
        layout: of its experts.
        prompts: rows.
        batch_size: rows in one pass.
        contributions: measure them too, which runs every chosen expert twice; else they are 0.
        progress: called with the number of rows that are done and their total.

    Raises:
        LayoutError: the experts' module is called in a way that is not known.
    """
    tallies = {layer: _Tally(layout) for layer in layout.moe_layers}
    with (
        _watched(model, layout, tallies, contributions),
        liveness.stage("calibrating", len(prompts), "rows") as counter,
    ):
        done = 0
        for ids_BT, mask_BT in batches(model, prompts, batch_size):
            for tally in tallies.values():
                tally.weight_T = mask_BT.reshape(-1).double()
            with torch.no_grad():
                model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
            done += len(ids_BT)
            counter.at(done, len(prompts))
            progress(done, len(prompts))
    tokens = sum(len(prompt.ids) for prompt in prompts)
    ordered = [tallies[layer] for layer in layout.moe_layers]
    return Calibration(
        count_LE=torch.stack([each.count_E for each in ordered]),
        contribution_LE=torch.stack([each.contribution_E for each in ordered]),
        probability_LE=torch.stack([each.probability_E for each in ordered]) / tokens,
        tokens=tokens,
    )


def losses(
    model: nn.Module,
    layout: ExpertLayout,
    prompts: Sequence[Prompt],
    masked: Mapping[int, Sequence[int]],
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> Losses:
    """Measure the loss with and without experts; a masked expert changes the model as a pruned one does.

    Args:
        model: in evaluation mode.
        layout: of its experts.
        prompts: rows.
        masked: layer -> the experts that go.
        batch_size: rows in one pass.
        progress: called with the number of rows that are done and their total.

    Raises:
        DataError: no row has two tokens.
    """

    def after(**given: Tensor) -> Tensor:
        with masked_experts(model, layout, masked):
            found: Tensor = model(**given).logits
            return found

    return _compared(model, after, prompts, batch_size, progress)


def losses_of(
    model: nn.Module,
    other: nn.Module,
    prompts: Sequence[Prompt],
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> Losses:
    """Measure the loss of a model and of the one that a surgery makes of it, both in evaluation mode; see `losses`."""

    def after(**given: Tensor) -> Tensor:
        found: Tensor = other(**given).logits
        return found

    return _compared(model, after, prompts, batch_size, progress)


def _compared(
    model: nn.Module,
    other: Callable[..., Tensor],
    prompts: Sequence[Prompt],
    batch_size: int,
    progress: Progress,
) -> Losses:
    before = after = kl = moved = 0.0
    tokens = done = 0
    with liveness.stage("measuring the loss", len(prompts), "rows") as counter:
        for ids_BT, mask_BT in batches(model, prompts, batch_size):
            with torch.no_grad():
                given = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
                whole_BTV, changed_BTV = model(**given).logits, other(**given)
                for row in range(len(ids_BT)):
                    length = int(mask_BT[row].sum())
                    one_TV, other_TV = whole_BTV[row, : length - 1], changed_BTV[row, : length - 1]
                    found = _row_losses(one_TV, other_TV, ids_BT[row, 1:length])
                    before, after, kl = before + found[0], after + found[1], kl + found[2]
                    if length > 1:
                        moved = max(moved, float((one_TV.float() - other_TV.float()).abs().max()))
                    tokens += max(0, length - 1)
            done += len(ids_BT)
            counter.at(done, len(prompts))
            progress(done, len(prompts))
    if not tokens:
        raise DataError("rows: no row has two tokens, so there is no loss to measure; expected longer texts")
    return Losses(before / tokens, after / tokens, kl / tokens, moved, tokens)


def _row_losses(whole_TV: Tensor, pruned_TV: Tensor, next_T: Tensor) -> tuple[float, float, float]:
    """Sums over the tokens of one row: both losses and the divergence."""
    one_TV, other_TV = (each.float().log_softmax(dim=-1) for each in (whole_TV, pruned_TV))
    kl = functional.kl_div(other_TV, one_TV, reduction="sum", log_target=True)
    before, after = (float(functional.nll_loss(each, next_T, reduction="sum")) for each in (one_TV, other_TV))
    return before, after, float(kl)


def batches(model: nn.Module, prompts: Sequence[Prompt], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and mask (B, T) of rows of similar length."""
    device = next(model.parameters()).device
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    for start in range(0, len(ordered), batch_size):
        rows = [torch.tensor(prompt.ids) for prompt in ordered[start : start + batch_size]]
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        ids_BT = pad_sequence(rows, batch_first=True).to(device)
        yield ids_BT, (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long()


class _Tally:
    """Sums of one layer, and what its router said in the pass that runs."""

    def __init__(self, layout: ExpertLayout) -> None:
        self.count_E = torch.zeros(layout.num_experts, dtype=torch.float64)
        self.contribution_E = torch.zeros(layout.num_experts, dtype=torch.float64)
        self.probability_E = torch.zeros(layout.num_experts, dtype=torch.float64)
        self.weight_T = torch.zeros(0, dtype=torch.float64)

    def router(self, layout: ExpertLayout, outputs: tuple[Tensor, ...]) -> None:
        """Add the choices and probabilities of a pass."""
        logits_TE = outputs[layout.logits_at].reshape(-1, layout.choices)
        chosen_TK = chosen_experts(layout, outputs, logits_TE)
        count_E = count_choices(chosen_TK, self.weight_T.float(), layout.choices)
        probability_E = self.weight_T @ probabilities(logits_TE, layout.scoring).double()
        self.count_E += count_E[: layout.num_experts].double().cpu()
        self.probability_E += probability_E[: layout.num_experts].cpu()

    def add(self, expert_T: Tensor, contribution_T: Tensor) -> None:
        """Add contributions of tokens to their experts; a number beyond the experts means none."""
        counts_T = self.weight_T * (expert_T < len(self.contribution_E))
        index_T = expert_T.clamp(max=len(self.contribution_E) - 1)
        summed_E = torch.zeros(len(self.contribution_E), dtype=torch.float64, device=expert_T.device)
        self.contribution_E += summed_E.index_add(0, index_T, contribution_T.double() * counts_T).cpu()


@contextmanager
def _watched(
    model: nn.Module, layout: ExpertLayout, tallies: Mapping[int, _Tally], contributions: bool
) -> Iterator[None]:
    handles = []
    routers, experts = layout.routers(model), layout.experts(model)
    for layer, tally in tallies.items():
        handles.append(routers[layer].register_forward_hook(_router_hook(layout, tally)))
        if contributions:
            handles.append(experts[layer].register_forward_hook(_experts_hook(layout, tally)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _router_hook(layout: ExpertLayout, tally: _Tally) -> Callable[..., None]:
    def hook(_router: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        tally.router(layout, outputs)

    return hook


def _experts_hook(layout: ExpertLayout, tally: _Tally) -> Callable[..., None]:
    def hook(experts: nn.Module, inputs: tuple[Tensor, ...], output_TH: Tensor) -> None:
        if type(experts).__name__ in SCALED_INPUTS:
            norm_ET = output_TH.reshape(layout.num_experts, -1, output_TH.shape[-1]).float().norm(dim=-1)
            for expert, norm_T in enumerate(norm_ET):
                tally.add(torch.full_like(norm_T, expert, dtype=torch.long), norm_T)
            return
        if len(inputs) != 3 or inputs[1].is_floating_point() or inputs[1].shape != inputs[2].shape:
            raise LayoutError(f"{type(experts).__name__}: is not called with tokens, chosen experts and their weights, "
                              "so its contributions can't be measured; expected surgery.by 'usage'")  # fmt: skip
        hidden_TH, chosen_TK, weight_TK = inputs
        for at in range(chosen_TK.shape[1]):
            one_T1 = chosen_TK[:, at : at + 1]
            # `forward`, not a call: this hook must not see it. f_j(x) is the module's output with weight 1.
            made_TH = experts.forward(hidden_TH, one_T1, torch.ones_like(weight_TK[:, :1]))
            norm_T = made_TH.reshape(-1, made_TH.shape[-1]).float().norm(dim=-1)
            tally.add(one_T1.reshape(-1), norm_T * weight_TK[:, at].float().abs())

    return hook
