"""TrajectoryAnalyzer: what the scores of a session add up to, turn after turn.

A conversation may come to its goal in steps none of which is conspicuous. For each session there is the maximum of the
scores so far, and a sum that decays by half in each half-life: s <- s * 2 ** (-dt / h) + score.

Sessions are kept in memory, by (owner, session), at most so many, the least recently used ones go first; each ends
after a time without a turn. A server process has its own, so a server with several workers needs sticky sessions.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

MAX_SESSION = 256  # characters of a session's name


class Key(NamedTuple):
    """Whose session: two owners who choose the same name have two sessions."""

    owner: str
    shield: str
    session: str


class Turn(NamedTuple):
    """The score that pushed a session over its limit, or the largest so far.

    Attributes:
        shield: which shield gave it.
        score: from 0 to 1.
        number: number of the turn in its session, from 1.
    """

    shield: str
    score: float
    number: int


class State(NamedTuple):
    """A session after a turn.

    Attributes:
        turns: number of turns so far.
        maximum: the largest score so far.
        of: the turn of the maximum.
        decayed_sum: the decayed sum, with this turn's score.
        latest: this turn's score: the largest of the shields'.
    """

    turns: int
    maximum: float
    of: Turn
    decayed_sum: float
    latest: Turn


class _Session(NamedTuple):
    turns: int
    of: Turn
    decayed_sum: float
    at_s: float


class Sessions:
    """The sessions of one server process.

    Args:
        most: the number of sessions that are kept.
        ttl_s: seconds without a turn after which a session ends.
        clock: seconds that never go back.
    """

    def __init__(self, most: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._ttl_s = ttl_s
        self._clock = clock
        self._kept: OrderedDict[Key, _Session] = OrderedDict()  # the least recently used first
        self.dropped = 0  # sessions that ended early, for want of room

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, key: Key, scores: Mapping[str, float], half_life_s: float) -> State:
        """Add a turn and return the session with it.

        Args:
            key: whose session.
            scores: of this turn, by shield; at least one.
            half_life_s: seconds in which the sum decays by half.
        """
        now = self._clock()
        self._expire(now)
        before = self._kept.pop(key, None)
        turns = 1 if before is None else before.turns + 1
        shield = max(scores, key=scores.__getitem__)
        latest = Turn(shield, scores[shield], turns)
        top = latest if before is None or latest.score > before.of.score else before.of
        decayed = 0.0 if before is None else before.decayed_sum * 2.0 ** (-(now - before.at_s) / half_life_s)
        total = decayed + latest.score
        self._kept[key] = _Session(turns, top, total, now)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
            self.dropped += 1
        return State(turns, top.score, top, total, latest)

    def _expire(self, now: float) -> None:
        while self._kept and now - next(iter(self._kept.values())).at_s > self._ttl_s:
            self._kept.popitem(last=False)
