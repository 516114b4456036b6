"""Clients of the openai package that parse each answer strictly by OpenAI's published types."""

from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI

from llama_stack_provider_moe.control.server.openai.routes import PREFIX
from tests.support.openai_strict import require_strict

# The package brings its own HTTP library, httpx or its successor, so a response has no type here.


def _check(response: Any) -> None:
    if response.headers["content-type"].startswith("application/json"):
        require_strict(response.json())


def _read(response: Any) -> None:
    response.read()
    _check(response)


async def _read_async(response: Any) -> None:
    await response.aread()
    _check(response)


def client(url: str, token: str = "none") -> OpenAI:
    """A client without retries, because a test needs the first answer."""
    http = DefaultHttpxClient(event_hooks={"response": [_read]}, timeout=120)
    return OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, http_client=http)


def async_client(url: str, token: str = "none") -> AsyncOpenAI:
    """The same for asyncio."""
    http = DefaultAsyncHttpxClient(event_hooks={"response": [_read_async]}, timeout=120)
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, http_client=http)


def result_file(api: OpenAI, file_id: str) -> str:
    """The content of a result file: the package's own file routes, below the fine-tuning prefix."""
    files = api.with_options(base_url=str(api.base_url).replace("/v1/", f"{PREFIX}/")).files
    assert files.retrieve(file_id).bytes == len(files.content(file_id).content)
    return files.content(file_id).text
