"""The one door to the host: Llama Stack or its later name OGX, whichever has loaded us.

No other module names a host package. What differs:

    llama-stack 0.6.1          post-training API and router built in; rows from `datasets` and `datasetio`
    llama-stack 0.7.3          API gone, so we come as an external API; rows as in 0.6.1
    OGX 1.5.0                  the same, and rows from `files` (JSON Lines), for it has no data sets
"""

import asyncio
import importlib.util
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal

from llama_stack_provider_moe.errors import InvalidInput, NotFound


def _host() -> str:
    names = ("ogx", "llama_stack")
    loaded = [name for name in names if name in sys.modules or f"{name}_api" in sys.modules]
    # Nothing is loaded where a test or a tool imports us by itself: then what is installed decides.
    return (loaded or [name for name in names if importlib.util.find_spec(f"{name}_api")] or ["llama_stack"])[0]


HOST = _host()
_api: Any = import_module(f"{HOST}_api")
_router_utils: Any = import_module(f"{HOST}_api.router_utils")

Api: Any = _api.Api
InlineProviderSpec: Any = _api.InlineProviderSpec
PUBLIC_ROUTE_KEY: str = _router_utils.PUBLIC_ROUTE_KEY

Action = Literal["read", "update", "delete"]
JOB_RESOURCE = "post_training_job"  # how rules of an access policy name our jobs: `post_training_job::*`

POST_TRAINING: Any = Api.add("post_training")  # idempotent; the enum lacks it after llama-stack 0.6.1
_HAS_DATASETS = "datasetio" in Api.__members__
ROW_APIS: list[Any] = [Api.datasetio, Api.datasets] if _HAS_DATASETS else [Api.files]


def install_router(factory: Callable[[Any], Any]) -> None:
    """Serve the post-training API through `factory` where the host would serve its own six routes instead.

    The registry is a private dict of a frozen release (llama-stack 0.6.1, the last with this API): pinned in our
    `[llama-stack]` extra and covered by a test. Later hosts find `create_router` by name.
    """
    if importlib.util.find_spec(f"{HOST}_api.post_training"):
        registry: Any = import_module(f"{HOST}.core.server.fastapi_router_registry")
        registry._ROUTER_FACTORIES["post_training"] = factory


def principal() -> str | None:
    """Who sends the request being served, or None with authentication off.

    With authentication off, 0.6.1 lets a header inject a dict as the user: that is nobody, not an identity.
    """
    request_headers: Any = import_module(f"{HOST}.core.request_headers")
    name = getattr(request_headers.get_authenticated_user(), "principal", None)
    return name if isinstance(name, str) and name else None


def may_reach_every_job(policy: Sequence[Any], action: Action) -> bool:
    """Whether the host's access policy allows the caller `action` on jobs that are somebody else's.

    Asked as the host asks for its own resources, with the resource `post_training_job::*`. Without a policy, or
    without authentication, nobody may: the host would then allow everything to everybody.

    Args:
        policy: `server.auth.access_policy` of the run YAML, as the host gives it to a provider.
        action: what the caller is about to do.
    """
    if not policy or principal() is None:
        return False
    access_control: Any = import_module(f"{HOST}.core.access_control.access_control")
    request_headers: Any = import_module(f"{HOST}.core.request_headers")
    job = SimpleNamespace(type=JOB_RESOURCE, identifier="*", owner=SimpleNamespace(principal="", attributes={}))
    actions: Any = import_module(f"{HOST}.core.access_control.datatypes").Action
    return bool(
        access_control.is_action_allowed(list(policy), actions(action), job, request_headers.get_authenticated_user())
    )


def is_stopping() -> bool:
    """Whether the server was asked to end.

    uvicorn, which serves every host, first waits for its connections, without a limit on 0.6.1, and then tells the
    provider: a stream that lasts as long as a job must end of itself, or `llama stack run` hangs on SIGTERM.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(server, "should_exit", False) is True


async def dataset_pages(
    deps: dict[Any, Any], dataset_id: str, rows_per_page: int, field: str
) -> AsyncIterator[list[Any]]:
    """The rows of a data set, `rows_per_page` at a time, as the host gives them.

    Args:
        deps: the host's APIs, as it gave them to the provider.
        dataset_id: a registered data set; on OGX the id of an uploaded JSON Lines file.
        rows_per_page: most rows in a page.
        field: the caller's name for `dataset_id`, for an error's text.

    Raises:
        NotFound: no such data set, or the caller may not read it.
        InvalidInput: the host knows it but can't read it.
    """
    pages = _datasetio_pages if _HAS_DATASETS else _file_pages
    try:
        async for page in pages(deps, dataset_id, rows_per_page):
            yield page
    except _api.ResourceNotFoundError:
        raise NotFound(f"no data set {dataset_id!r} is registered on this server") from None
    except (ValueError, OSError, LookupError, ImportError) as error:
        # pandas' parser errors are ValueErrors; a csv that went away is an OSError; a data set that the
        # registry has and localfs lost is a KeyError; xlsx without openpyxl is an ImportError.
        why = f"{type(error).__name__}: {error}"[:300]
        raise InvalidInput(field, dataset_id, f"a data set that the server can read ({why})") from error


async def _datasetio_pages(deps: dict[Any, Any], dataset_id: str, rows_per_page: int) -> AsyncIterator[list[Any]]:
    # iterrows checks no access policy on 0.6.1; get_dataset does, and says cleanly that there is none.
    models: Any = import_module(f"{HOST}_api.datasets.models")
    dataset = await deps[Api.datasets].get_dataset(models.GetDatasetRequest(dataset_id=dataset_id))
    # For every page localfs of 0.6.1 reads the whole source again, on the server's event loop: 30 pages of a csv of
    # 30,000 rows stop the server for half a minute, a million rows for a day. What it reads we can page ourselves.
    if dataset.source.type == "rows":
        for start in range(0, len(dataset.source.rows), rows_per_page):
            yield dataset.source.rows[start : start + rows_per_page]
        return
    if dataset.provider_id == "localfs" and dataset.source.uri.endswith(".csv"):
        async for page in _csv_pages(dataset.source.uri, rows_per_page):
            yield page
        return
    start, more = 0, True
    while more:
        request = _api.IterRowsRequest(dataset_id=dataset_id, start_index=start, limit=rows_per_page)
        answer = await deps[Api.datasetio].iterrows(request)
        yield answer.data
        start += len(answer.data)
        more = bool(answer.has_more and answer.data)


async def _csv_pages(uri: str, rows_per_page: int) -> AsyncIterator[list[Any]]:
    pandas: Any = import_module("pandas")  # localfs's own reader; the host's extra brings it
    # Every cell is text ("42" and "None" are answers like others), and an empty one is not there.
    chunks = await asyncio.to_thread(
        pandas.read_csv, uri, chunksize=rows_per_page, dtype=str, keep_default_na=False, na_values=[""]
    )
    with chunks:
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk.to_dict("records")


async def _file_pages(deps: dict[Any, Any], file_id: str, rows_per_page: int) -> AsyncIterator[list[Any]]:
    request = _api.RetrieveFileContentRequest(file_id=file_id)
    answer = await deps[Api.files].openai_retrieve_file_content(request)
    lines = [line for line in bytes(answer.body).splitlines() if line.strip()]
    for start in range(0, max(len(lines), 1), rows_per_page):
        yield [_json_or_text(line) for line in lines[start : start + rows_per_page]]


def _json_or_text(line: bytes) -> Any:
    # A line that is no JSON stays text, so that the row check reports it with its number.
    try:
        return json.loads(line)
    except ValueError:
        return line.decode("utf-8", "replace")
