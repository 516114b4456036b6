"""What every surgery has in common: a checked plan, rows, what was decided on them, and the folder that comes of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint
from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.export.shard_files import Progress, Say
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.surgery.calibrate import Losses
from llama_stack_provider_moe.compute.surgery.plan import Expert, left_out, plan_tensors
from llama_stack_provider_moe.compute.surgery.report import LayerOfExperts, MeasuredLoss, SurgeryReport
from llama_stack_provider_moe.compute.surgery.resized import Described, Resized
from llama_stack_provider_moe.compute.surgery.write import write_folder
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.surgery import REPORT_FILE, Surgery

OF_COMMAND = "--"  # what comes before a setting's name on the command line


@dataclass(frozen=True)
class Rows:
    """A loaded model, and the rows that it is run on; `general`: those that show what it already does."""

    model: nn.Module
    prompts: Sequence[Prompt]
    batch_size: int
    general: Sequence[Prompt] = ()


@dataclass(frozen=True)
class Prepared:
    """A checked surgery on a folder, of which no tensor was read yet.

    Attributes:
        asked: what to do.
        before: the model.
        resized: what changes in it.
        field: what comes before the names of the settings in errors.
        donor: the model whose MLPs become experts.
    """

    asked: Surgery
    before: Described
    resized: Resized
    field: str
    donor: Path | None = None

    @property
    def layout(self) -> ExpertLayout:
        """Of the model before."""
        return self.before.layout

    def name(self, setting: str) -> str:
        """A setting's name in errors."""
        return named(self.field, setting)


@dataclass(frozen=True)
class Decision:
    """What the new model is made of, and what was measured.

    Attributes:
        experts: layer with experts -> its new experts, in their new order.
        layers: the same for the report.
        loss: on the rows; None where none were given.
        general_loss: on the general rows.
        warnings: for the report.
    """

    experts: Mapping[int, Sequence[Expert]]
    layers: list[LayerOfExperts]
    loss: MeasuredLoss | None = None
    general_loss: MeasuredLoss | None = None
    warnings: list[str] = field(default_factory=list)


def named(field: str, setting: str) -> str:
    """The name of a setting such as `keep` or `add.noise`, in a job or on the command line.

    >>> named("surgery.", "add.copy_of"), named("--", "add.copy_of")
    ('surgery.add.copy_of', '--copy-of')
    """
    return field + setting.rpartition(".")[2].replace("_", "-") if field == OF_COMMAND else field + setting


def measured(found: Losses, rows: int) -> MeasuredLoss:
    """The figures for a report."""
    return MeasuredLoss(
        before=found.before, after=found.after, kl=max(0.0, found.kl), logit_change=found.moved, tokens=found.tokens,
        rows=rows,
    )  # fmt: skip


def make(
    prepared: Prepared,
    decision: Decision,
    model: str,
    out: Path | None,
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
    named: Path | None = None,
) -> SurgeryReport:
    """Write the new model, with its report beside it, and return the report.

    Args:
        prepared: the checked surgery.
        decision: what the new model is made of.
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
    asked, before, resized = prepared.asked, prepared.before, prepared.resized
    plan = plan_tensors(resized, decision.experts)
    report = SurgeryReport(
        action=asked.action, model=model, folder=None if out is None else str(named or out),
        family=before.layout.family, fingerprint=fingerprint(before.folder),
        by=asked.likeness if asked.action == "merge" else asked.criterion,
        experts_before=before.layout.num_experts, experts_after=resized.layout.num_experts,
        top_k=resized.layout.top_k, keys=dict(resized.keys), layers=decision.layers, loss=decision.loss,
        general_loss=decision.general_loss, tensors=sum(each.changed for each in plan.tensors),
        left_out=plan.left_out, parameters_before=plan.parameters_before(resized), parameters_after=plan.parameters,
        bytes=plan.nbytes, warnings=[*decision.warnings, *left_out(plan)],
    )  # fmt: skip
    if out is not None:
        write_folder(resized, plan, out, {REPORT_FILE: report.model_dump_json(indent=2) + "\n"}, say, progress)
    return report
