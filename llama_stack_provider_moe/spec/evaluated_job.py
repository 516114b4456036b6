"""The field `eval` of jobs that measure a model before and after they change it."""

from pydantic import Field

from llama_stack_provider_moe.spec.any_job import AnyJob
from llama_stack_provider_moe.spec.evaluation import SafetyEvaluation
from llama_stack_provider_moe.spec.row_sources import RowKind, RowSource


class EvaluatedJob(AnyJob):
    """A job that changes a model, and may measure it before and after."""

    eval: SafetyEvaluation | None = Field(
        default=None,
        description="Measurement of refusals, capability and tool calls before and after the job changes the model; "
        "left out: none.",
    )

    def evaluation_sources(self) -> list[RowSource]:
        """The data sets of `eval`, as parts `eval-<set>`."""
        if self.eval is None:
            return []
        asked, labelled_id = self.eval, self.eval.judge.labelled_dataset_id
        named: list[tuple[str, str | None, RowKind]] = [
            ("refuse", asked.refuse_dataset_id, "conversation"),
            ("safe", asked.safe_dataset_id, "conversation"),
            ("retain", asked.retain_dataset_id, "conversation"),
            ("scenarios", asked.scenarios_dataset_id, "scenario"),
        ]
        sources = [
            RowSource(f"eval.{name}_dataset_id", dataset_id, asked.format, f"eval-{name}",
                      answered=name == "retain", kind=kind)
            for name, dataset_id, kind in named
            if dataset_id is not None
        ]  # fmt: skip
        if labelled_id is not None:
            field = "eval.judge.labelled_dataset_id"
            sources.append(RowSource(field, labelled_id, "auto", "eval-labelled", kind="judged"))
        return sources
