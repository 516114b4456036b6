"""The command line's client of a server: the package's own, with errors that name options."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

from llama_stack_provider_moe.client import sync_client
from llama_stack_provider_moe.client.calls import API, Call
from llama_stack_provider_moe.client.connection import Words
from llama_stack_provider_moe.client.documents import JobLine, Status
from llama_stack_provider_moe.client.guard_documents import RunShieldAnswer, ShieldList, ShieldVerdict
from llama_stack_provider_moe.client.sync_client import SILENCE_S, Sent
from llama_stack_provider_moe.errors import ServerRefused
from llama_stack_provider_moe.jobdir.state import JobState

__all__ = ["API", "SILENCE_S", "Client", "Sent", "state_of"]


_NO_SHIELDS = (
    "no server with provider inline::moe-guard, which has the shields, answers there; `moe-train init DIR --server "
    "guarded` writes the configuration of one, and `guard run --rules FILE` tries rules without a server"
)


class Client(sync_client.Client):
    """A server with our provider, as `--url` and `--api-key` name it."""

    words: ClassVar[Words] = Words("--url", "--api-key", "; give --api-key, or set MOE_TRAIN_API_KEY")

    def shields(self) -> ShieldList:
        """Return the shields of the server."""
        return self._send(Call(ShieldList, "GET", f"{self.url}/v1/shields", no_route=_NO_SHIELDS))

    def run_shield(self, shield_id: str, messages: Sequence[object], session: str | None) -> ShieldVerdict:
        """Run a shield on messages.

        Args:
            shield_id: id of the shield.
            messages: as JSON has them.
            session: name of the session; None: none.
        """
        body: dict[str, object] = {"shield_id": shield_id, "messages": list(messages)}
        if session is not None:
            body["metadata"] = {"session_id": session}
        url = f"{self.url}/v1/safety/run-shield"
        found = self._send(Call(RunShieldAnswer, "POST", url, body=body, no_route=_NO_SHIELDS))
        return ShieldVerdict(shield_id=shield_id, violation=found["violation"])

    @contextmanager
    def posted(self, path: str, body: Mapping[str, object]) -> Iterator[Iterator[str]]:
        """Post to a route of the host's own API, and give the lines of its answer as they come.

        Args:
            path: the route, from the server's root on.
            body: what is sent as JSON.

        Raises:
            ServerRefused: the server refused.
            ServerLost: it does not answer.
        """
        with self._streaming(f"{self.url}{path}", {"Accept": "text/event-stream"}, {}, body) as answer:
            yield self._read(answer.iter_lines())


def state_of(document: Status | JobLine) -> JobState:
    """Return the state in a status document."""
    text = document.get("status")
    state = JobState(str(text))
    if state is JobState.UNREADABLE and text != state.value:
        raise ServerRefused(f"the server reports job state {text!r}, which this version does not know", 200)
    return state
