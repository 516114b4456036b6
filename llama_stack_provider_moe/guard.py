"""The safety API for hosts: shields at run time. A run YAML's provider `inline::moe-guard` gets its doors here.

Llama Stack 0.6.1 and 0.7.3 have a safety API, whose provider this is. OGX has none; there this module is an external
API (`external_apis_dir`), with routes of its own. Imports are lazy, because the command line needs no host.
"""

from typing import TYPE_CHECKING, Protocol, Union

if TYPE_CHECKING:
    from fastapi import APIRouter

    from llama_stack_provider_moe.control.guard.llama_stack import SafetyProvider
    from llama_stack_provider_moe.control.guard.routes import SafetyService
    from llama_stack_provider_moe.control.server.compat import Deps
    from llama_stack_provider_moe.spec.guard_config import GuardConfig


class Safety(Protocol):
    """The safety API, for hosts without one of their own; `control.guard.routes` has its routes."""

    async def initialize(self) -> None:
        """Get ready."""

    async def shutdown(self) -> None:
        """Stop accepting checks."""


async def get_provider_impl(config: "GuardConfig", deps: "Deps") -> Union["SafetyProvider", "SafetyService"]:
    """Return the provider, ready to serve.

    Args:
        config: the `config:` of the run YAML.
        deps: the host's APIs by `Api`; none is needed.
    """
    from llama_stack_provider_moe.control.guard.start import started

    impl = started(config)
    await impl.initialize()
    return impl


def available_providers() -> list[object]:
    """Return the providers of the safety API in this package: one."""
    from llama_stack_provider_moe.provider import guard_spec

    return [guard_spec()]


def create_router(impl: "SafetyService") -> "APIRouter":
    """Return a router with all routes of `impl`, on a host without a safety API."""
    from llama_stack_provider_moe.control.guard import routes

    return routes.create_router(impl)
