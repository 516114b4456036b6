"""Split experts: each becomes several equal ones, and a token uses as many times more, so the output stays the same.

With f twins of each expert and f * K choices, a token chooses the twins of the K experts that it chose before. Their
weights are 1/f of the old ones, whether they are renormalised over the chosen (e^a / (f * sum e^b)) or a softmax over
all f * E, so sum over twins of w/f * f_j(x) = w * f_j(x). That is not so where a weight depends on its logit alone.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint
from llama_stack_provider_moe.compute.export.shard_files import Progress, Say
from llama_stack_provider_moe.compute.surgery.plan import left_out, plan_tensors, single
from llama_stack_provider_moe.compute.surgery.report import LayerOfExperts, SurgeryReport
from llama_stack_provider_moe.compute.surgery.resized import Described, Resized, describe, resize
from llama_stack_provider_moe.compute.surgery.write import write_folder
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.surgery import REPORT_FILE, Surgery

FACTOR = 2


@dataclass(frozen=True)
class Splitting:
    """A checked split of a folder, of which no tensor was read yet."""

    before: Described
    resized: Resized
    experts: tuple[int, ...]


def prepare_split(folder: Path, asked: Surgery, field: str = "surgery.") -> Splitting:
    """Check everything that can be known from the config.

    Args:
        folder: of the model.
        asked: what to split.
        field: what comes before the names of the fields in errors.

    Raises:
        InvalidInput: the model would compute something else.
        ModelError, LayoutError: see `describe` and `resize`.
    """
    before = describe(folder)
    layout, factor = before.layout, asked.factor or FACTOR
    reason = None
    if layout.weighing == "own":
        reason = "a weight depends on the expert's own score alone, so the twins' weights would add up to too much"
    elif layout.groups_chosen < layout.groups:
        reason = "a group is scored by its two best experts, which twins change"
    elif layout.idle_choices:
        reason = "its router also chooses among choices that compute nothing"
    if reason is not None:
        expected = f"a model whose experts can be split; in {layout.family} {reason}"
        raise InvalidInput(f"{field}factor", factor, expected)
    # Twins are neighbours, so that every group of experts keeps its own.
    experts = tuple(old for old in range(layout.num_experts) for _ in range(factor))
    return Splitting(before, resize(before, len(experts), layout.top_k * factor), experts)


def split(
    splitting: Splitting,
    model: str,
    out: Path | None,
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
    named: Path | None = None,
) -> SurgeryReport:
    """Write the model with more experts, with its report beside it; see `prune.prune` for arguments and errors."""
    if out is not None and os.path.lexists(out):
        raise InvalidInput("out", str(out), "a folder that does not exist yet")
    layout, resized = splitting.before.layout, splitting.resized
    plan = plan_tensors(resized, dict.fromkeys(layout.moe_layers, single(splitting.experts)))
    layers = [LayerOfExperts(layer=layer, kept=list(splitting.experts), dropped=[]) for layer in layout.moe_layers]
    report = SurgeryReport(
        action="split", model=model, folder=None if out is None else str(named or out), family=layout.family,
        fingerprint=fingerprint(splitting.before.folder), by=None, experts_before=layout.num_experts,
        experts_after=len(splitting.experts), top_k=resized.layout.top_k, keys=dict(resized.keys), layers=layers,
        loss=None, tensors=sum(each.changed for each in plan.tensors), left_out=plan.left_out,
        parameters_before=plan.parameters_before(resized), parameters_after=plan.parameters, bytes=plan.nbytes,
        warnings=left_out(plan),
    )  # fmt: skip
    if out is not None:
        write_folder(resized, plan, out, {REPORT_FILE: report.model_dump_json(indent=2) + "\n"}, say, progress)
    return report
