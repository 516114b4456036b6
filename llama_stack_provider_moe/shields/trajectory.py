"""TrajectoryAnalyzer: what the scores of a session add up to, turn after turn.

A conversation may come to its goal in steps none of which is conspicuous. For each session there is the maximum of the
scores so far, and a sum that decays by half in each half-life: s <- s * 2 ** (-dt / h) + score.

Sessions are kept in memory, by (owner, session); each ends after a time without a turn. When as many are kept
as may be, a new one replaces the least recently used session of the owner who has the most: nobody can push out the
sessions of an owner who has fewer. A server process has its own, so a server with several workers needs sticky
sessions.
"""

from collections import OrderedDict, defaultdict
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
        most_of_owner: the number of sessions that are kept of one owner; None: `most`.
    """

    def __init__(self, most: int, ttl_s: float, clock: Callable[[], float], most_of_owner: int | None = None) -> None:
        self._most = most
        self._most_of_owner = most if most_of_owner is None else most_of_owner
        self._ttl_s = ttl_s
        self._clock = clock
        self._kept: OrderedDict[Key, _Session] = OrderedDict()  # the least recently used first, as below
        self._of_owner: dict[str, OrderedDict[Key, None]] = {}
        # Owners by their number of sessions, so that the largest is found without a look at all of them.
        self._owners: defaultdict[int, OrderedDict[str, None]] = defaultdict(OrderedDict)
        self._largest = 0
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
        before = self._kept.get(key)
        turns = 1 if before is None else before.turns + 1
        shield = max(scores, key=scores.__getitem__)
        latest = Turn(shield, scores[shield], turns)
        top = latest if before is None or latest.score > before.of.score else before.of
        decayed = 0.0 if before is None else before.decayed_sum * 2.0 ** (-(now - before.at_s) / half_life_s)
        total = decayed + latest.score
        self._keep(key, _Session(turns, top, total, now))
        if len(self._of_owner[key.owner]) > self._most_of_owner:
            self._drop(key.owner)
        if len(self._kept) > self._most:
            self._drop(next(iter(self._owners[self._largest])))
        return State(turns, top.score, top, total, latest)

    def _keep(self, key: Key, session: _Session) -> None:
        mine = self._of_owner.setdefault(key.owner, OrderedDict())
        count = len(mine)
        self._kept[key], mine[key] = session, None
        self._kept.move_to_end(key)
        mine.move_to_end(key)
        self._counts(key.owner, count, len(mine))

    def _drop(self, owner: str) -> None:
        """End the least recently used session of an owner."""
        self._forget(next(iter(self._of_owner[owner])))
        self.dropped += 1

    def _forget(self, key: Key) -> None:
        mine = self._of_owner[key.owner]
        del self._kept[key], mine[key]
        self._counts(key.owner, len(mine) + 1, len(mine))
        if not mine:
            del self._of_owner[key.owner]

    def _counts(self, owner: str, before: int, after: int) -> None:
        """Note that an owner has `after` sessions; of owners with as many, it is the most recent one."""
        if before:
            del self._owners[before][owner]
            if not self._owners[before]:
                del self._owners[before]
        if after:
            self._owners[after][owner] = None
        # A number changes by one at a time, so the largest is the old one or beside it.
        self._largest = max(self._largest, after)
        while self._largest and self._largest not in self._owners:
            self._largest -= 1

    def _expire(self, now: float) -> None:
        while self._kept and now - next(iter(self._kept.values())).at_s > self._ttl_s:
            self._forget(next(iter(self._kept)))
