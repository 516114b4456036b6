"""Resolves the names in a job and checks the models among them, before the job's rows are read.

A common mistake is a model that the host's inference serves (`ollama/llama3.2:3b`, `gpt-4o-mini`): the host answers
with it, but this server does not have its weights. Whatever refuses such a name, the answer then says so.
"""

import asyncio
import re
from typing import Protocol, cast

from llama_stack_provider_moe.control.server import compat, hub_check, resolve
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import JobSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig

MODEL_FIELDS = ("model", "eval.judge.model", "distill.model", "teacher", "surgery.add.mlp_from")
MODELS_LIMIT_S = 5.0  # some hosts ask their inference servers for a list of models
_TAGGED = re.compile(r"[A-Za-z0-9][\w./-]*:[\w.-]+")  # Ollama's names


class _Model(Protocol):
    identifier: str
    provider_resource_id: str | None


class _ModelList(Protocol):
    data: list[_Model]


class _Models(Protocol):
    async def list_models(self) -> _ModelList: ...


async def served_models(deps: compat.Deps) -> set[str]:
    """Return the names of the models that the host's inference serves to the caller; none without inference.

    A model counts by the host's name for it (`openai/gpt-4o-mini`) and by its provider's (`gpt-4o-mini`).
    """
    if compat.Api.models not in deps:
        return set()
    try:
        async with asyncio.timeout(MODELS_LIMIT_S):
            found = (await cast("_Models", deps[compat.Api.models]).list_models()).data
    except TimeoutError:
        return set()
    return {name for each in found for name in (each.identifier, each.provider_resource_id) if name}


class JobNames:
    """Resolves the names in jobs.

    Args:
        config: the server's configuration.
        guard: runs the parts that may block.
        deps: the host's APIs.
    """

    def __init__(self, config: ProviderConfig, guard: Guard, deps: compat.Deps) -> None:
        self._config = config
        self._guard = guard
        self._deps = deps

    async def resolve(
        self,
        request: Draft,
        spec: resolve.NamingSpec,
        job_id: str,
        store: JobStore,
        whose: str | None,
        asks_hub: bool = True,
    ) -> JobSpec:
        """Return the spec with every name resolved, and models that can be known not to exist refused.

        Args:
            request: maps field names to the caller's names, and gets the notes.
            spec: the requested job.
            job_id: the id of the new job.
            store: the store that has the named jobs.
            whose: the owner whose jobs the request may name; None for every owner's.
            asks_hub: whether the hub is asked for the model.

        Raises:
            InvalidInput, Forbidden, NotFound, Conflict: a named thing does not exist, or the caller may not use it.
            NoToolchain: an export asks for files that this server can't write yet.
        """
        try:
            found = await self._guard.in_job_paths(
                resolve.named_folders(spec), resolve.resolve_names, request, spec, job_id, self._config, store, whose
            )
            if asks_hub:
                await hub_check.check(request, found, self._config, self._guard)
        except InvalidInput as error:
            raise await self._explained(error, request) from None
        return found

    async def _explained(self, error: InvalidInput, request: Draft) -> InvalidInput:
        """The error; about the name of a served model it says more."""
        if type(error) is not InvalidInput or error.field not in map(request.name, MODEL_FIELDS):
            return error
        name = str(error.value)
        if name in await served_models(self._deps):
            why = "the host's inference serves a model of that name, but a job needs weights, which it does not give"
        elif _TAGGED.fullmatch(name):
            why = "a name with ':' is that of a served model (NAME:TAG of Ollama), and a job needs the weights"
        else:
            return error
        return InvalidInput(error.field, error.value, f"{error.expected}; {why}")
