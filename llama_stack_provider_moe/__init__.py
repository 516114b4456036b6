"""Post-training of Mixture-of-Experts models as a Llama Stack provider (`inline::moe`).

Importing this package imports neither a host nor torch, because the training process imports it too and may run in an
environment without a host. Hosts look up these names here:

    get_provider_impl(config, deps)                     every host
    PostTraining, available_providers, create_router    hosts without a post-training API (0.7.3, OGX), through
                                                        `external_apis_dir` (`module: llama_stack_provider_moe`)
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fastapi import APIRouter

    from llama_stack_provider_moe.control.server.compat import Deps, Policy
    from llama_stack_provider_moe.control.server.late_service import LateService
    from llama_stack_provider_moe.spec.server_config import ProviderConfig


class PostTraining(Protocol):
    """The post-training API, for hosts without one of their own; `control.server.routes` has its routes."""

    async def initialize(self) -> None:
        """Open the store."""

    async def shutdown(self) -> None:
        """Close the store; jobs continue."""


async def get_provider_impl(config: "ProviderConfig", deps: "Deps", policy: "Policy" = ()) -> "LateService":
    """Return the provider, ready to serve.

    Args:
        config: the `config:` of the run YAML.
        deps: the host's APIs by `Api`: `datasetio` and `datasets`, or `files`.
        policy: the run YAML's access policy; a host passes it to providers that have an argument of this name.
    """
    from llama_stack_provider_moe.control.server.late_service import LateService

    impl = LateService(config, deps, policy)
    await impl.initialize()
    return impl


def available_providers() -> list[object]:
    """Return the providers of the post-training API in this package: one."""
    from llama_stack_provider_moe.provider import post_training_spec

    return [post_training_spec()]


def create_router(impl: "LateService") -> "APIRouter":
    """Return a router with all routes of `impl`."""
    return impl.router()
