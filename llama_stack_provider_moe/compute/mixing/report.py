"""What a mix made, and what each expert stands for: `mix.json` beside the mixed model."""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.mixing import MIX_FILE, MixMethod, RouterStart

__all__ = ["MIX_FILE", "MixReport", "MixedExpert", "text"]


class MixedExpert(Block):
    """One expert of every layer, and what it stands for."""

    expert: int = Field(description="Its number, the same in every layer.")
    name: str = Field(description="Name of its branch; `anchor`: the base's own expert.")
    model: str = Field(description="The model that it comes from.")
    weight: float = Field(description="Its branch's share of the mean of shared weights; 0 for the anchor.")
    trained_on: str | None = Field(description="What it was trained on: the plan's words, or its job's data set.")
    job: str | None = Field(description="Job of this server that trained it; null: none that is known.")
    base: str | None = Field(description="Model that its job, or the first of a chain of jobs, started from.")
    dataset_sha256: str | None = Field(description="SHA-256 of its job's canonical rows; null: unknown.")
    fingerprint: str = Field(description="Fingerprint of the weights of the model that it comes from.")
    cosine_to_base: float = Field(description="Cosine of that model's matrices and the base's, on a piece of each.")
    moved_shared: float | None = Field(
        default=None, description="Distance of its shared weights from the base's, as a share of their norm."
    )
    moved_experts: float | None = Field(
        default=None, description="Distance of its MLPs from those that it started from, as a share of their norm."
    )


class MixReport(Block):
    """The result of `moe-train mix`; figures that need every weight are null in a dry run."""

    kind: Literal["mix"] = "mix"
    version: Literal[1] = 1
    method: MixMethod
    model: str
    fingerprint: str = Field(description="Fingerprint of the base's weights.")
    folder: str | None = Field(description="The mixed model; null: a dry run.")
    source_type: str
    model_type: str
    layers: int
    top_k: int
    router: RouterStart
    experts: list[MixedExpert]
    left_out: list[str] = Field(description="Branches of the plan that are not in the result.")
    parameters: int = Field(description="Parameters of the result.")
    active: int = Field(description="Those that compute for one token: all but the experts that are not chosen.")
    bytes: int
    seconds: float | None = None
    warnings: list[str] = Field(default=[], description="What to know before training or serving the result.")


def text(report: MixReport) -> str:
    """The report in words."""
    lines = [
        f"{report.method}: {len(report.experts)} experts of {report.source_type} {report.model} -> "
        f"{report.model_type}, {report.layers} layers, top-{report.top_k}, routers begin {report.router}",
        f"parameters: {report.parameters:,} in total, {report.active:,} active per token, {report.bytes:,} bytes",
    ]
    for each in report.experts:
        source = f"trained on {each.trained_on or 'unknown data'}" + (f" by job {each.job}" if each.job else "")
        moved = "" if each.moved_shared is None else (
            f"; moved {each.moved_experts:.2%} in MLPs, {each.moved_shared:.2%} in shared weights"
        )  # fmt: skip
        what = "the base's expert, frozen" if each.job is None and each.name == "anchor" else source
        lines.append(f"  expert {each.expert} {each.name}: {what}; cosine to the base {each.cosine_to_base:.4f}{moved}")
    if report.left_out:
        lines.append(f"  left out: {', '.join(report.left_out)}")
    lines += [f"warning: {each}" for each in report.warnings]
    if report.folder is None:
        lines.append("nothing was written")
    else:
        lines.append(f"saved to {report.folder}; train its routers next: a job of recipe sft with moe.train_router")
    return "\n".join(lines)
