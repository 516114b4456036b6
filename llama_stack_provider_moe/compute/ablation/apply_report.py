"""What an ablation edited, and what it left: `ablation.json` beside the edited model."""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.compute.ablation.edits import Edits
from llama_stack_provider_moe.compute.ablation.measurements import Provenance
from llama_stack_provider_moe.compute.ablation.writers import Kind
from llama_stack_provider_moe.spec.ablation import AblationPlan
from llama_stack_provider_moe.spec.blocks import Block

APPLIED_FILE = "ablation.json"
# Bytes a second, to estimate a time: SmolLM2-135M in fp32 took this on one core of a busy machine.
BYTES_PER_S = 130e6


class Touched(Block):
    """One edited tensor; figures are null in a dry run."""

    name: str
    parameter: str = Field(description="Name of the parameter in memory that it is, or is a piece of.")
    layer: int
    kind: Kind
    bytes: int
    scale: float = Field(description="Share of the direction that was removed.")
    experts: int | None = Field(description="Number of edited experts in a stack of all; null: not such a stack.")
    norm_before: float | None = None
    norm_after: float | None = None
    along_before: float | None = Field(
        default=None, description="Share of the norm along the direction: |r^T W| / |W|, or |W q| / |W| of a router."
    )
    along_after: float | None = Field(default=None, description="The same afterwards, rounded to the tensor's dtype.")


class AppliedReport(Block):
    """The result of `moe-train ablate apply`."""

    kind: Literal["ablation"] = "ablation"
    version: Literal[1] = 1
    model: str
    folder: str | None = Field(description="The edited model; null: a dry run.")
    plan: AblationPlan
    provenance: Provenance
    touched: list[Touched]
    skipped: dict[str, list[str]] = Field(description="Reason -> names of the tensors that are unchanged.")
    missed: list[str] = Field(description="What the plan names and the model does not have, such as a dense router.")
    bytes: int = Field(description="Size of all tensors.")
    bytes_touched: int
    largest_bytes: int = Field(description="Size in fp32 of the largest matrix that is edited at a time.")
    seconds: float = Field(description="Time for reading, editing and writing; in a dry run an estimate.")


def missed(plan: AblationPlan, edits: Edits) -> list[str]:
    """What the plan asks for in blocks that don't have it."""
    kinds = {layer: set[str]() for layer in plan.edits()}
    for edit in edits.edits.values():
        kinds[edit.writer.layer].add(edit.writer.kind)
    found = []
    for layer, there in kinds.items():
        if plan.gate_scale and "router" not in there:
            found.append(f"block {layer} has no router to edit")
        if plan.ablate_individual_experts and "experts" not in there and plan.experts_of(layer) != frozenset():
            found.append(f"block {layer} has no routed experts to edit")
    for layer in sorted(plan.by_layer().keys() - kinds.keys()):
        found.append(f"the experts that the plan names in block {layer}, because `ablate` does not name the block")
    return found


def text(report: AppliedReport) -> str:
    """The report in words."""
    dry = report.folder is None
    made = report.plan
    by_kind: dict[str, list[Touched]] = {}
    for each in report.touched:
        by_kind.setdefault(each.kind, []).append(each)
    lines = [
        f"{'would edit' if dry else 'edited'} {len(report.touched)} tensors of {report.model}, "
        f"{report.bytes_touched:,} of {report.bytes:,} bytes: direction {made.direction}, norms {made.norm_preserving}",
    ]
    for kind, ones in by_kind.items():
        layers = sorted({one.layer for one in ones})
        figures = "" if dry else (
            f"; along the direction at most {max(one.along_before or 0.0 for one in ones):.2%} before, and "
            f"{max(one.along_after or 0.0 for one in ones):.2%} after"
        )  # fmt: skip
        lines.append(f"  {kind}: {len(ones)} tensors in {len(layers)} blocks ({layers[0]} to {layers[-1]}){figures}")
    lines += [f"  unchanged: {len(names):,} tensors, each {reason}" for reason, names in report.skipped.items()]
    lines += [f"  missing: {each}" for each in report.missed]
    if made.direction == "plain":
        lines.append("warning: a plain direction also removes what both sets share, which harms text of every kind; "
                     "projected does not")  # fmt: skip
    lines.append("compare both models on other text with `moe-train eval --retain`: no figure here shows what was lost")
    if dry:
        lines.append(f"at a time {report.largest_bytes:,} bytes of a matrix in fp32; about {report.seconds:,.0f} s")
    else:
        lines.append(f"{report.bytes / 1e6 / max(report.seconds, 1e-9):,.0f} MB/s; saved to {report.folder}")
    return "\n".join(lines)
