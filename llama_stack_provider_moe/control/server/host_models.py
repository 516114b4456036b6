"""The registry of models of the host: `deps[Api.models]`, on every host the routing table of its inference API."""

import logging
from typing import Protocol, cast

from llama_stack_provider_moe.control.server.compat import Api, Deps, HostError
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.serving_config import ServingConfig

log = logging.getLogger(__name__)


class _Model(Protocol):
    owner: object
    model_type: str


class _Registry(Protocol):
    async def get(self, type: str, identifier: str) -> _Model | None: ...

    async def delete(self, type: str, identifier: str) -> None: ...


class _Models(Protocol):
    impls_by_provider_id: dict[str, object]
    dist_registry: _Registry

    async def get_model(self, model_id: str) -> _Model: ...

    async def register_model(self, *, model_id: str, provider_model_id: str, provider_id: str) -> object: ...

    async def unregister_model(self, *, model_id: str) -> None: ...


def must_have_provider(serving: ServingConfig | None, deps: Deps) -> None:
    """Raise `InvalidInput` if the host has no inference provider of the configured name."""
    if serving is None:
        return
    table = _table(deps)
    if table is None:
        log.warning("serving: this host has no inference; results are served, and reached without this host")
    elif serving.provider_id not in table.impls_by_provider_id:
        there = ", ".join(map(repr, sorted(table.impls_by_provider_id))) or "none"
        raise InvalidInput("serving.provider_id", serving.provider_id, f"a provider of providers.inference ({there})")


async def register(deps: Deps, provider_id: str, name: str) -> str | None:
    """Register a model in the caller's name, unless the caller can use it already.

    The host also lists by itself what a provider has, as models of nobody; OGX guesses from the name whether one makes
    embeddings. Where the caller can't chat with such an entry, it is replaced; an entry that somebody owns is not.

    Args:
        deps: the host's APIs.
        provider_id: the inference provider.
        name: the model's name there.

    Returns:
        Why it is not registered; None if it is, or if the host has no registry.
    """
    table, model_id = _table(deps), f"{provider_id}/{name}"
    if table is None:
        return None
    try:
        if (await table.get_model(model_id)).model_type == "llm":
            return None
    except HostError:  # not there, or not for this caller
        pass
    try:
        there = await table.dist_registry.get("model", model_id)
        if there is not None:
            if there.owner is not None:
                return "somebody else has registered a model of this name"
            await table.dist_registry.delete("model", model_id)
        await table.register_model(model_id=name, provider_model_id=name, provider_id=provider_id)
    except (
        HostError,
        ValueError,
        RuntimeError,
    ) as error:  # the provider does not have it; the policy does not permit it
        return f"{type(error).__name__}: {error}"[:300]
    return None


async def unregister(deps: Deps, model_id: str) -> str | None:
    """Remove a model from the registry, if the caller may; return why it stays."""
    table = _table(deps)
    if table is None:
        return None
    try:
        if await table.dist_registry.get("model", model_id) is not None:
            await table.unregister_model(model_id=model_id)
    except (HostError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def _table(deps: Deps) -> _Models | None:
    return cast("_Models | None", deps.get(Api.models))
