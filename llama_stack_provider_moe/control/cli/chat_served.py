"""`moe-train chat --served`: the turns of a chat with a model that the host's own inference serves."""

import sys
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import NamedTuple

from llama_stack_provider_moe.client.sse import Parser
from llama_stack_provider_moe.control.cli.chat_turns import WHY_IT_ENDED, Asked
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput, ServerRefused
from llama_stack_provider_moe.jobdir.output import printable

_ROUTE = "/v1/chat/completions"
_END = "data: [DONE]"


class _Piece(NamedTuple):
    """A part of an answer: its text, and why the answer has ended, or None."""

    text: str
    reason: str | None


def served_model(server: Client, target: str) -> str:
    """Return the id in the host's inference of a job's result.

    Raises:
        InvalidInput: no export of the job serves its result.
    """
    for export in server.exports(target)["data"]:
        model = export.get("served_as")
        if model:
            return model
    raise InvalidInput("--served", target, f"a job whose result this server serves; `moe-train export {target} "
                       "--serve` does that, if the server has an inference server for it")  # fmt: skip


class ServedChat:
    """A conversation with a served model.

    Args:
        server: the host of the inference.
        screen: where answers go.
        model: id of the model in the host's inference.
        asked: what is asked for with each message.
        system: the system message; None: none.

    Raises:
        InvalidInput: a served model can't do what is asked for.
    """

    def __init__(self, server: Client, screen: Screen, model: str, asked: Asked, system: str | None) -> None:
        if asked.adapter != "on":
            raise InvalidInput("--adapter", asked.adapter, "on with --served: a served model has no adapter to switch "
                               "off")  # fmt: skip
        if asked.routing:
            raise InvalidInput("--routing", True, "to be left out with --served: the host's inference does not tell "
                               "experts")  # fmt: skip
        self._server = server
        self._screen = screen
        self._settings = {
            "model": model, "seed": asked.seed, "temperature": asked.temperature, "top_p": asked.top_p,
            "max_tokens": asked.max_tokens, "stream": True,
        }  # fmt: skip
        self._history = [] if system is None else [{"role": "system", "content": system}]

    def say(self, message: str) -> bool:
        """Send a message and print the answer as it comes; return whether it is complete. Ctrl-C stops the answer."""
        self._history.append({"role": "user", "content": message})
        text, reason, began = "", None, time.monotonic()
        pieces = _pieces(self._server, {**self._settings, "messages": self._history})
        try:
            for piece in pieces:
                text += piece.text
                reason = piece.reason or reason
                self._print(piece.text)
        except KeyboardInterrupt:
            reason = "stopped"
        except ServerRefused:
            self._history.pop()
            raise
        self._ended(text, reason, time.monotonic() - began)
        if reason is None:
            self._history.pop()  # so that the next message does not follow a message without an answer
        else:
            self._history.append({"role": "assistant", "content": text})
        return reason not in (None, "stopped")

    def _print(self, text: str) -> None:
        if self._screen.as_json:
            self._screen.line({"type": "text", "text": text})
        else:
            sys.stdout.write(printable(text))
            sys.stdout.flush()

    def _ended(self, text: str, reason: str | None, seconds: float) -> None:
        if self._screen.as_json:
            self._screen.line({"type": "answered", "text": text, "reason": reason, "seconds": round(seconds, 3)})
            return
        print(flush=True)
        why = "the answer broke off" if reason is None else WHY_IT_ENDED.get(reason)
        self._screen.note(f"{seconds:.1f} s{f', {why}' if why else ''}")


def _pieces(server: Client, body: Mapping[str, object]) -> Iterator[_Piece]:
    """The pieces of an answer as they come, in the form of OpenAI's chat completions.

    Raises:
        ServerRefused: the host or its inference refused.
    """
    parser = Parser()
    with server.posted(_ROUTE, body) as lines:
        for line in lines:
            if line.strip() == _END:
                return
            event = parser.feed(line)
            if event is None:
                continue
            error = event.data.get("error")
            if error:
                message = error.get("message") if isinstance(error, dict) else error
                raise ServerRefused(str(message), HTTPStatus.BAD_GATEWAY)
            choices = event.data.get("choices")
            choice = choices[0] if isinstance(choices, list) and choices else {}
            yield _Piece(str((choice.get("delta") or {}).get("content") or ""), choice.get("finish_reason"))
