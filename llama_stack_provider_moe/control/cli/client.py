"""The command line's client of a server: the package's own, with errors that name options."""

from typing import ClassVar

from llama_stack_provider_moe.client import sync_client
from llama_stack_provider_moe.client.calls import API
from llama_stack_provider_moe.client.connection import Words
from llama_stack_provider_moe.client.documents import JobLine, Status
from llama_stack_provider_moe.client.sync_client import SILENCE_S, Sent
from llama_stack_provider_moe.errors import ServerRefused
from llama_stack_provider_moe.jobdir.state import JobState

__all__ = ["API", "SILENCE_S", "Client", "Sent", "state_of"]


class Client(sync_client.Client):
    """A server with our provider, as `--url` and `--api-key` name it."""

    words: ClassVar[Words] = Words("--url", "--api-key", "; give --api-key, or set MOE_TRAIN_API_KEY")


def state_of(document: Status | JobLine) -> JobState:
    """Return the state in a status document."""
    text = document.get("status")
    state = JobState(str(text))
    if state is JobState.UNREADABLE and text != state.value:
        raise ServerRefused(f"the server reports job state {text!r}, which this version does not know", 200)
    return state
