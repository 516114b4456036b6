"""The sums of an evaluation of held-out prompts."""

from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.errors import GraderFailed


class HeldOutRewards(HeldOut):
    """`loss` is the sum of rewards, negated; `weight` the number of answers that got one."""

    def over(self, peers: Peers) -> "HeldOutRewards":
        """The sums over all processes."""
        return HeldOutRewards(*peers.sums([self.loss, self.weight, self.nll, self.tokens]))

    def figures(self) -> dict[str, float]:
        """`validation_loss` is the mean reward, negated; `perplexity` of the model's own answers, by their entropy.

        Raises:
            GraderFailed: no answer got a reward.
        """
        if not self.weight:
            raise GraderFailed("no answer to a held-out prompt got a reward, because graders gave no value")
        return super().figures()
