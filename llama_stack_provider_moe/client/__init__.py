"""A client of a running server, for what the hosts' SDKs lack: `Client`, and `AsyncClient` for asyncio.

    with Client("http://127.0.0.1:8321") as client:
        job = client.submit({"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "mine"}})
        status = client.wait(job["job_uuid"])

Documents are dictionaries as the server sends them; `documents` has their types.
"""

from typing import TYPE_CHECKING

from llama_stack_provider_moe.client.sync_client import Client
from llama_stack_provider_moe.errors import InvalidInput, MoeError, ServerLost, ServerRefused

if TYPE_CHECKING:
    from llama_stack_provider_moe.client.async_client import AsyncClient

__all__ = ["AsyncClient", "Client", "InvalidInput", "MoeError", "ServerLost", "ServerRefused"]


def __getattr__(name: str) -> type["AsyncClient"]:
    # Commands use the other client, and asyncio takes them longer to import than most of them run.
    if name == "AsyncClient":
        from llama_stack_provider_moe.client.async_client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
