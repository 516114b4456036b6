"""The sums of an evaluation of held-out prompts, to which the model writes answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.train.held_out import HeldOut


@dataclass
class HeldOutAnswers(HeldOut):
    """A recipe decides what `loss` is a sum of, and `weight` their number.

    Attributes:
        sums: name of a further figure -> its sum, and what it is divided by.
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)

    def add(self, name: str, value: float, weight: float) -> None:
        """Add to the sum of a figure."""
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + value, weights + weight)

    def add_answer(self, tokens: int, truncated: bool) -> None:
        """Add an answer's length in tokens, and whether it reached the largest one."""
        self.add("completions/mean_length", float(tokens), 1)
        self.add("completions/clipped_ratio", float(truncated), 1)

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

    def over(self, peers: Peers) -> Self:
        """The sums over all processes."""
        found = type(self)(*peers.sums([self.loss, self.weight, self.nll, self.tokens]))
        for name in peers.union(self.sums):
            total, weights = peers.sums(self.sums.get(name, (0.0, 0.0)))
            found.sums[name] = (total, weights)
        return found

    def figures(self) -> dict[str, float]:
        """`validation_loss`, and `perplexity` of the model's own answers, by their entropy."""
        means = {name: total / weights for name, (total, weights) in self.sums.items() if weights}
        whole = HeldOut(self.loss, self.weight, self.nll, self.tokens or 1.0)  # the overlong filter may leave none
        return {**whole.figures(), **means}
