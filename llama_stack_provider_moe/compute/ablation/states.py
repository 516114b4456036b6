"""Mean hidden states of two sets of prompts after every decoder block, in two passes over the rows.

The first pass sums the states of each row at one token, or their mean over some tokens, in fp64, for each half of each
set. The second projects each row's state on the direction that the *other* half gives, so that no row tests a direction
that it made. Neither keeps the states of a row.

Shapes: B rows of a batch, T their length, S measured tokens of a row, L decoder blocks, H width, N rows of a set.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llama_stack_provider_moe.compute.ablation.measurements import SETS, MeasuredStates
from llama_stack_provider_moe.compute.ablation.structure import Structure, observed
from llama_stack_provider_moe.compute.ablation.subject import Subject
from llama_stack_provider_moe.compute.analysis.routing_report import Counts, Prompt, by_row
from llama_stack_provider_moe.compute.methods.ablation import NoDirection, direction
from llama_stack_provider_moe.compute.models.hidden_states import Blocks
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.errors import DataError, ModelError
from llama_stack_provider_moe.spec.ablation import BASELINE, TARGET, Measure

_OBSERVED_TOKENS = 8

type Progress = Callable[[int, int], None]


class Batch:
    """Rows that go through the model together.

    Attributes:
        rows: their numbers.
        ids_BT: their tokens, padded on the right.
        mask_BT: 0 where a token is padding.
        at_BS: the places of the measured tokens.
    """

    def __init__(self, prompts: Sequence[Prompt], rows: Sequence[int], measure: Measure, device: torch.device) -> None:
        self.rows = torch.tensor(rows)
        lengths_B = torch.tensor([len(prompts[row].ids) for row in rows], device=device)
        self.ids_BT = pad_sequence([torch.tensor(prompts[row].ids) for row in rows], batch_first=True).to(device)
        self.mask_BT = (torch.arange(self.ids_BT.shape[1], device=device) < lengths_B[:, None]).long()
        last_B = lengths_B + measure.position if measure.position < 0 else torch.full_like(lengths_B, measure.position)
        self.at_BS = last_B[:, None] - torch.arange(measure.span, device=device)


class _States:
    """The mean states of the measured tokens of each row of the latest pass, after every block."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = Blocks(model)
        self.width = int(text_config(model).hidden_size)
        self._at_BS = torch.empty(0)
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep them in passes inside the `with`."""
        handles = [layer.register_forward_hook(self._keep(at)) for at, layer in enumerate(self.blocks.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, batch: Batch) -> Tensor:
        """Run a batch, and return its states: (L, B, H) in fp64."""
        self._at_BS, self._found = batch.at_BS, {}
        with torch.no_grad():
            self.blocks.decoder(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)
        return torch.stack([self._found[at] for at in range(len(self.blocks.layers))])

    def _keep(self, block: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states_BTH = output if isinstance(output, Tensor) else output[0]
            if states_BTH.dim() != 3 or states_BTH.shape[2] != self.width:
                raise ModelError(
                    f"model: decoder block {block} returns states of shape {tuple(states_BTH.shape)}, not one residual "
                    f"stream of width {self.width}; directions are measured in models with one stream"
                )
            self._found[block] = state_of(states_BTH, self._at_BS)

        return hook


def state_of(states_BTH: Tensor, at_BS: Tensor) -> Tensor:
    """The mean state of the measured tokens of each row, (B, H) in fp64."""
    rows_B1 = torch.arange(len(states_BTH), device=states_BTH.device)[:, None]
    return states_BTH[rows_B1, at_BS].double().mean(dim=1)


def structure_of(subject: Subject, prompt: Prompt) -> Structure:
    """See `structure`; the first tokens of a prompt go through the model."""
    device = next(subject.model.parameters()).device
    ids = torch.tensor([prompt.ids[:_OBSERVED_TOKENS]], device=device)
    decoder = Blocks(subject.model).decoder
    with torch.no_grad(), observed(subject.model, subject.layout) as found:
        decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return found


def measure(
    subject: Subject,
    prompts: Mapping[str, Sequence[Prompt]],
    tokens: Measure,
    batch_size: int,
    progress: Progress,
) -> tuple[dict[str, MeasuredStates], dict[str, Counts]]:
    """The figures of each set, and how its prompts were routed (empty for a dense model).

    Args:
        subject: the model.
        prompts: name of a set -> its rows, at least two in each half.
        tokens: which of each prompt's tokens count.
        batch_size: rows in one pass; rows of similar length go together.
        progress: called with the number of rows that are done and their total; each row counts twice.

    Raises:
        DataError: the sets can't be told apart at some block.
        ModelError: the model has several residual streams, or its states are not finite.
    """
    states = _States(subject.model)
    total = 2 * sum(map(len, prompts.values()))
    steps = _Steps(progress, total)
    sums, counts = {}, dict[str, Counts]()
    with states.kept():
        for name in SETS:
            sums[name], counted = _sums(subject, states, prompts[name], tokens, batch_size, steps)
            if counted is not None:
                counts[name] = counted
        halves = {name: sums[name] / _sizes(len(prompts[name]))[:, None, None] for name in SETS}
        units_2LH = _directions(halves)
        made = {}
        for name in SETS:
            scores_NL = _scores(states, prompts[name], units_2LH, tokens, batch_size, steps)
            mean_LH = sums[name].sum(dim=0) / len(prompts[name])
            made[name] = MeasuredStates(mean_LH.cpu(), halves[name].cpu(), scores_NL)
    return made, counts


class _Steps:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, rows: int) -> None:
        self._done += rows
        self._progress(self._done, self._total)


def _sizes(rows: int) -> Tensor:
    return torch.tensor([(rows + 1) // 2, rows // 2], dtype=torch.float64)


def batches(prompts: Sequence[Prompt], tokens: Measure, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """The prompts in batches of similar length, padded on the right.

    Args:
        prompts: with the tokens that `tokens` names.
        tokens: which of each prompt's tokens count.
        batch_size: prompts in one batch.
        device: where the batches go.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))
    for start in range(0, len(order), batch_size):
        yield Batch(prompts, order[start : start + batch_size], tokens, device)


def _sums(
    subject: Subject, states: _States, prompts: Sequence[Prompt], tokens: Measure, batch_size: int, steps: _Steps
) -> tuple[Tensor, Counts | None]:
    """Sums over the rows of each half, (2, L, H), and the counts of routing."""
    layout, device = subject.layout, next(subject.model.parameters()).device
    sums_2LH = torch.zeros(2, len(states.blocks.layers), states.width, dtype=torch.float64)
    recorder = None if layout is None else RoutingRecorder(subject.model, layout)
    routed_NLE = None if layout is None else np.zeros(
        (len(prompts), len(layout.moe_layers), layout.choices), dtype=np.float32)  # fmt: skip
    try:
        for batch in batches(prompts, tokens, batch_size, device):
            if recorder is None or layout is None or routed_NLE is None:
                found_LBH = states.of(batch)
            else:
                # In this order: a recorder counts passes in the gradient mode of its start.
                with torch.no_grad(), recorder.recording(batch.mask_BT):
                    found_LBH = states.of(batch)
                for place, layer in enumerate(layout.moe_layers):
                    counted_BE = by_row(recorder.chosen_in(layer), batch.mask_BT, layout.choices)
                    routed_NLE[batch.rows.numpy(), place] = counted_BE.cpu().numpy()
            _require_finite(found_LBH)
            sums_2LH.index_add_(0, batch.rows % 2, found_LBH.transpose(0, 1).cpu())
            steps.advance(len(batch.rows))
    finally:
        if recorder is not None:
            recorder.close()
    tokens_N = np.array([len(prompt.ids) for prompt in prompts], dtype=np.float32)
    return sums_2LH, None if routed_NLE is None else Counts(routed_NLE, tokens_N)


def _require_finite(states_LBH: Tensor) -> None:
    finite_L = torch.isfinite(states_LBH).flatten(1).all(dim=1)
    if not bool(finite_L.all()):
        block = int((~finite_L).nonzero()[0])
        raise ModelError(f"model: the states after decoder block {block} are not finite; try training.dtype fp32")


def _directions(halves: Mapping[str, Tensor]) -> Tensor:
    """The projected unit direction of each half at each block, (2, L, H)."""
    found = []
    for target_LH, baseline_LH in zip(halves[TARGET], halves[BASELINE], strict=True):
        for block, (target_H, baseline_H) in enumerate(zip(target_LH, baseline_LH, strict=True)):
            try:
                found.append(direction(target_H, baseline_H, "projected"))
            except NoDirection as error:
                raise DataError(f"data.sets: after decoder block {block} {error}; give other prompts") from None
    return torch.stack(found).view_as(halves[TARGET])


def _scores(
    states: _States, prompts: Sequence[Prompt], units_2LH: Tensor, tokens: Measure, batch_size: int, steps: _Steps
) -> Tensor:
    """State of each row along the direction of the half that it is not in, (N, L)."""
    device = next(states.blocks.decoder.parameters()).device
    other_2LH = units_2LH.flip(0).to(device)
    scores_NL = torch.zeros(len(prompts), len(states.blocks.layers))
    for batch in batches(prompts, tokens, batch_size, device):
        units_BLH = other_2LH[(batch.rows % 2).to(device)]
        scores_NL[batch.rows] = torch.einsum("lbh,blh->bl", states.of(batch), units_BLH).float().cpu()
        steps.advance(len(batch.rows))
    return scores_NL
