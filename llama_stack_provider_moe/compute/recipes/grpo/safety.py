"""A safety reward, for prompts to refuse and prompts to answer, is measured by the job's `eval` block, in one report.

Rewards alone don't show what a model loses: one that refuses everything, or that no longer speaks, may earn as much.
"""

from collections.abc import Callable

from llama_stack_provider_moe.spec import GRPOSpec
from llama_stack_provider_moe.spec.rewards import are_by_class

# What the report has -> the set of the `eval` block that it needs.
MEASURED = {
    "refusal": "refuse_dataset_id",
    "over-refusal": "safe_dataset_id",
    "capability (perplexity)": "retain_dataset_id",
}


def tell_unmeasured(spec: GRPOSpec, warn: Callable[[str], None]) -> None:
    """Warn of a safety reward whose report would lack some of `MEASURED`.

    Args:
        spec: the job.
        warn: called with the warning.
    """
    if not are_by_class(spec.reward):
        return
    lacking = {what: name for what, name in MEASURED.items() if spec.eval is None or getattr(spec.eval, name) is None}
    if lacking:
        fields = ", ".join(f"eval.{name}" for name in lacking.values())
        warn(f"reward: has classes of prompts, and no report will measure {', '.join(lacking)} before and after "
             f"training: the job names no {fields}")  # fmt: skip
