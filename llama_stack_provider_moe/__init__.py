"""Post-training of Mixture-of-Experts models as a Llama Stack provider (`inline::moe`).

Importing this package imports neither a host nor torch: the training process, which may live in an environment
without a host, imports it too. A host finds here what it looks for by name:

    get_provider_impl(config, deps)                     every host
    PostTraining, available_providers, create_router    hosts without a post-training API (0.7.3, OGX), through
                                                        `external_apis_dir` (`module: llama_stack_provider_moe`)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fastapi import APIRouter

    from llama_stack_provider_moe.config import ProviderConfig
    from llama_stack_provider_moe.host.service import PostTrainingService


class PostTraining(Protocol):
    """The post-training API as hosts that lost it need it named; `host.routes` says what it serves."""

    async def initialize(self) -> None:
        """Open the store."""

    async def shutdown(self) -> None:
        """Close the store; jobs go on."""


async def get_provider_impl(
    config: "ProviderConfig", deps: dict[Any, Any], policy: Sequence[Any] = ()
) -> "PostTrainingService":
    """The provider, ready to serve.

    Args:
        config: the `config:` of the run YAML.
        deps: the host's APIs by `Api`; `datasetio` and `datasets`, or `files`.
        policy: the run YAML's access policy, which a host gives to a provider that has an argument of this name.
    """
    from llama_stack_provider_moe.host.service import PostTrainingService

    impl = PostTrainingService(config, deps, policy)
    await impl.initialize()
    return impl


def available_providers() -> list[Any]:
    """The providers of the post-training API that this package brings: one."""
    from llama_stack_provider_moe.provider import get_provider_spec

    return [get_provider_spec()]


def create_router(impl: "PostTrainingService") -> "APIRouter":
    """All routes of `impl`."""
    from llama_stack_provider_moe.host import routes

    return routes.create_router(impl)
