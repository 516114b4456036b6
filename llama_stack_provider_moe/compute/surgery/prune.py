"""Prune experts: choose those that go, measure what that costs, and write the smaller model.

A pruned model computes what the model before computes with those experts masked. So the loss is measured by masking,
before anything is written.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint
from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.export.shard_files import Say
from llama_stack_provider_moe.compute.methods.surgery import highest, mass_of
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, layer_ranges
from llama_stack_provider_moe.compute.surgery.calibrate import Calibration, Losses, Progress, calibrate, losses
from llama_stack_provider_moe.compute.surgery.plan import SurgeryPlan, left_out, plan_tensors, single
from llama_stack_provider_moe.compute.surgery.report import LayerOfExperts, MeasuredLoss, SurgeryReport
from llama_stack_provider_moe.compute.surgery.resized import Described, Resized, describe, resize
from llama_stack_provider_moe.compute.surgery.write import write_folder
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.surgery import ALL_LAYERS, REPORT_FILE, Surgery


@dataclass(frozen=True)
class Rows:
    """A loaded model, and the rows that it is run on."""

    model: nn.Module
    prompts: Sequence[Prompt]
    batch_size: int


@dataclass(frozen=True)
class Choice:
    """The experts that stay in each layer with experts, and what was measured; None where no rows were given."""

    kept: dict[int, tuple[int, ...]]
    calibration: Calibration | None = None
    loss: MeasuredLoss | None = None


@dataclass(frozen=True)
class Pruning:
    """A checked surgery on a folder, of which no tensor was read yet."""

    asked: Surgery
    before: Described
    resized: Resized
    experts: int
    field: str

    @property
    def layout(self) -> ExpertLayout:
        """Of the model before."""
        return self.before.layout


def prepare(folder: Path, asked: Surgery, field: str = "surgery.") -> Pruning:
    """Check everything that can be known from the config.

    Args:
        folder: of the model.
        asked: what to prune.
        field: what comes before the names of the fields in errors.

    Raises:
        InvalidInput: the experts to drop or keep are not valid for this model.
        ModelError, LayoutError: see `describe` and `resize`.
    """
    before = describe(folder)
    layout = before.layout
    dropped = _dropped(asked, layout, field)
    experts = asked.keep if asked.keep is not None else layout.num_experts - len(next(iter(dropped.values())))
    _check_number(experts, asked, layout, field)
    if dropped and 1 <= layout.groups_chosen < layout.groups:
        _check_groups(dropped, layout, field)
    return Pruning(asked, before, resize(before, experts), experts, field)


def choose(pruning: Pruning, rows: Rows | None, progress: Progress = lambda done, total: None) -> Choice:
    """Choose the experts that stay, and measure the loss with and without the others.

    Args:
        pruning: what `prepare` found.
        rows: None: the list of experts is enough, and nothing is measured.
        progress: called with the number of passes of rows that are done and their total.

    Raises:
        InvalidInput: the experts are to be chosen by a score, and there are no rows.
        DataError: the rows have no tokens to measure.
    """
    layout, asked = pruning.layout, pruning.asked
    everyone = range(layout.num_experts)
    if rows is None:
        if asked.keep is not None:
            raise InvalidInput("data", None, f"rows, because {pruning.field}keep chooses by a score; or "
                               f"{pruning.field}drop")  # fmt: skip
        dropped = _dropped(asked, layout, pruning.field)
        return Choice({layer: tuple(sorted(set(everyone) - set(dropped[layer]))) for layer in layout.moe_layers})
    total = 2 * len(rows.prompts)
    found = calibrate(
        rows.model, layout, rows.prompts, rows.batch_size, contributions=asked.criterion == "reap",
        progress=lambda done, _: progress(done, total),
    )  # fmt: skip
    if asked.criterion is not None:
        groups = layout.groups if layout.groups_chosen < layout.groups else 1
        chosen = highest(found.scores(asked.criterion), pruning.experts, groups)
        kept = dict(zip(layout.moe_layers, chosen, strict=True))
    else:
        dropped = _dropped(asked, layout, pruning.field)
        kept = {layer: tuple(sorted(set(everyone) - set(dropped[layer]))) for layer in layout.moe_layers}
    masked = {layer: sorted(set(everyone) - set(kept[layer])) for layer in layout.moe_layers}
    measured = losses(rows.model, layout, rows.prompts, masked, rows.batch_size,
                      lambda done, _: progress(len(rows.prompts) + done, total))  # fmt: skip
    return Choice(kept, found, _loss(measured, len(rows.prompts)))


def prune(
    pruning: Pruning,
    choice: Choice,
    model: str,
    out: Path | None,
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
    named: Path | None = None,
) -> SurgeryReport:
    """Write the pruned model, with its report beside it, and return the report.

    Args:
        pruning: what `prepare` found.
        choice: what `choose` chose.
        model: name of the model before, for the report.
        out: the new folder; None: only report what would be written.
        say: gets a line for each file.
        progress: called with the number of tensors that are written and their total.
        named: the folder that the report names, where the caller will rename `out`.

    Raises:
        InvalidInput: `out` exists.
        ModelError: the weights can't be read, are quantised, lack a tensor, or are stored in an unknown form.
        NoRoom: the disk has too few free bytes.
    """
    if out is not None and os.path.lexists(out):
        raise InvalidInput("out", str(out), "a folder that does not exist yet")
    plan = plan_tensors(pruning.resized, {layer: single(kept) for layer, kept in choice.kept.items()})
    report = _report(pruning, choice, plan, model, None if out is None else str(named or out))
    if out is not None:
        texts = {REPORT_FILE: report.model_dump_json(indent=2) + "\n"}
        write_folder(pruning.resized, plan, out, texts, say, progress)
    return report


def _dropped(asked: Surgery, layout: ExpertLayout, field: str) -> dict[int, list[int]]:
    """Layer -> the experts of the list; empty if a score chooses."""
    if asked.keep is not None:
        return {}
    named = asked.dropped()
    if ALL_LAYERS in named:
        named = dict.fromkeys(map(str, layout.moe_layers), named[ALL_LAYERS])
    by_layer = {int(layer): experts for layer, experts in named.items()}
    layers = layer_ranges(layout.moe_layers)
    for layer, experts in by_layer.items():
        if layer not in layout.moe_layers:
            raise InvalidInput(f"{field}drop", layer, f"layers with experts: {layers}")
        if strange := [expert for expert in experts if expert >= layout.num_experts]:
            raise InvalidInput(f"{field}drop.{layer}", strange[0], f"experts 0 to {layout.num_experts - 1}")
    if missing := sorted(set(layout.moe_layers) - set(by_layer)):
        raise InvalidInput(f"{field}drop", ", ".join(map(str, by_layer)), f"every layer with experts ({layers}), as a "
                           f"config has one number of experts for all; layer {missing[0]} is missing")  # fmt: skip
    counts = {layer: len(experts) for layer, experts in by_layer.items()}
    if len(set(counts.values())) > 1:
        raise InvalidInput(f"{field}drop", counts, "the same number of experts in every layer, as a config has one "
                           "number for all")  # fmt: skip
    return by_layer


def _check_number(experts: int, asked: Surgery, layout: ExpertLayout, field: str) -> None:
    """Check that a router can still choose: enough experts for a token, in groups of equal size."""
    name = f"{field}{'keep' if asked.keep is not None else 'drop'}"
    given = asked.keep if asked.keep is not None else layout.num_experts - experts
    least = max(2, layout.top_k)
    if not least <= experts < layout.num_experts:
        most = layout.num_experts - 1
        expected = f"{least} to {most} experts to keep" if asked.keep is not None else (
            f"1 to {layout.num_experts - least} experts to remove from each layer")  # fmt: skip
        raise InvalidInput(name, given, f"{expected}: the model has {layout.num_experts}, and a token is sent to "
                           f"{layout.top_k} of them")  # fmt: skip
    if layout.groups > 1:
        size = experts // layout.groups
        # A group is scored by its two best experts, also where a token may use all groups.
        if experts % layout.groups or size < 2 or size * layout.groups_chosen < layout.top_k:
            raise InvalidInput(name, given, f"{layout.groups} groups of equal size to stay, of which a token uses "
                               f"{layout.groups_chosen}: at least 2 experts in each, and {layout.top_k} in those "
                               "together")  # fmt: skip


def _check_groups(dropped: dict[int, list[int]], layout: ExpertLayout, field: str) -> None:
    size = layout.num_experts // layout.groups
    for layer, experts in dropped.items():
        counts = [sum(expert // size == group for expert in experts) for group in range(layout.groups)]
        if len(set(counts)) > 1:
            raise InvalidInput(f"{field}drop.{layer}", experts, f"the same number of each of {layout.groups} groups of "
                               f"{size} neighbouring experts, because the router chooses groups first; these are "
                               f"{', '.join(map(str, counts))}")  # fmt: skip


def _loss(measured: Losses, rows: int) -> MeasuredLoss:
    return MeasuredLoss(
        before=measured.before, after=measured.after, kl=max(0.0, measured.kl), tokens=measured.tokens, rows=rows
    )


def _report(
    pruning: Pruning, choice: Choice, plan: SurgeryPlan, model: str, folder: str | None
) -> SurgeryReport:  # fmt: skip
    layout, found, by = pruning.layout, choice.calibration, pruning.asked.criterion
    dropped = {
        layer: [expert for expert in range(layout.num_experts) if expert not in kept]
        for layer, kept in choice.kept.items()
    }
    scores = None if found is None or by is None else found.scores(by)
    mass = None if found is None else mass_of(found.probability_LE, [dropped[layer] for layer in layout.moe_layers])
    layers = [
        LayerOfExperts(
            layer=layer,
            kept=list(choice.kept[layer]),
            dropped=dropped[layer],
            scores=None if scores is None else scores[at].tolist(),
            mass=None if mass is None else mass[at],
        )
        for at, layer in enumerate(layout.moe_layers)
    ]
    return SurgeryReport(
        action="prune", model=model, folder=folder, family=layout.family,
        fingerprint=fingerprint(pruning.before.folder), by=by,
        experts_before=layout.num_experts, experts_after=pruning.experts, top_k=layout.top_k,
        keys=dict(pruning.resized.keys), layers=layers, loss=choice.loss,
        tensors=sum(each.changed for each in plan.tensors), left_out=plan.left_out,
        parameters_before=plan.parameters_before(pruning.resized), parameters_after=plan.parameters,
        bytes=plan.nbytes, warnings=_warnings(layout, mass, plan),
    )  # fmt: skip


def _warnings(layout: ExpertLayout, mass: list[float] | None, plan: SurgeryPlan) -> list[str]:
    found = []
    if layout.weighing == "all":
        lost = "how much is measured on rows; give some" if mass is None else (
            f"on average {sum(mass) / len(mass):.4f}, and {max(mass):.4f} in the worst layer")  # fmt: skip
        found.append("this model's router weights are a softmax over all experts, not renormalised over the chosen "
                     f"ones: what the dropped experts had of it goes to the others, {lost}. So even experts that no "
                     "token chose change the model when they go")  # fmt: skip
    return [*found, *left_out(plan)]
