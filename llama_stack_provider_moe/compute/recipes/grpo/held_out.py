"""The sums of an evaluation of held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.errors import GraderFailed
from llama_stack_provider_moe.graders.panel import Graded
from llama_stack_provider_moe.graders.samples import Sample


@dataclass
class HeldOutRewards(HeldOut):
    """`loss` is the sum of rewards, negated; `weight` the number of answers that got one.

    Attributes:
        sums: name of a further figure -> its sum, and what it is divided by.
        last_failure: the last grader of this process that gave no value, and why.
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)
    last_failure: str | None = field(default=None, init=False)

    def add(self, name: str, value: float, weight: float) -> None:
        """Add to the sum of a figure."""
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + value, weights + weight)

    def add_answers(self, samples: Sequence[Sample], graded: Sequence[Graded]) -> None:
        """Add answers with their rewards."""
        for sample, each in zip(samples, graded, strict=True):
            self.add("completions/mean_length", float(sample.tokens or 0), 1)
            self.add("completions/clipped_ratio", float(sample.truncated), 1)
            for name, value in each.values.items():
                if each.total is not None and value is not None:
                    self.add(f"rewards/{name}/mean", value, 1)
            if each.total is not None:
                self.loss -= each.total
                self.weight += 1
            for name, failure in each.failures.items():
                self.last_failure = f"grader {name!r} gave no value: {failure.code}: {failure.message}"

    def add_tokens(self, tokens: int, means: Mapping[str, float]) -> None:
        """Add the answers' tokens that count.

        Args:
            tokens: their number.
            means: of `entropy`, and of `kl` with a reference.
        """
        self.nll += means["entropy"] * tokens
        self.tokens += tokens
        for name, mean in means.items():
            self.add(name, mean * tokens, tokens)

    def over(self, peers: Peers) -> "HeldOutRewards":
        """The sums over all processes."""
        found = HeldOutRewards(*peers.sums([self.loss, self.weight, self.nll, self.tokens]))
        for name in peers.union(self.sums):
            total, weights = peers.sums(self.sums.get(name, (0.0, 0.0)))
            found.sums[name] = (total, weights)
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
        means = {name: total / weights for name, (total, weights) in self.sums.items() if weights}
        whole = HeldOut(self.loss, self.weight, self.nll, self.tokens or 1.0)  # the overlong filter may leave none
        return {**whole.figures(), "reward": -self.loss / self.weight, **means}
