"""What generates answers in place of the trained model: one interface, whatever the engine.

B prompts have N answers each. An engine gets the policy's weights as a folder (`PolicyFolder`) before it generates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llama_stack_provider_moe.errors import EngineFailed

Routes = NDArray[np.integer]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        answers: N, to each prompt.
        temperature: 0: the likeliest token.
        top_p: nucleus.
        most_tokens: of an answer.
        ends: ids of tokens that end an answer; it keeps them.
        seeds: one for each prompt.
        with_routes: whether the experts of each token are wanted.
    """

    answers: int
    temperature: float
    top_p: float
    most_tokens: int
    ends: Sequence[int]
    seeds: Sequence[int]
    with_routes: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        tokens: its ids, with that which ended it.
        logps: the log-probability of each when it was sampled, after temperature; None where there is none.
        routes: (prompt and answer without the last token, layers, top_k); None: not asked for.
    """

    tokens: list[int]
    logps: list[float | None]
    routes: Routes | None = None


class Engine(Protocol):
    """Generates with the policy's weights."""

    @property
    def told(self) -> str:
        """Which engine, and where, for a person."""

    def take(self, folder: Path) -> None:
        """Read the policy's weights from a folder, and forget what was cached with others.

        Raises:
            EngineFailed: it does not.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, advance: Callable[[], None]
    ) -> list[list[Answer]]:
        """The answers to each prompt.

        Args:
            prompts: their ids.
            sampling: how.
            advance: called when a prompt has its answers.

        Raises:
            EngineFailed: it can't be reached, or its answers are none.
        """


def checked(who: str, answer: Answer, prompt: Sequence[int], sampling: Sampling, vocabulary: int) -> Answer:
    """An answer that is one.

    Args:
        who: the engine, for errors.
        answer: as the engine gave it.
        prompt: that it is to.
        sampling: what was asked for.
        vocabulary: number of the policy's tokens.

    Raises:
        EngineFailed: it is not an answer of this policy.
    """
    count = len(answer.tokens)
    if not 1 <= count <= sampling.most_tokens or len(answer.logps) != count:
        raise EngineFailed(f"{who} gave {count} tokens with {len(answer.logps)} log-probabilities; expected 1 to "
                           f"{sampling.most_tokens} with as many")  # fmt: skip
    if (highest := max(answer.tokens)) >= vocabulary or min(answer.tokens) < 0:
        raise EngineFailed(f"{who} gave token {highest}; expected ids below {vocabulary}, the policy's: it serves "
                           "another vocabulary")  # fmt: skip
    if sampling.with_routes:
        if answer.routes is None:
            raise EngineFailed(
                f"rl.routing_replay: {who} returns no routes; start it with --enable-return-routed-experts, or set "
                "rl.routing_replay 'off' or 'policy'"
            )
        wanted = len(prompt) + count - 1
        if answer.routes.ndim != 3 or len(answer.routes) != wanted:
            raise EngineFailed(f"rl.routing_replay: {who} returned routes of shape {answer.routes.shape}; expected "
                               f"{wanted} tokens, the prompt and the answer without its last one, layers, and experts "
                               "of a token")  # fmt: skip
    return answer
