"""The sums of an evaluation of held-out prompts, whose answers are graded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from llama_stack_provider_moe.compute.recipes.on_policy.held_out import HeldOutAnswers
from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.errors import GraderFailed
from llama_stack_provider_moe.graders.panel import Graded
from llama_stack_provider_moe.graders.samples import Sample


@dataclass
class HeldOutRewards(HeldOutAnswers):
    """`loss` is the sum of rewards, negated; `weight` the number of answers that got one.

    Attributes:
        last_failure: the last grader of this process that gave no value, and why.
    """

    last_failure: str | None = field(default=None, init=False)

    def add_answers(self, samples: Sequence[Sample], graded: Sequence[Graded]) -> None:
        """Add answers with their rewards."""
        for sample, each in zip(samples, graded, strict=True):
            self.add_answer(sample.tokens or 0, sample.truncated)
            for name, value in each.values.items():
                if each.total is not None and value is not None:
                    self.add(f"rewards/{name}/mean", value, 1)
            if each.total is not None:
                self.loss -= each.total
                self.weight += 1
            for name, failure in each.failures.items():
                self.last_failure = f"grader {name!r} gave no value: {failure.code}: {failure.message}"

    def over(self, peers: Peers) -> Self:
        """The sums over all processes."""
        found = super().over(peers)
        told = [each for each in peers.gathered(self.last_failure) if each is not None]
        found.last_failure = told[-1] if told else None
        return found

    def figures(self) -> dict[str, float]:
        """`validation_loss` is the mean reward, negated; `perplexity` of the model's own answers, by their entropy.

        Raises:
            GraderFailed: no answer got a reward.
        """
        if not self.weight:
            why = "graders gave no value" if self.last_failure is None else self.last_failure
            raise GraderFailed(f"no answer to a held-out prompt got a reward; the last time: {why}")
        return {**super().figures(), "reward": 0.0 - self.loss / self.weight}  # never -0
