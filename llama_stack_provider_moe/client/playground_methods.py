"""The clients' methods about playgrounds, their prompts and answers."""

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from http import HTTPStatus
from typing import cast

import httpx

from llama_stack_provider_moe.client import calls
from llama_stack_provider_moe.client.calls import Call
from llama_stack_provider_moe.client.connection import following
from llama_stack_provider_moe.client.grader_methods import AsyncGraderMethods, GraderMethods
from llama_stack_provider_moe.client.patience import POLL_S, Patience
from llama_stack_provider_moe.client.playground_documents import (
    Piece,
    Playground,
    PromptAnswer,
    SentPrompt,
    StoppedPrompt,
)
from llama_stack_provider_moe.client.sse import Event, Parser, events
from llama_stack_provider_moe.errors import ServerLost, ServerRefused


class PlaygroundMethods(GraderMethods):
    """Part of `Client`."""

    _note: Callable[[str], None] | None

    @abstractmethod
    def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    @abstractmethod
    def _streaming(
        self, path: str, headers: Mapping[str, str], query: Mapping[str, int | bool]
    ) -> AbstractContextManager[httpx.Response]: ...

    @abstractmethod
    def _read[Item](self, items: Iterator[Item]) -> Iterator[Item]: ...

    def playground(self, job_id: str) -> Playground:
        """Return a playground and its prompts: {status, is_open, loaded, idle_s, max_new_tokens, data}."""
        return self._send(calls.playground(job_id))

    def send_prompt(self, job_id: str, body: Mapping[str, object]) -> SentPrompt:
        """Send a prompt, such as `{"messages": [...], "adapter": "both"}`, to a playground: {number, ahead}."""
        return self._send(calls.send_prompt(job_id, body))

    def prompt_answer(self, job_id: str, number: int) -> PromptAnswer:
        """Return a prompt and its answer so far: {status, prompt, answers, error}."""
        return self._send(calls.prompt_answer(job_id, number))

    def stop_prompt(self, job_id: str, number: int) -> StoppedPrompt:
        """Stop the answer to a prompt, or withdraw the prompt: {status}."""
        return self._send(calls.stop_prompt(job_id, number))

    def answer_pieces(self, job_id: str, number: int) -> Generator[Piece]:
        """Yield the pieces of an answer as they come, from its first one to its end.

        A server that is restarted meanwhile is waited for.

        Args:
            job_id: name of the playground.
            number: of the prompt.
        """
        cursor, patience = 0, Patience(note=self._note)
        while True:
            headers, query = following(None, cursor)
            try:
                with self._streaming(calls.prompt_path(job_id, number), headers, query) as answer:
                    patience.answered()
                    for event in events(self._read(answer.iter_lines())):
                        if event.name == "end":
                            return
                        found, cursor = _pieces(event)
                        yield from found
            except (ServerLost, ServerRefused) as error:
                patience.lost(error)
            time.sleep(POLL_S)

    def ask(self, job_id: str, body: Mapping[str, object]) -> PromptAnswer:
        """Send a prompt to a playground and return its complete answer; see `send_prompt`."""
        number = self.send_prompt(job_id, body)["number"]
        for _ in self.answer_pieces(job_id, number):
            pass
        return self.prompt_answer(job_id, number)


class AsyncPlaygroundMethods(AsyncGraderMethods):
    """Part of `AsyncClient`; see `PlaygroundMethods`."""

    @abstractmethod
    async def _send[Kind](self, call: Call[Kind]) -> Kind: ...

    @abstractmethod
    def _streaming(
        self, path: str, headers: Mapping[str, str], query: Mapping[str, int | bool]
    ) -> AbstractAsyncContextManager[httpx.Response]: ...

    async def playground(self, job_id: str) -> Playground:
        """Return a playground and its prompts: {status, is_open, loaded, idle_s, max_new_tokens, data}."""
        return await self._send(calls.playground(job_id))

    async def send_prompt(self, job_id: str, body: Mapping[str, object]) -> SentPrompt:
        """Send a prompt to a playground: {number, ahead}; see `Client.send_prompt`."""
        return await self._send(calls.send_prompt(job_id, body))

    async def prompt_answer(self, job_id: str, number: int) -> PromptAnswer:
        """Return a prompt and its answer so far: {status, prompt, answers, error}."""
        return await self._send(calls.prompt_answer(job_id, number))

    async def stop_prompt(self, job_id: str, number: int) -> StoppedPrompt:
        """Stop the answer to a prompt, or withdraw the prompt: {status}."""
        return await self._send(calls.stop_prompt(job_id, number))

    async def answer_pieces(self, job_id: str, number: int) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer as they come; see `Client.answer_pieces`."""
        cursor, patience = 0, Patience()
        while True:
            headers, query = following(None, cursor)
            try:
                async with self._streaming(calls.prompt_path(job_id, number), headers, query) as answer:
                    patience.answered()
                    parser = Parser()
                    async for line in answer.aiter_lines():
                        event = parser.feed(line)
                        if event is None:
                            continue
                        if event.name == "end":
                            return
                        found, cursor = _pieces(event)
                        for piece in found:
                            yield piece
            except (ServerLost, ServerRefused) as error:
                patience.lost(error)
            await asyncio.sleep(POLL_S)

    async def ask(self, job_id: str, body: Mapping[str, object]) -> PromptAnswer:
        """Send a prompt to a playground and return its complete answer; see `send_prompt`."""
        number = (await self.send_prompt(job_id, body))["number"]
        async for _ in self.answer_pieces(job_id, number):
            pass
        return await self.prompt_answer(job_id, number)


def _pieces(event: Event) -> tuple[list[Piece], int]:
    """The pieces of an event and the place of the next one; raise `ServerRefused` if the stream failed."""
    if event.name == "error":
        error = event.data.get("error")
        message = error.get("message") if isinstance(error, dict) else error
        raise ServerRefused(str(message), HTTPStatus.NOT_FOUND)
    return cast("list[Piece]", event.data["pieces"]), int(cast(int, event.data["cursor"]))
