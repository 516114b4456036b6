"""The only module that imports the host: Llama Stack, or OGX (its later name), whichever has loaded this package.

The hosts differ as follows:

    llama-stack 0.6.1    post-training API and router built in; rows from `datasets` and `datasetio`, and from `files`
                         if the run YAML has a provider of it
    llama-stack 0.7.3    no post-training API, so this package is an external API; rows as in 0.6.1
    OGX 1.5.0            the same, but rows from `files` alone, because OGX has no data sets; users may have a tenant
"""

import importlib.util
import logging
import re
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from http.client import HTTPException
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

from fastapi.responses import StreamingResponse

from llama_stack_provider_moe.control.server import csv_rows, hub_rows
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.errors import InvalidInput, NotFound, Unavailable
from llama_stack_provider_moe.ground.redaction import passwords_in, scrubbed, without_passwords
from llama_stack_provider_moe.ground.small_files import open_regular

if TYPE_CHECKING:  # a host imports this module at its start, and these bring every model of a job with them
    from llama_stack_provider_moe.control.server import host_files
    from llama_stack_provider_moe.jobdir.row_sources import SourceKind
    from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor


class _Source(Protocol):
    type: str
    rows: list[object]
    uri: str


class _Dataset(Protocol):
    source: _Source
    provider_id: str


class _Datasets(Protocol):
    async def get_dataset(self, request: object) -> _Dataset: ...


class _RowPage(Protocol):
    data: list[object]
    has_more: bool | None


class _DatasetIO(Protocol):
    async def iterrows(self, request: object) -> _RowPage: ...


class _FileInfo(Protocol):
    filename: str


class _Files(Protocol):
    async def openai_retrieve_file(self, request: object) -> _FileInfo: ...

    async def openai_retrieve_file_content(self, request: object) -> object: ...


def _host() -> str:
    names = ("ogx", "llama_stack")
    loaded = [name for name in names if name in sys.modules or f"{name}_api" in sys.modules]
    # No host is loaded where a test or a tool imports this package alone: then the installed one counts.
    return (loaded or [name for name in names if importlib.util.find_spec(f"{name}_api")] or ["llama_stack"])[0]


HOST = _host()
_api = import_module(f"{HOST}_api")
_router_utils = import_module(f"{HOST}_api.router_utils")

Api: Any = _api.Api
HostError: type[Exception] = getattr(  # the base of the errors that a host's APIs raise on purpose
    import_module(f"{HOST}_api.common.errors"), "OGXError" if HOST == "ogx" else "LlamaStackError"
)
InlineProviderSpec: Callable[..., object] = _api.InlineProviderSpec
PUBLIC_ROUTE_KEY: str = _router_utils.PUBLIC_ROUTE_KEY

type Deps = Mapping[Any, object]  # the host's APIs by `Api`, as the host gives them to a provider
type Policy = Sequence[object]  # the host's access rules
Action = Literal["read", "update", "delete"]
JOB_RESOURCE = "post_training_job"  # the name of our jobs in access rules: `post_training_job::*`

POST_TRAINING: object = Api.add("post_training")  # idempotent; the enum lacks it after llama-stack 0.6.1
FILE_LIMIT_S = 60.0  # longest read of one page of a file
HUB_LIMIT_S = 600.0  # longest download of a data set of the hub
log = logging.getLogger(__name__)
_reading = Pool("moe-data", 4, 256, "data sets", stuck_s=FILE_LIMIT_S)
_HAS_DATASETS = "datasetio" in Api.__members__
_FILE_ID = re.compile(r"file-[0-9A-Za-z]{16,}")  # beside data sets, what looks so is a file
ROW_APIS: list[object] = [Api.datasetio, Api.datasets] if _HAS_DATASETS else [Api.files]
OPTIONAL_APIS: list[object] = [Api.files, Api.models] if _HAS_DATASETS else [Api.models]  # models: to serve results


class Caller(NamedTuple):
    """Who sent a request.

    Attributes:
        principal: the user's name; on OGX it may be the API key itself.
        tenant: the user's tenant; None on a host without tenants, and for a user without one.
    """

    principal: str
    tenant: str | None


def install_router[Impl, Router](factory: Callable[[Impl], Router]) -> None:
    """Serve the post-training API through `factory` on a host that has its own router for it.

    The registry is a private dict of a frozen release (llama-stack 0.6.1, the last with this API). Our `[llama-stack]`
    extra pins that release, and a test covers the dict. Later hosts find `create_router` by name.
    """
    if importlib.util.find_spec(f"{HOST}_api.post_training"):
        registry = import_module(f"{HOST}.core.server.fastapi_router_registry")
        registry._ROUTER_FACTORIES["post_training"] = factory


def caller() -> Caller | None:
    """Return who sent the current request, or None with authentication off.

    With authentication off, 0.6.1 lets a header inject a dict as the user; that does not count as an identity.
    """
    user = _user()
    name, tenant = getattr(user, "principal", None), getattr(user, "tenant_id", None)
    if not isinstance(name, str) or not name:
        return None
    return Caller(name, tenant if isinstance(tenant, str) and tenant else None)


def has_one_tenant() -> bool:
    """Return whether the host gives every user the same tenant (`tenancy: {mode: single}` of OGX)."""
    if not importlib.util.find_spec(f"{HOST}.core.storage.sqlstore"):  # 0.6.1
        return False
    store = import_module(f"{HOST}.core.storage.sqlstore.authorized_sqlstore")
    config = getattr(store, "get_default_tenancy_config", None)  # only OGX has tenants
    return config is not None and config().mode.value == "single"


def may_reach_every_job(policy: Policy, action: Action) -> bool:
    """Return whether the host's access policy allows the caller `action` on other users' jobs, in the caller's tenant.

    The check is the host's own, with the resource `post_training_job::*`. Without a policy, or without authentication,
    the answer is no, because the host's check would then allow everything to everybody.

    Args:
        policy: `server.auth.access_policy` of the run YAML, as the host gives it to a provider.
        action: the action that the caller requests.
    """
    who = caller()
    if not policy or who is None:
        return False
    access_control = import_module(f"{HOST}.core.access_control.access_control")
    # OGX compares the tenants of owner and user before it looks at the policy.
    owner = SimpleNamespace(principal="", attributes={}, tenant_id=who.tenant)
    job = SimpleNamespace(type=JOB_RESOURCE, identifier="*", owner=owner)
    actions = import_module(f"{HOST}.core.access_control.datatypes").Action
    return bool(access_control.is_action_allowed(list(policy), actions(action), job, _user()))


def _user() -> object:
    return import_module(f"{HOST}.core.request_headers").get_authenticated_user()


def is_stopping() -> bool:
    """Return whether the server is shutting down.

    uvicorn, which serves every host, first waits for its connections (on 0.6.1 without a limit) and only then shuts the
    provider down. A stream that lasts as long as a job must therefore end itself, or `llama stack run` hangs on
    SIGTERM.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(server, "should_exit", False) is True


def rows_kind(deps: Deps, dataset_id: str) -> "SourceKind":
    """Return what the host has under such an id. Nobody is asked: where hosts have both, files have ids of a form."""
    is_file = not _HAS_DATASETS or (Api.files in deps and _FILE_ID.fullmatch(dataset_id) is not None)
    return "host file" if is_file else "host data set"


async def has_dataset(deps: Deps, dataset_id: str) -> bool:
    """Return whether the host has this data set or file, and the caller may read it."""
    try:
        if rows_kind(deps, dataset_id) == "host file":
            await _file_info(deps, dataset_id)
        else:
            models = import_module(f"{HOST}_api.datasets.models")
            await cast("_Datasets", deps[Api.datasets]).get_dataset(models.GetDatasetRequest(dataset_id=dataset_id))
    except _api.ResourceNotFoundError:
        return False
    return True


async def dataset_pages(
    deps: Deps,
    dataset_id: str,
    rows_per_page: int,
    field: str,
    admit: Callable[[str], None],
    images: "ImageDoor | None" = None,
) -> AsyncIterator[list[object]]:
    """Yield the rows of a data set in pages, as the host gives them.

    Args:
        deps: the host's APIs, as it gave them to the provider.
        dataset_id: a registered data set, or the id of a file that was uploaded to the host.
        rows_per_page: most rows in a page.
        field: the caller's name for `dataset_id`, for error texts.
        admit: called with the URI of the rows, if they have one; raises where the caller may not read it.
        images: takes the images of a file's rows, piece by piece.

    Raises:
        NotFound: no such data set, or the caller may not read it.
        InvalidInput: the host knows the data set but can't read it.
        InvalidRows: rows of a file are not valid.
        Unavailable: the host's store of files does not answer.
    """
    secrets: list[str] = []

    def admitted(uri: str) -> None:
        secrets.extend(passwords_in(uri))  # the user of a data set may not be the one who registered it
        admit(uri)

    kind = rows_kind(deps, dataset_id)
    if kind == "host file":
        pages = _file_pages(deps, dataset_id, rows_per_page, field, images)
    else:
        pages = _datasetio_pages(deps, dataset_id, rows_per_page, admitted)
    try:
        async for page in pages:
            yield page
    except _api.ResourceNotFoundError:
        what = "file {} was uploaded to" if kind == "host file" else "data set {} is registered on"
        raise NotFound(f"no {what.format(repr(dataset_id))} this server") from None
    except InvalidInput:  # says itself what is wrong
        raise
    except (ValueError, OSError, LookupError, ImportError, HTTPException) as error:
        # pandas' parser errors are ValueErrors; a URL that urllib rejects gives an HTTPException; a csv that is gone
        # gives an OSError; a data set in the registry that localfs lost gives a KeyError; xlsx without openpyxl gives
        # an ImportError.
        why = scrubbed(f"{type(error).__name__}: {error}", secrets)[:300]
        raise InvalidInput(field, dataset_id, f"a data set that the server can read ({why})") from error


async def _datasetio_pages(
    deps: Deps, dataset_id: str, rows_per_page: int, admit: Callable[[str], None]
) -> AsyncIterator[list[object]]:
    # On 0.6.1 iterrows does not check the access policy; get_dataset does, and reports a missing data set clearly.
    models = import_module(f"{HOST}_api.datasets.models")
    datasets = cast("_Datasets", deps[Api.datasets])
    dataset = await datasets.get_dataset(models.GetDatasetRequest(dataset_id=dataset_id))
    # For every page localfs and huggingface of the host read the whole source again, on the server's event loop: 30
    # pages of a csv of 30,000 rows stop the server for half a minute, a million rows for a day. We page such sources.
    if dataset.source.type == "rows":
        for start in range(0, len(dataset.source.rows), rows_per_page):
            yield dataset.source.rows[start : start + rows_per_page]
        return
    uri = dataset.source.uri
    why_not = f"{without_passwords(uri)[:300]} does not answer within {FILE_LIMIT_S:g} seconds; try again"
    await _reading.within(FILE_LIMIT_S, why_not, admit, uri)
    if dataset.provider_id == "localfs" and uri.endswith(".csv"):
        async for page in _csv_pages(uri, why_not, rows_per_page):
            yield page
        return
    if dataset.provider_id == "huggingface":
        async for page in _hub_pages(uri, rows_per_page):
            yield page
        return
    datasetio = cast("_DatasetIO", deps[Api.datasetio])
    start, more = 0, True
    while more:
        request = _api.IterRowsRequest(dataset_id=dataset_id, start_index=start, limit=rows_per_page)
        answer = await datasetio.iterrows(request)
        yield answer.data
        start += len(answer.data)
        more = bool(answer.has_more and answer.data)


async def _hub_pages(uri: str, rows_per_page: int) -> AsyncIterator[list[object]]:
    why_not = f"{without_passwords(uri)[:300]} is not there within {HUB_LIMIT_S:g} seconds; try again"
    found = await _reading.within(HUB_LIMIT_S, why_not, hub_rows.loaded, uri)
    for start in range(0, len(found), rows_per_page):
        yield await _reading.within(FILE_LIMIT_S, why_not, hub_rows.page, found, start, rows_per_page)


async def _csv_pages(uri: str, why_not: str, rows_per_page: int) -> AsyncIterator[list[object]]:
    with await _reading.within(FILE_LIMIT_S, why_not, csv_rows.opened, uri, rows_per_page) as chunks:
        while (rows := await _reading.within(FILE_LIMIT_S, why_not, csv_rows.page, chunks)) is not None:
            yield rows


async def _file_pages(
    deps: Deps, file_id: str, rows_per_page: int, field: str, images: "ImageDoor | None"
) -> AsyncIterator[list[object]]:
    from llama_stack_provider_moe.control.server import host_files

    try:
        name = (await _file_info(deps, file_id)).filename
        pieces = await _file_pieces(cast("_Files", deps[Api.files]), file_id)
        async with aclosing(pieces):
            async for page in host_files.pages(pieces, file_id, name, rows_per_page, field, images):
                yield page
    except _store_failures() as error:
        log.warning("file %r can't be read: %s: %s", file_id, type(error).__name__, error)
        raise Unavailable(f"file {file_id!r} can't be read now; its store answers with an error") from error


def has_files(deps: Deps) -> bool:
    """Return whether files can be uploaded to the host."""
    return Api.files in deps


async def file_bytes(deps: Deps, file_id: str, most: int) -> bytes:
    """Return the first `most` bytes of a file that was uploaded to the host.

    Raises:
        NotFound: there is none, or the caller may not read it.
        Unavailable: the host's store of files does not answer.
    """
    found = bytearray()
    try:
        await _file_info(deps, file_id)
        async with aclosing(await _file_pieces(cast("_Files", deps[Api.files]), file_id)) as pieces:
            async for piece in pieces:
                found += piece
                if len(found) >= most:
                    break
    except _api.ResourceNotFoundError:
        raise NotFound(f"no file {file_id!r} was uploaded to this server") from None
    except _store_failures() as error:
        raise Unavailable(f"file {file_id!r} can't be read now; its store answers with an error") from error
    return bytes(found[:most])


async def _file_info(deps: Deps, file_id: str) -> _FileInfo:
    """Return what the host says about a file that the caller may read.

    Raises:
        ResourceNotFoundError: there is none. (localfs of 0.7.3 and OGX calls an id of another form invalid.)
    """
    files = cast("_Files", deps[Api.files])
    try:
        return await files.openai_retrieve_file(_api.RetrieveFileRequest(file_id=file_id))
    except _api.InvalidParameterError:
        raise _api.ResourceNotFoundError(file_id, "File", "client.files.list()") from None


async def _file_pieces(files: _Files, file_id: str) -> AsyncGenerator[bytes]:
    """Open a file whose access was checked, without reading it whole.

    The hosts' own call reads whole files into memory (localfs everywhere; S3 on 0.6.1 and 0.7.3, on the event loop).
    So those two of the host's providers are read here, through names of theirs that the pins of our extras fix and
    `test_hosts` covers; any other is asked by the official call.
    """
    from llama_stack_provider_moe.control.server import host_files

    host: Any = files
    of = f"{type(files).__module__}.{type(files).__name__}"
    if of == f"{HOST}.providers.inline.files.localfs.files.LocalfsFilesImpl":
        _, path = await host._lookup_file_id(file_id)
        return host_files.pieces_of(partial(open_regular, path), file_id)
    if of == f"{HOST}.providers.remote.files.s3.files.S3FilesImpl" and _HAS_DATASETS:
        opened = partial(_s3_body, host.client, host._config.bucket_name, file_id)
        return host_files.pieces_of(opened, file_id)
    answer: Any = await files.openai_retrieve_file_content(_api.RetrieveFileContentRequest(file_id=file_id))
    return _answered(answer)


def _s3_body(client: Any, bucket: str, key: str) -> "host_files.Stream":
    return cast("host_files.Stream", client.get_object(Bucket=bucket, Key=key)["Body"])


async def _answered(answer: Any) -> AsyncGenerator[bytes]:
    if isinstance(answer, StreamingResponse):  # S3 on OGX; starlette reads it in a thread
        async for piece in answer.body_iterator:
            yield piece.encode() if isinstance(piece, str) else bytes(piece)
    else:
        yield bytes(answer.body)


def _store_failures() -> tuple[type[Exception], ...]:
    """The errors of a store of files: the hosts' RuntimeError, and boto's where a provider has loaded it."""
    boto = sys.modules.get("botocore.exceptions")
    return (RuntimeError,) if boto is None else (RuntimeError, boto.BotoCoreError, boto.ClientError)
