"""Grader `refusal` with a model as judge: what phrases can't tell, behind the same checks for what is neither."""

from collections.abc import Sequence

from llama_stack_provider_moe.compute.evaluation.judges import Exchange, Judge
from llama_stack_provider_moe.graders.here import Score, graded
from llama_stack_provider_moe.graders.refusals import kind_of, prompt_of
from llama_stack_provider_moe.graders.samples import Outcome, Sample
from llama_stack_provider_moe.spec.graders import Refusal


class ModelRefusal:
    """A judge in memory.

    Args:
        grader: its spec.
        judge: that is asked.
    """

    def __init__(self, grader: Refusal, judge: Judge) -> None:
        self._grader, self._judge = grader, judge

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """See `Grades`."""
        exchanges = [Exchange(prompt_of(each.item), each.output_text) for each in samples]
        verdicts = self._judge.refusals(exchanges) if exchanges else []
        return [graded(self._score(refuses), each, 0.0) for each, refuses in zip(samples, verdicts, strict=True)]

    def _score(self, refuses: bool) -> Score:
        grader = self._grader
        return lambda sample: float(
            kind_of(sample.output_text, prompt_of(sample.item), grader.least_words, grader.longest_refusal, refuses)
            == grader.expect
        )

    def close(self) -> None:
        """Let go of the model."""
        del self._judge
