"""Clients of the openai package that parse each answer strictly by OpenAI's published types."""

import json
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from pydantic import BaseModel

from llama_stack_provider_moe.control.server.openai.routes import PREFIX

TYPES: dict[str, type[BaseModel]] = {
    "fine_tuning.job": FineTuningJob,
    "fine_tuning.job.event": FineTuningJobEvent,
    "fine_tuning.job.checkpoint": FineTuningJobCheckpoint,
    "file": FileObject,
}
ERROR_KEYS = {"message", "type", "param", "code"}


def require_strict(content: Any) -> None:
    """Check an answer: an object of a published type, a list of them, or an error; nothing is converted or extra."""
    if "error" in content and "object" not in content:
        assert set(content) == {"error"}
        assert set(content["error"]) == ERROR_KEYS
        assert all(isinstance(content["error"][key], str) for key in ERROR_KEYS - {"param"})
        return
    if content["object"] == "list":
        assert set(content) - {"first_id", "last_id"} == {"object", "data", "has_more"}
        for each in content["data"]:
            require_strict(each)
        return
    parsed = TYPES[content["object"]].model_validate_json(json.dumps(content), strict=True)
    assert extras(parsed) == [], content


def extras(model: BaseModel, path: str = "") -> list[str]:
    """Fields that the published type does not have, at every depth."""
    found = [f"{path}{name}" for name in model.model_extra or {}]
    for name in type(model).model_fields:
        value = getattr(model, name)
        for index, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, BaseModel):
                found += extras(each, f"{path}{name}.{index}.")
    return found


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
