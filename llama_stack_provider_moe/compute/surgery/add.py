"""Add experts: copies of old ones, or MLPs of another model, with router rows of their own.

No router row makes a new expert invisible where experts compete by their logits alone, so what it changes is measured.
Where sigmoid scores and a bias decide the choice (DeepSeek-V3 and others), a low bias closes an expert: nothing
changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.export.shard_files import Progress
from llama_stack_provider_moe.compute.methods.mixing import domain_rows
from llama_stack_provider_moe.compute.models.upcycle import generator_of, model_folder
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, join
from llama_stack_provider_moe.compute.surgery.calibrate import calibrate, losses_of
from llama_stack_provider_moe.compute.surgery.donor import Donor, as_part, open_donor
from llama_stack_provider_moe.compute.surgery.observe import mean_router_inputs
from llama_stack_provider_moe.compute.surgery.plan import Expert, single
from llama_stack_provider_moe.compute.surgery.prepared import Decision, Prepared, Rows, measured, named
from llama_stack_provider_moe.compute.surgery.report import LayerOfExperts, MeasuredLoss
from llama_stack_provider_moe.compute.surgery.resized import describe, resize
from llama_stack_provider_moe.compute.surgery.slices import Reader
from llama_stack_provider_moe.compute.surgery.twin import twin_of
from llama_stack_provider_moe.errors import InvalidInput, LayoutError
from llama_stack_provider_moe.spec.surgery import AddedExperts, Surgery

# Sigmoid scores are from 0 to 1, so a bias this far below the lowest one is below every other choice.
_BELOW = 1.01
SEED = 42
_NEW = -1  # in the report, the old number of an expert that has none


def prepare(folder: Path, asked: Surgery, field: str) -> Prepared:
    """Check everything that can be known from the configs.

    Args:
        folder: of the model.
        asked: what to add.
        field: what comes before the names of the settings in errors.

    Raises:
        InvalidInput: the experts can't be added to this model.
        ModelError, LayoutError: see `describe`, `resize` and `open_donor`.
    """
    before, added = describe(folder), asked.added
    layout = before.layout
    if layout.groups > 1 and added.count % layout.groups:
        raise InvalidInput(named(field, "add.count"), added.count, f"a multiple of {layout.groups}, as the router has "
                           f"{layout.groups} groups of experts of equal size")  # fmt: skip
    if added.copy_of is not None and added.copy_of + added.count > layout.num_experts:
        raise InvalidInput(
            named(field, "add.copy_of"),
            added.copy_of,
            f"at most {layout.num_experts - added.count}: "
            f"the model has experts 0 to {layout.num_experts - 1}, {added.count} of which are copied",
        )
    if added.copy_of is None and added.mlp_from is None and added.count > layout.num_experts:
        raise InvalidInput(named(field, "add.count"), added.count, f"at most {layout.num_experts}, the number of "
                           "experts to copy")  # fmt: skip
    if added.closed:
        _check_closed(layout, named(field, "add.closed"))
    donor = None
    if added.mlp_from is not None:
        name = named(field, "add.mlp_from")
        donor = model_folder(added.mlp_from, name)
        open_donor(donor, before, added.count, added.mlp_expert, name, added.mlp_from)
    return Prepared(asked, before, resize(before, layout.num_experts + added.count), field, donor)


def choose(prepared: Prepared, rows: Rows | None, progress: Progress) -> Decision:
    """Find whom to copy and the router rows, and measure the model that comes of it.

    Args:
        prepared: what `prepare` found.
        rows: of the domain, and general ones; None: nothing is measured.
        progress: called with the number of passes of rows that are done and their total.

    Raises:
        InvalidInput: the router rows are measured on rows, and there are none, or both sets are the same to a router.
        DataError: the rows have no tokens to measure.
    """
    layout, added = prepared.layout, prepared.asked.added
    if added.router == "domain" and (rows is None or not rows.general):
        raise InvalidInput("data", None, f"rows of the domain and general rows, because {prepared.name('add.router')} "
                           "'domain' is their mean router input")  # fmt: skip
    count = _Passes(progress, rows, 4)
    sources = _sources(prepared, rows, count)
    directions = _directions(prepared, rows, count) if rows is not None and added.router == "domain" else {}
    reader = Reader(prepared.before, prepared.resized.axes)
    donor = None
    if prepared.donor is not None:
        assert added.mlp_from is not None, "a donor has a name"
        donor = open_donor(prepared.donor, prepared.before, added.count, added.mlp_expert,
                           prepared.name("add.mlp_from"), added.mlp_from)  # fmt: skip
    experts: dict[int, list[Expert]] = {}
    for layer in layout.moe_layers:
        new = [
            Added(reader, added, layer, number, sources[layer][number], donor, directions.get(layer))
            for number in range(added.count)
        ]
        experts[layer] = _in_groups(layout, new)
    decision = Decision(experts, [_reported(layer, experts[layer], donor) for layer in layout.moe_layers])
    return decision if rows is None else _measured(prepared, rows, decision, count)


@dataclass
class Added:
    """One new expert of one layer.

    Attributes:
        reader: of the model before.
        asked: the settings.
        layer: its decoder layer.
        number: of the new ones in its layer, from 0 on.
        source: the old expert that it copies.
        donor: whose MLP it is instead.
        direction_H: the direction of its router row, where rows of a domain decide it.
    """

    reader: Reader
    asked: AddedExperts
    layer: int
    number: int
    source: int
    donor: Donor | None
    direction_H: Tensor | None
    _everyone: dict[str, Tensor] = field(default_factory=dict)

    def part(self, parameter: str) -> Tensor:
        """See `plan.NewExpert`."""
        layout = self.reader.layout
        below = parameter.removeprefix(layout.path(self.layer, "") + ".")
        if below == layout.bias_path:
            return self._selection_bias(parameter)
        if below.startswith(layout.experts_path + "."):
            return self._noisy(parameter, below.rpartition(".")[2])
        if below.startswith(f"{layout.router_path}.") or below == layout.router_weight:
            return self._row(parameter, below == join(layout.router_path, layout.router_weight))
        raise LayoutError(f"{layout.model_type}: {parameter} counts the experts, and this version does not know what a "
                          "new one has there")  # fmt: skip

    def _noisy(self, parameter: str, name: str) -> Tensor:
        if self.donor is None:
            made = self.reader.part(parameter, self.source)
        else:
            mlp = self.donor.mlp(self.layer, (self.asked.mlp_expert or 0) + self.number)
            made = as_part(mlp, name, self.reader.layout, self.reader.turns, self.reader.shape(parameter))
        if not self.asked.noise or made.dim() < 2:
            return made
        seed = SEED if self.asked.seed is None else self.asked.seed
        drawn = torch.randn(made.shape, generator=generator_of(seed, f"{parameter}.{self.number}"))
        return made + self.asked.noise * made.std() * drawn

    def _row(self, parameter: str, is_matrix: bool) -> Tensor:
        if self.asked.router == "copy":
            return self.reader.part(parameter, self.source) if self.donor is None else self._all(parameter).mean(dim=0)
        if not is_matrix and not parameter.endswith("bias"):  # such as a scale
            return self._all(parameter).mean(dim=0)
        made = torch.zeros(self.reader.shape(parameter))
        if is_matrix and self.asked.router == "domain":
            assert self.direction_H is not None, "measured on the rows"
            made += self.direction_H * self._all(parameter).norm(dim=1).mean()
        return made

    def _selection_bias(self, parameter: str) -> Tensor:
        biases = self._all(parameter)
        if not self.asked.closed:
            return biases[self.source] if self.donor is None else biases.mean(dim=0)
        return biases.amin(dim=0) - _BELOW

    def _all(self, parameter: str) -> Tensor:
        """The parts of all old experts, (E, ...)."""
        if parameter not in self._everyone:
            count = self.reader.layout.num_experts
            self._everyone[parameter] = torch.stack([self.reader.part(parameter, old) for old in range(count)])
        return self._everyone[parameter]


class _Passes:
    """Progress of several passes through the rows, as one."""

    def __init__(self, progress: Progress, rows: Rows | None, most: int) -> None:
        self._progress = progress
        self._done = 0
        both = 0 if rows is None else len(rows.prompts) + len(rows.general)
        self._total = most * both

    def begin(self, rows: int) -> Progress:
        """Progress of the next pass, of so many rows."""
        before, self._done = self._done, self._done + rows
        return lambda done, _: self._progress(before + done, self._total)


def _check_closed(layout: ExpertLayout, name: str) -> None:
    reason = None
    if layout.bias_path is None:
        reason = f"{layout.family} chooses by logits alone"
    elif layout.scoring == "softmax":
        reason = f"a score in {layout.family} is a share of all experts, which a new one makes smaller"
    elif layout.scoring != "sigmoid":
        reason = f"scores in {layout.family} have no upper limit"
    if reason is not None:
        raise InvalidInput(name, True, f"false, because {reason}; or a family that chooses by sigmoid scores and a "
                           "bias")  # fmt: skip


def _sources(prepared: Prepared, rows: Rows | None, passes: _Passes) -> dict[int, list[int]]:
    """Layer -> the old expert of each new one."""
    layout, added = prepared.layout, prepared.asked.added
    first = added.copy_of or 0
    if added.copy_of is not None or rows is None or added.mlp_from is not None:
        return {layer: list(range(first, first + added.count)) for layer in layout.moe_layers}
    found = calibrate(rows.model, layout, rows.prompts, rows.batch_size, contributions=False,
                      progress=passes.begin(len(rows.prompts)))  # fmt: skip
    ranked = found.count_LE.argsort(dim=1, descending=True, stable=True)[:, : added.count]
    return dict(zip(layout.moe_layers, ranked.tolist(), strict=True))


def _directions(prepared: Prepared, rows: Rows, passes: _Passes) -> dict[int, Tensor]:
    """Layer -> the direction (H,) of a new router row, of length 1."""
    layout = prepared.layout
    means = [
        mean_router_inputs(rows.model, layout, prompts, rows.batch_size, passes.begin(len(prompts)))
        for prompts in (rows.prompts, rows.general)
    ]
    found = {}
    for at, layer in enumerate(layout.moe_layers):
        try:
            found[layer] = domain_rows(torch.stack([each[at] for each in means]), norm=1.0)[0]
        except ValueError:
            raise InvalidInput("data.general_dataset_id" if prepared.field == "surgery." else "--general-rows", None,
                               f"rows that differ from those of the domain: in layer {layer} the router's mean input "
                               "is the same") from None  # fmt: skip
    return found


def _in_groups(layout: ExpertLayout, new: Sequence[Expert]) -> list[Expert]:
    """The old experts and the new ones, the same number in each group of neighbouring experts, behind its old ones."""
    made: list[Expert] = []
    size, each = layout.num_experts // layout.groups, len(new) // layout.groups
    for group in range(layout.groups):
        made += [*single(range(group * size, (group + 1) * size)), *new[group * each : (group + 1) * each]]
    return made


def _reported(layer: int, experts: Sequence[Expert], donor: Donor | None) -> LayerOfExperts:
    kept = [each[0][0] if isinstance(each, tuple) else _NEW for each in experts]
    copies = [each.source for each in experts if isinstance(each, Added)]
    return LayerOfExperts(layer=layer, kept=kept, dropped=[], copies=copies if donor is None else None)


def _measured(prepared: Prepared, rows: Rows, decision: Decision, passes: _Passes) -> Decision:
    """The same decision with what it changes on the rows, and how many tokens choose a new expert."""
    assert isinstance(rows.model, PreTrainedModel), "a model without adapters"
    twin = twin_of(rows.model, prepared.resized, decision.experts)
    layout, layers = prepared.resized.layout, decision.layers
    losses: list[MeasuredLoss | None] = []
    for name, prompts in (("chosen", rows.prompts), ("chosen_general", rows.general)):
        if not prompts:
            losses.append(None)
            continue
        after = losses_of(rows.model, twin, prompts, rows.batch_size, passes.begin(len(prompts)))
        losses.append(measured(after, len(prompts)))
        found = calibrate(twin, layout, prompts, rows.batch_size, contributions=False,
                          progress=passes.begin(len(prompts)))  # fmt: skip
        layers = [
            each.model_copy(update={name: _choices_of_new(each, count_E) / found.tokens})
            for each, count_E in zip(layers, found.count_LE, strict=True)
        ]
    return Decision(decision.experts, layers, losses[0], losses[1])


def _choices_of_new(layer: LayerOfExperts, count_E: Tensor) -> float:
    new = [at for at, old in enumerate(layer.kept) if old == _NEW]
    return float(count_E[torch.tensor(new)].sum())
