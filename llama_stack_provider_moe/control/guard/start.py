"""Starts the provider for the host that loaded this package."""

from llama_stack_provider_moe.control.config_check.guard_start import plain_guard_errors
from llama_stack_provider_moe.control.guard import host, host_routes
from llama_stack_provider_moe.control.guard.llama_stack import SafetyProvider
from llama_stack_provider_moe.control.guard.routes import SafetyService
from llama_stack_provider_moe.control.guard.service import GuardService
from llama_stack_provider_moe.spec.guard_config import GuardConfig


def started(config: GuardConfig) -> SafetyProvider | SafetyService:
    """Return the provider: of the host's safety API, or that API itself.

    Raises:
        InvalidConfig: this machine lacks something that the configuration names; the server does not start.
    """
    with plain_guard_errors(config):
        service = GuardService(config, scorer=None)
    if not host.has_safety():
        return SafetyService(service)
    host_routes.install(service)
    return SafetyProvider(service)
