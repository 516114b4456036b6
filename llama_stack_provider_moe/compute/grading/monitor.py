"""Grader `monitor`: the probability that a probe gives a conversation, as the shield's monitor does at run time."""

from collections.abc import Sequence
from pathlib import Path

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.grading.conversations import messages_with_answer
from llama_stack_provider_moe.compute.probing.scoring import LoadedProbe, ReadProbe, load_probes
from llama_stack_provider_moe.compute.probing.texts import Unscorable, messages_of
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.graders.here import graded
from llama_stack_provider_moe.graders.samples import GradeFailed, Outcome, Sample
from llama_stack_provider_moe.spec.graders import Monitor


class MonitorGrader:
    """A probe on its model, in memory.

    Args:
        grader: its spec.
        probe: loaded.
    """

    def __init__(self, grader: Monitor, probe: LoadedProbe) -> None:
        self._grader, self._probe = grader, probe

    @staticmethod
    def of(grader: Monitor) -> "MonitorGrader":
        """Load a probe and its model.

        Raises:
            InvalidInput: see `read_probe`.
            ModelError: the probe does not fit its model.
        """
        loaded, refused = load_probes([ReadProbe.at(grader.name, Path(grader.probe))])
        if refused:
            raise ModelError(f"grader {grader.name!r}: {refused[grader.name]}")
        return MonitorGrader(grader, loaded[grader.name])

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """See `Grades`."""
        views: list[list[Prompt]] = []

        def noted(sample: Sample) -> float:
            try:
                views.append(self._probe.reader.prompts(messages_of(messages_with_answer(sample))))
            except Unscorable as problem:
                raise GradeFailed("bad_reference", f"the conversation can't be scored: {problem}") from None
            return 0.0

        made = [graded(noted, sample, 0.0) for sample in samples]
        scores = iter(self._probe.score(views, self._grader.batch_size) if views else [])
        found = []
        for outcome in made:
            if outcome.failure is None:
                probability = next(scores).probability
                outcome = Outcome(probability if self._grader.expect == "present" else 1 - probability)
            found.append(outcome)
        return found

    def close(self) -> None:
        """Let go of the model."""
        del self._probe
