"""Results of jobs on the server's inference: what an export needs for it, how far it is, and the host's own registry.

The export publishes the model (`compute.recipes.export.serve`). The host's inference finds it by its id,
`PROVIDER/NAME`. This module registers that id with the host, in the name of the job's owner: only then can an access
policy tell it from a model that belongs to nobody. That needs a request of the owner, so it happens when the owner
retrieves the job.
"""

import logging
from collections.abc import Callable
from datetime import datetime
from typing import Literal, NamedTuple

from llama_stack_provider_moe.control.server import callers, compat, host_models, views
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Forbidden, InvalidInput
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.serving.record import ServedRecord, read_record
from llama_stack_provider_moe.spec import Exports, ExportSpec, TrainingSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.serving_config import SERVED_PREFIX, OllamaServing, gguf_of

log = logging.getLogger(__name__)


class Served(NamedTuple):
    """How far the serving of a completed job is.

    Attributes:
        state: whether the model answers.
        model: its id in the host's inference; None unless it is served.
        why: why it is not served.
        at: when it was served, or when the export ended.
    """

    state: Literal["pending", "served", "failed"]
    model: str | None = None
    why: str | None = None
    at: datetime | None = None


def completed(asked: Exports, has_adapter: bool, request: Draft, config: ProviderConfig) -> Exports:
    """Return an `export` block with the GGUF file that serving needs.

    Args:
        asked: the block.
        has_adapter: whether the job trains an adapter; else it trains all weights.
        request: maps field names to the caller's names, for error texts.
        config: the server's configuration.

    Raises:
        InvalidInput: this server can't serve the result.
        Forbidden: the block pushes to a name that serving uses.
    """
    serving = config.serving
    if isinstance(serving, OllamaServing) and asked.ollama is not None and asked.ollama.url == serving.url:
        name = asked.ollama.name
        if name.lower().startswith(SERVED_PREFIX):
            raise Forbidden(f"{request.name('export.ollama.name')}: {name!r} begins with {SERVED_PREFIX!r}, as the "
                            "models that this server serves do; choose another name")  # fmt: skip
    if not asked.serve:
        return asked
    field = request.name("export.serve")
    if serving is None:
        raise InvalidInput(field, True, "false, because this server has no inference server for results (`serving`)")
    type_ = gguf_of(serving)
    if type_ is None and not has_adapter:
        raise InvalidInput(field, True, "false, because vLLM can't load a whole model while it runs, and this job "
                           "trains all weights")  # fmt: skip
    if type_ is None or type_ in asked.gguf:
        return asked
    return asked.model_copy(update={"gguf": [*asked.gguf, type_]})


def export_that_serves(job: Job, store: JobStore) -> Job | None:
    """Return the newest export that serves a job's result, or is about to."""
    lost = (JobState.FAILED, JobState.CANCELLED)
    found = [each for each in _exports(job, store) if each.state not in lost or _record(each) is not None]
    return found[0] if found else None


def model_id_of(export: Job) -> str | None:
    """Return the id of the model that an export has put on the server's inference, once it answers there."""
    record = _record(export)
    return None if record is None or record.served_at is None else record.model_id


def of(job: Job, store: JobStore, config: ProviderConfig) -> Served | None:
    """Return how far the serving of a job is; None for a job that is not served.

    Args:
        job: a job that trains.
        store: has its exports.
        config: the server's configuration.
    """
    if config.serving is None or job.state is not JobState.COMPLETED:
        return None
    exports = _exports(job, store)
    for each in exports:
        record = _record(each)
        if record is not None and record.served_at is not None and record.provider_id == config.serving.provider_id:
            return Served("served", record.model_id, at=record.served_at)
    if not exports:
        return None
    newest = exports[0]
    if newest.state.over:
        return Served("failed", why=newest.reason or "its export has ended without it", at=newest.ended_at)
    return Served("pending") if _asks_itself(job) else None


def _asks_itself(job: Job) -> bool:
    spec = _read(lambda: views.folder_of(job).read_spec())
    return isinstance(spec, TrainingSpec) and spec.export is not None and spec.export.serve


def _exports(job: Job, store: JobStore) -> list[Job]:
    """The exports of a job that serve it, newest first."""
    return [each for each in store.exports(job.id) if _serves(each)]


def _serves(export: Job) -> bool:
    spec = _read(lambda: views.folder_of(export).read_spec())
    return isinstance(spec, ExportSpec) and spec.export.serve


def _record(export: Job) -> ServedRecord | None:
    return _read(lambda: read_record(views.folder_of(export)))


def _read[T](read: Callable[[], T]) -> T | None:
    """What a file of a job says; None if it is missing or damaged, so that lists still work."""
    try:
        return read()
    except (OSError, ValueError, Forbidden):
        return None


class Offers:
    """Models of jobs in the host's registry.

    Args:
        config: the server's configuration.
        deps: the host's APIs.
    """

    def __init__(self, config: ProviderConfig, deps: compat.Deps) -> None:
        self._config = config
        self._deps = deps
        self._known: set[str] = set()  # registered by this process

    async def registered(self, model: str, owner: str) -> None:
        """Register a model with the host if the caller is its owner; a failure is logged.

        Args:
            model: its id.
            owner: the owner of its job.
        """
        if model in self._known or callers.owner() != owner:
            return
        provider_id, _, name = model.partition("/")
        why = await host_models.register(self._deps, provider_id, name)
        if why is None:
            self._known.add(model)
        else:
            log.warning("model %s is not registered with the host: %s", model, why)

    async def withdrawn(self, model: str | None) -> None:
        """Remove the model of a deleted job from the host's registry, if the caller may; None: it had none."""
        if model is None:
            return
        self._known.discard(model)
        why = await host_models.unregister(self._deps, model)
        if why is not None:
            log.warning("model %s stays in the host's list: %s", model, why)
