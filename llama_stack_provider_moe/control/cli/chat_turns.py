"""The turns of a chat: a message, and the answer of each side as it comes."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from llama_stack_provider_moe.client.playground_documents import Piece, Playground, RoutedToken, Side
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.screen import Screen, table
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.output import printable

SHOWN = 4  # experts of a layer
_NAMES: dict[Side, str] = {"on": "adapter on", "off": "adapter off"}
WHY_IT_ENDED = {
    "length": "stopped at --max-tokens", "positions": "stopped at the model's last position", "stopped": "stopped",
}  # fmt: skip


class Asked(NamedTuple):
    """What a chat asks for with each message; see `PromptRequest`."""

    adapter: Literal["on", "off", "both"]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    routing: bool


class Chat:
    """A conversation with a playground. With both sides, each has its own history: its own answers.

    Args:
        server: has the playground.
        screen: where answers go.
        standing: the playground, loaded.
        asked: what is asked for with each message.
        system: the system message; None: none.

    Raises:
        InvalidInput: the playground can't do what is asked for.
    """

    def __init__(self, server: Client, screen: Screen, standing: Playground, asked: Asked, system: str | None) -> None:
        loaded = standing["loaded"]
        assert loaded is not None, "the playground is loaded"
        if asked.adapter != "on" and not loaded["has_adapter"]:
            raise InvalidInput("--adapter", asked.adapter, "on, because this playground has no adapter to switch off")
        if asked.routing and not loaded["moe_layers"]:
            raise InvalidInput("--routing", True, "a model with experts; this one is dense")
        self._server = server
        self._screen = screen
        self._job_id = standing["job_uuid"]
        self._layers = loaded["moe_layers"]
        self._asked = asked
        sides: list[Side] = ["on", "off"] if asked.adapter == "both" else [asked.adapter]
        first = [] if system is None else [{"role": "system", "content": system}]
        self._histories: dict[Side, list[dict[str, str]]] = {side: list(first) for side in sides}

    def say(self, message: str) -> bool:
        """Send a message and print the answer of each side; return whether all of them are complete.

        Ctrl-C ends the turn. A turn that a side was not asked in is forgotten for all, so that they stay comparable.
        """
        complete, before = True, {side: list(history) for side, history in self._histories.items()}
        sides = list(self._histories)
        for side in sides:
            history = self._histories[side]
            history.append({"role": "user", "content": message})
            if len(self._histories) > 1 and not self._screen.as_json:
                self._screen.say(f"[{_NAMES[side]}]")
            shown = self._followed(side, history)
            answer = shown.ended(self._layers)
            if answer is None:
                history.pop()  # so that the next message does not follow a message without an answer
                complete = False
            else:
                history.append({"role": "assistant", "content": answer})
            if shown.is_stopping and side != sides[-1]:
                self._histories = before
                self._screen.note("stopped; this message is not part of the conversation")
                return False
        return complete

    def _followed(self, side: Side, messages: list[dict[str, str]]) -> "_Shown":
        """Print one side's answer as it comes."""
        body = {**self._asked._asdict(), "adapter": side, "messages": messages}
        number = self._server.send_prompt(self._job_id, body)["number"]
        shown = _Shown(self._screen)
        pieces = self._server.answer_pieces(self._job_id, number)
        while True:
            try:
                for piece in pieces:
                    shown.add(piece)
                break
            except KeyboardInterrupt:
                pieces.close()
                if shown.is_stopping:  # a second Ctrl-C
                    raise
                shown.is_stopping = True
                self._server.stop_prompt(self._job_id, number)
                shown.skip_to_new()
                pieces = self._server.answer_pieces(self._job_id, number)
        return shown


class _Shown:
    """One answer on the screen."""

    def __init__(self, screen: Screen) -> None:
        self.is_stopping = False
        self._screen = screen
        self._seen = self._to_skip = 0
        self._routed: list[RoutedToken] = []
        self._answered: Piece | None = None
        self._error: str | None = None

    def skip_to_new(self) -> None:
        """Expect the pieces from the first one again, and print only those that are new."""
        self._to_skip, self._seen = self._seen, 0

    def add(self, piece: Piece) -> None:
        """Print a piece."""
        self._seen += 1
        if self._seen <= self._to_skip:
            return
        if self._screen.as_json:
            self._screen.line(piece)
        if piece["type"] == "text" and not self._screen.as_json:
            sys.stdout.write(printable(piece["text"]))
            sys.stdout.flush()
        elif piece["type"] == "routed":
            self._routed.append(
                {"id": piece["id"], "token": piece["token"], "experts": piece["experts"], "weights": piece["weights"]}
            )
        elif piece["type"] == "answered":
            self._answered = piece
        elif piece["type"] == "ended":
            self._error = piece["error"]

    def ended(self, layers: Sequence[int]) -> str | None:
        """Print what follows the answer, and return its text; None if there is no answer."""
        found = self._answered
        if not self._screen.as_json:
            if self._seen:
                print(flush=True)
            if found is not None:
                why = WHY_IT_ENDED.get(found["reason"])
                speed = found["tokens"] / max(found["seconds"], 1e-3)
                self._screen.note(f"{found['tokens']} tokens, {speed:.1f} tokens/s{f', {why}' if why else ''}")
            if self._routed:
                self._screen.say(table(["Layer", "Experts by use"], used(self._routed, layers)))
        if self._error is not None:
            self._screen.note(self._error)
        return None if found is None or self._error is not None else found["text"]


def used(routed: Sequence[RoutedToken], layers: Sequence[int]) -> list[list[str]]:
    """For each layer a line of its experts by use: the share of tokens that each one served.

    >>> token = {"id": 1, "token": "a", "experts": [[2, 0]], "weights": [[0.7, 0.3]]}
    >>> used([token, token], [5])
    [['5', '2 100%, 0 100%']]
    """
    lines = []
    for place, layer in enumerate(layers):
        counts = Counter(expert for token in routed for expert in token["experts"][place])
        shares = [f"{expert} {count / len(routed):.0%}" for expert, count in counts.most_common(SHOWN)]
        more = f", and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
        lines.append([str(layer), ", ".join(shares) + more])
    return lines
