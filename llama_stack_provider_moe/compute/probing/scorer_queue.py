"""What waits in a scorer process, and the thread that scores it: everything that waits for one probe goes together."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Condition

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.probing.scoring import LoadedProbe
from llama_stack_provider_moe.compute.probing.texts import Unscorable, messages_of
from llama_stack_provider_moe.shields.scorer_wire import Answer, ScoreRequest

ROUND = 32  # conversations that are scored before the next look at what waits


@dataclass
class Work:
    """A request that waits.

    Attributes:
        request: what to score; None: a ping.
        answer: takes the answer, in any thread.
        deadline_s: time.monotonic() after which nobody wants the answer.
        is_wanted: set to false when the caller has gone.
    """

    request: ScoreRequest | None
    answer: Callable[[Answer], None]
    deadline_s: float = field(default=0.0)
    is_wanted: bool = True

    @property
    def size(self) -> int:
        """Number of its conversations."""
        return 0 if self.request is None else len(self.request.conversations)


class WorkQueue:
    """A bounded queue of conversations; pings pass it.

    Args:
        limit: most conversations that wait or are being scored.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._works: deque[Work] = deque()
        self._pings: deque[Work] = deque()
        self._changed = Condition()
        self.waiting = 0

    def put(self, work: Work) -> bool:
        """Add a request; returns false, and adds nothing, if the queue is full."""
        with self._changed:
            if work.request is None:
                self._pings.append(work)
            elif self.waiting + work.size > self._limit:
                return False
            else:
                self.waiting += work.size
                self._works.append(work)
            self._changed.notify()
            return True

    def take(self) -> tuple[list[Work], list[Work]]:
        """Wait for something; return all pings, and requests of ROUND conversations or, if it is larger, one."""
        with self._changed:
            self._changed.wait_for(lambda: self._pings or self._works)
            pings, works, size = list(self._pings), list[Work](), 0
            self._pings.clear()
            while self._works and (not works or size + self._works[0].size <= ROUND):
                works.append(self._works.popleft())
                size += works[-1].size
            return pings, works

    def done(self, work: Work) -> None:
        """Count a request as no longer waiting; before its answer is given, for its caller may ask again at once."""
        with self._changed:
            self.waiting -= work.size


def score_for_ever(
    queue: WorkQueue, probes: Mapping[str, LoadedProbe], refused: Mapping[str, str], batch_size: int
) -> None:
    """Answer what waits, round by round.

    Args:
        queue: what waits.
        probes: by name.
        refused: name of a probe that can't score -> why.
        batch_size: texts in one pass.
    """
    while True:
        pings, works = queue.take()
        for ping in pings:
            ping.answer(Answer(probes=list(probes), refused=dict(refused), waiting=queue.waiting))
        for work, answer in _answers(works, probes, refused, batch_size):
            queue.done(work)
            if answer is not None:
                work.answer(answer)


def _answers(
    works: list[Work], probes: Mapping[str, LoadedProbe], refused: Mapping[str, str], batch_size: int
) -> Iterator[tuple[Work, Answer | None]]:
    """Score; each request with its answer, None where nobody wants one."""
    ready: dict[str, list[tuple[Work, list[list[Prompt]]]]] = {}
    for work in works:
        assert work.request is not None
        name = work.request.probe
        if not work.is_wanted:
            yield work, None
        elif time.monotonic() > work.deadline_s:
            yield work, Answer(failed="deadline", message="it waited for longer than its deadline")
        elif name not in probes:
            yield work, Answer(failed="refused", message=refused.get(name, f"there is no probe {name!r}"))
        else:
            try:
                views = [probes[name].reader.prompts(messages_of(each)) for each in work.request.conversations]
            except Unscorable as problem:
                yield work, Answer(failed="refused", message=f"a conversation can't be scored: {problem}")
            else:
                ready.setdefault(name, []).append((work, views))
    for name, asked in ready.items():
        scores = iter(probes[name].score([each for _, views in asked for each in views], batch_size))
        for work, views in asked:
            mine = [next(scores) for _ in views]
            yield work, Answer(scores=[(each.probability, each.threshold, each.layer) for each in mine])
