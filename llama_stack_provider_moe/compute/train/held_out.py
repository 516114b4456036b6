"""Sums over one evaluation, for its loss and perplexity."""

import math
from dataclasses import dataclass

from llama_stack_provider_moe.compute.runtime.peers import Peers

LARGEST_EXPONENT = 700.0  # exp(710) overflows a double; a perplexity of 1e304 is high enough


@dataclass
class HeldOut:
    """Sums over one evaluation.

    Attributes:
        loss: weighted sum of losses.
        weight: sum of their weights: tokens (SFT) or pairs (DPO).
        nll: negative log-likelihood of the right answers.
        tokens: number of tokens in them.
    """

    loss: float = 0.0
    weight: float = 0.0
    nll: float = 0.0
    tokens: float = 0.0

    def over(self, peers: Peers) -> "HeldOut":
        """The sums over all processes; each evaluated its share of the rows."""
        return HeldOut(*peers.sums([self.loss, self.weight, self.nll, self.tokens]))

    def figures(self) -> dict[str, float]:
        """`validation_loss` is the mean per token (SFT) or pair (DPO); `perplexity` is of the right answers."""
        return {
            "validation_loss": self.loss / self.weight,
            "perplexity": math.exp(min(self.nll / self.tokens, LARGEST_EXPONENT)),
        }
