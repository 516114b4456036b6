"""The sums of an evaluation of held-out prompts."""

from dataclasses import dataclass, field

from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.errors import GraderFailed


@dataclass
class HeldOutRewards(HeldOut):
    """`loss` is the sum of rewards, negated; `weight` the number of answers that got one.

    Attributes:
        last_failure: the last grader of this process that gave no value, and why.
    """

    last_failure: str | None = field(default=None, init=False)

    def over(self, peers: Peers) -> "HeldOutRewards":
        """The sums over all processes."""
        found = HeldOutRewards(*peers.sums([self.loss, self.weight, self.nll, self.tokens]))
        found.last_failure = self.last_failure
        return found

    def figures(self) -> dict[str, float]:
        """`validation_loss` is the mean reward, negated; `perplexity` of the model's own answers, by their entropy.

        Raises:
            GraderFailed: no answer got a reward.
        """
        if not self.weight:
            why = "graders gave no value" if self.last_failure is None else self.last_failure
            raise GraderFailed(f"no answer to a held-out prompt got a reward; the last time: {why}")
        return super().figures()
