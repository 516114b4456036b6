"""What a scorer answers, and how it fails: the seam between the process that runs probes and whoever asks it."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

from llama_stack_provider_moe.errors import MoeError

FailureReason = Literal["down", "overloaded", "deadline", "refused"]
ScorerStatus = Literal["starting", "ready", "down"]


class Score(NamedTuple):
    """The worst of what was scored of one conversation.

    Attributes:
        probability: of the concept, from 0 to 1, as if it were as common as its absence.
        threshold: of the probe. `is_flagged` compares the two.
        layer: decoder block, counted from 0, whose state scored worst.
    """

    probability: float
    threshold: float
    layer: int

    @property
    def is_flagged(self) -> bool:
        """Whether the score is above the threshold; a score that equals it is not, as when the threshold was set."""
        return self.probability > self.threshold


class ScorerFailed(MoeError):
    """A scorer gave no score; the operator chose beforehand whether that blocks or allows.

    Args:
        reason: down: no scorer process answers; overloaded: its queue is full; deadline: it did not answer in time;
            refused: it can't score this: no such probe, a message without text, more tokens than the probe's limit.
            Only the last depends on what was sent, so a sender can cause it: treat it as a block unless you trust them.
        message: what happened, for a person.
    """

    status: ClassVar[int] = 503

    def __init__(self, reason: FailureReason, message: str) -> None:
        self.reason: FailureReason = reason
        super().__init__(message)


class ScorerHealth(NamedTuple):
    """The state of a scorer.

    Attributes:
        status: starting: its process loads models; ready: it answers; down: there is none now.
        detail: for a person: why it is down, or what it loads.
        probes: names of the probes that it scores with; empty unless ready.
        waiting: conversations that wait for their score or are being scored.
        restarts: how often a process was replaced since this server started.
    """

    status: ScorerStatus
    detail: str
    probes: tuple[str, ...]
    waiting: int
    restarts: int


class Scorer(Protocol):
    """Scores conversations with fitted probes; holds no event loop."""

    async def score(
        self,
        probe: str,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        deadline_s: float,
        owner: str | None = None,
    ) -> list[Score]:
        """Score each conversation, by all the views that the probe's card names, and return the worst of each.

        Args:
            probe: name of the probe, as configured.
            conversations: each a list of messages with `role` and `content`.
            deadline_s: seconds after which the caller no longer waits.
            owner: who asks; None: nobody in particular, whose conversations may fill the whole queue.

        Raises:
            ScorerFailed: there is no score; its `reason` says why.
        """

    async def health(self) -> ScorerHealth:
        """The scorer's state; returns at once, whatever the scorer does."""
