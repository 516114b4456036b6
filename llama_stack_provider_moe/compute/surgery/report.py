"""What a surgery did, or would do: `surgery.json` beside the new model."""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.surgery import Criterion


class LayerOfExperts(Block):
    """One layer with experts."""

    layer: int
    kept: list[int] = Field(description="Old numbers of the experts, in their new order.")
    dropped: list[int]
    scores: list[float] | None = Field(default=None, description="Score of each old expert; null: a list chose.")
    mass: float | None = Field(
        default=None, description="Mean routing probability that the dropped experts had; null: not measured."
    )


class MeasuredLoss(Block):
    """The change on the calibration rows, in nats per token."""

    before: float
    after: float
    kl: float = Field(description="Mean KL divergence from the model before to the model after.")
    tokens: int
    rows: int


class SurgeryReport(Block):
    """The result of `moe-train experts prune` and `split`, and of a job of recipe `surgery`."""

    kind: Literal["surgery"] = "surgery"
    version: Literal[1] = 1
    action: Literal["prune", "split"]
    model: str
    folder: str | None = Field(description="The new model; null: a dry run.")
    family: str
    fingerprint: str | None = Field(description="Of the old model's weights; null: it has none here.")
    by: Criterion | None = Field(description="Score that chose the experts; null: a list did, or all stay.")
    experts_before: int
    experts_after: int
    top_k: int = Field(description="Experts of a token in the new model.")
    keys: dict[str, int] = Field(description="Keys of config.json that changed, and their new values.")
    layers: list[LayerOfExperts]
    loss: MeasuredLoss | None = Field(description="Null: no rows were given.")
    tensors: int = Field(description="Number of new tensors that are cut or renumbered.")
    left_out: list[str] = Field(description="Tensors in the files that the model does not have by its config.")
    parameters_before: int
    parameters_after: int
    bytes: int = Field(description="Size of the new tensors.")
    warnings: list[str]


def text(report: SurgeryReport) -> str:
    """The report in words."""
    dry = report.folder is None
    if report.action == "split":
        done = "would split" if dry else "split"
        how = "into equal ones"
    else:
        done = "would prune" if dry else "pruned"
        how = {"reap": "by router-weighted activation (REAP)", "usage": "by use", None: "by your list"}[report.by]
    share = report.parameters_after / report.parameters_before
    lines = [
        f"{done} {report.model} ({report.family}) {how}: {report.experts_before} -> {report.experts_after} experts in "
        f"each of {len(report.layers)} layers, top-{report.top_k}",
        f"parameters: {report.parameters_before:,} -> {report.parameters_after:,} ({share:.1%})",
    ]
    if report.loss is not None:
        loss = report.loss
        lines.append(f"loss on {loss.rows:,} rows ({loss.tokens:,} tokens), nats a token: {loss.before:.4f} -> "
                     f"{loss.after:.4f}; KL {loss.kl:.4f}")  # fmt: skip
    lines += [f"warning: {each}" for each in report.warnings]
    lines.append("nothing was written" if dry else f"saved to {report.folder}")
    return "\n".join(lines)
