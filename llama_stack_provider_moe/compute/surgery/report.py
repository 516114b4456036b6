"""What a surgery did, or would do: `surgery.json` beside the new model."""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.surgery import Action, Criterion, Likeness


class LayerOfExperts(Block):
    """One layer with experts."""

    layer: int
    kept: list[int] = Field(
        description="Old numbers of the experts, in their new order; of merged ones, the most used; -1: a new expert."
    )
    dropped: list[int]
    scores: list[float] | None = Field(default=None, description="Score of each old expert; null: a list chose.")
    mass: float | None = Field(
        default=None, description="Mean routing probability that the dropped experts had; null: not measured."
    )
    clusters: list[list[int]] | None = Field(
        default=None, description="Old numbers of the experts that each new one is the average of; null: not merged."
    )
    shares: list[list[float]] | None = Field(default=None, description="Their shares in it.")
    copies: list[int] | None = Field(
        default=None, description="Old numbers of the experts that the new ones are copies of; null: none are."
    )
    chosen: float | None = Field(
        default=None, description="New experts that a token of the rows chooses, on average; null: not measured."
    )
    chosen_general: float | None = Field(default=None, description="The same of the general rows.")


class MeasuredLoss(Block):
    """The change on some rows, in nats per token."""

    before: float
    after: float
    kl: float = Field(description="Mean KL divergence from the model before to the model after.")
    logit_change: float = Field(description="Greatest change of a logit.")
    tokens: int
    rows: int


class SurgeryReport(Block):
    """The result of `moe-train experts prune`, `merge`, `add` and `split`, and of a job of recipe `surgery`."""

    kind: Literal["surgery"] = "surgery"
    version: Literal[1] = 1
    action: Action
    model: str
    folder: str | None = Field(description="The new model; null: a dry run.")
    family: str
    fingerprint: str | None = Field(description="Of the old model's weights; null: it has none here.")
    by: Criterion | Likeness | None = Field(
        description="Score that chose the experts, or likeness of those that merged; null: a list chose, or all stay."
    )
    experts_before: int
    experts_after: int
    top_k: int = Field(description="Experts of a token in the new model.")
    keys: dict[str, int] = Field(description="Keys of config.json that changed, and their new values.")
    layers: list[LayerOfExperts]
    loss: MeasuredLoss | None = Field(description="Null: no rows were given.")
    general_loss: MeasuredLoss | None = Field(default=None, description="On the general rows; null: none were given.")
    tensors: int = Field(description="Number of new tensors that are cut or renumbered.")
    left_out: list[str] = Field(description="Tensors in the files that the model does not have by its config.")
    parameters_before: int
    parameters_after: int
    bytes: int = Field(description="Size of the new tensors.")
    warnings: list[str]


def text(report: SurgeryReport) -> str:
    """The report in words."""
    dry = report.folder is None
    plain, past = _DONE[report.action]
    done = f"would {plain}" if dry else past
    share = report.parameters_after / report.parameters_before
    lines = [
        f"{done} {report.model} ({report.family}) {_HOW[report.action, report.by]}: {report.experts_before} -> "
        f"{report.experts_after} experts in each of {len(report.layers)} layers, top-{report.top_k}",
        f"parameters: {report.parameters_before:,} -> {report.parameters_after:,} ({share:.1%})",
    ]
    for loss, of in ((report.loss, "rows"), (report.general_loss, "general rows")):
        if loss is not None:
            lines.append(f"loss on {loss.rows:,} {of} ({loss.tokens:,} tokens), nats a token: {loss.before:.4f} -> "
                         f"{loss.after:.4f}; KL {loss.kl:.4f}")  # fmt: skip
            lines.append(f"greatest change of a logit on them: {loss.logit_change:.3g}")
    for name, shares in (
        ("rows", [each.chosen for each in report.layers]),
        ("general rows", [each.chosen_general for each in report.layers]),
    ):
        known = [each for each in shares if each is not None]
        if known:
            lines.append(f"new experts that a token of the {name} chooses: {sum(known) / len(known):.3f} on average, "
                         f"{min(known):.3f} to {max(known):.3f} by layer")  # fmt: skip
    lines += [f"warning: {each}" for each in report.warnings]
    lines.append("nothing was written" if dry else f"saved to {report.folder}")
    return "\n".join(lines)


_DONE: dict[Action, tuple[str, str]] = {
    "prune": ("prune", "pruned"), "merge": ("merge", "merged"), "add": ("extend", "extended"),
    "split": ("split", "split"),
}  # fmt: skip
_HOW: dict[tuple[Action, Criterion | Likeness | None], str] = {
    ("prune", "reap"): "by router-weighted activation (REAP)", ("prune", "usage"): "by use",
    ("prune", None): "by your list", ("merge", "outputs"): "by mean outputs (HC-SMoE)",
    ("merge", "weights"): "by weights", ("merge", "router_logits"): "by router logits (M-SMoE)",
    ("add", None): "with new experts", ("split", None): "into equal ones",
}  # fmt: skip
