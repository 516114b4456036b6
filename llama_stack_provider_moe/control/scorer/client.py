"""`ScorerClient`: asks the scorer process, bounded in number and in time, from any event loop."""

import asyncio
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_stack_provider_moe.control.scorer.keeper import ScorerKeeper
from llama_stack_provider_moe.control.scorer.process import MODULE
from llama_stack_provider_moe.shields.probe_card import read_card
from llama_stack_provider_moe.shields.scorer_settings import ScorerSettings
from llama_stack_provider_moe.shields.scorer_wire import (
    LENGTH_BYTES,
    MOST_BYTES,
    MOST_CONVERSATIONS,
    Answer,
    Request,
    ScoreRequest,
    WireError,
    frame,
    length_of,
    plain,
    read_as,
    socket_in,
)
from llama_stack_provider_moe.shields.scores import Score, ScorerFailed, ScorerHealth


class ScorerClient:
    """A `Scorer` whose process this server keeps.

    Args:
        settings: of the scorer.
        folder: below the state folder, for the socket and the log.
        environment: of the scorer process: that of training processes (`training_environment`).
        module: that the process runs; tests use others.

    Raises:
        InvalidInput: a probe's folder has no probe that can be used; it names the setting.
    """

    def __init__(
        self, settings: ScorerSettings, folder: Path, environment: Mapping[str, str], module: str = MODULE
    ) -> None:
        for name, probe in settings.probes.items():
            read_card(Path(probe), f"probes.{name}")
        self._settings, self._folder = settings, folder
        self.keeper = ScorerKeeper(settings, folder, environment, module)
        self._waiting = 0
        self._of_owner: Counter[str | None] = Counter()
        self._most_of_owner = settings.queue_of_owner or max(1, settings.queue // 2)
        self._counting = threading.Lock()  # llama-stack may use several event loops

    def start(self) -> None:
        """Start the process; returns at once, while it loads."""
        self.keeper.start()

    def close(self) -> None:
        """End the process."""
        self.keeper.close()

    async def health(self) -> ScorerHealth:
        """See `Scorer`."""
        return self.keeper.health()._replace(waiting=self._waiting)

    async def score(
        self,
        probe: str,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        deadline_s: float,
        owner: str | None = None,
    ) -> list[Score]:
        """See `Scorer`."""
        if not conversations:
            return []
        framed = self._framed(probe, conversations, deadline_s)
        self._enter(len(conversations), owner)
        try:
            async with asyncio.timeout(deadline_s):
                answer = await self._ask(framed)
        except TimeoutError:
            raise ScorerFailed("deadline", f"the scorer did not answer within {deadline_s:g} s") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            detail = self.keeper.health().detail
            raise ScorerFailed("down", f"no scorer answers ({type(error).__name__}): {detail}") from None
        except WireError as error:
            raise ScorerFailed("down", f"the scorer's answer can't be read: {error}") from None
        finally:
            self._leave(len(conversations), owner)
        if answer.failed is not None:
            raise ScorerFailed(answer.failed, answer.message)
        scores = answer.scores or []
        if len(scores) != len(conversations):
            raise ScorerFailed("down", f"the scorer gave {len(scores)} scores for {len(conversations)} conversations")
        return [Score(*score) for score in scores]

    def _framed(self, probe: str, conversations: Sequence[Sequence[Mapping[str, str]]], deadline_s: float) -> bytes:
        if probe not in self._settings.probes:
            raise ScorerFailed("refused", f"there is no probe {probe!r}: {', '.join(self._settings.probes)}")
        if len(conversations) > MOST_CONVERSATIONS:
            raise ScorerFailed("refused", f"{len(conversations)} conversations; expected at most {MOST_CONVERSATIONS}")
        if not 0 < deadline_s <= 3600:
            raise ScorerFailed("deadline", f"a deadline of {deadline_s:g} s; expected more than 0 and at most 3600")
        size = sum(len(str(message.get("content"))) for messages in conversations for message in messages)
        if size > MOST_BYTES:
            raise ScorerFailed("refused", f"{size:,} characters; expected at most {MOST_BYTES:,}")
        try:
            request = ScoreRequest(probe=probe, conversations=plain(conversations), deadline_s=deadline_s)
            return frame(Request(score=request))
        except ValueError as error:  # a role or a content that is no text, half a surrogate pair, or too many bytes
            raise ScorerFailed("refused", f"the conversations can't be sent: {str(error)[:200]}") from None

    def _enter(self, count: int, owner: str | None) -> None:
        with self._counting:
            if self._waiting + count > self._settings.queue:
                raise ScorerFailed("overloaded", f"{self._waiting} conversations wait already, and at most "
                                   f"{self._settings.queue} may")  # fmt: skip
            of_owner = self._of_owner[owner]
            if owner is not None and of_owner and of_owner + count > self._most_of_owner:
                raise ScorerFailed("overloaded", f"{of_owner} conversations of this caller wait already, and at most "
                                   f"{self._most_of_owner} may")  # fmt: skip
            self._waiting += count
            self._of_owner[owner] += count

    def _leave(self, count: int, owner: str | None) -> None:
        with self._counting:
            self._waiting -= count
            self._of_owner[owner] -= count
            if not self._of_owner[owner]:
                del self._of_owner[owner]

    async def _ask(self, framed: bytes) -> Answer:
        with socket_in(self._folder) as path:
            reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(framed)
            await writer.drain()
            length = length_of(await reader.readexactly(LENGTH_BYTES))
            return read_as(Answer, await reader.readexactly(length))
        finally:
            writer.close()
