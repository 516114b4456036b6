"""`get_provider_spec()`, which a host calls for `module: llama_stack_provider_moe` in a run YAML."""

import llama_stack_provider_moe
from llama_stack_provider_moe.control.server import compat


def get_provider_spec() -> list[object]:
    """Return the specs of this package's providers; a host takes the one of the type that its run YAML names.

    On a host with its own post-training router, that router is replaced by ours.
    """
    return [post_training_spec(), guard_spec()]


def post_training_spec() -> object:
    """Return the spec of `inline::moe`."""
    compat.install_router(llama_stack_provider_moe.create_router)
    return compat.InlineProviderSpec(
        api=compat.POST_TRAINING,
        provider_type="inline::moe",
        module="llama_stack_provider_moe",
        config_class="llama_stack_provider_moe.control.config_check.start.HostConfig",
        api_dependencies=compat.ROW_APIS,
        optional_api_dependencies=compat.OPTIONAL_APIS,
        pip_packages=["llama-stack-provider-moe"],
        description="SFT and DPO of Mixture-of-Experts models, as durable jobs in separate processes.",
    )


def guard_spec() -> object:
    """Return the spec of `inline::moe-guard`."""
    return compat.InlineProviderSpec(
        api=compat.Api.add("safety"),  # idempotent; OGX's enum lacks it
        provider_type="inline::moe-guard",
        module="llama_stack_provider_moe.guard",
        config_class="llama_stack_provider_moe.control.config_check.guard_start.HostGuardConfig",
        api_dependencies=[],
        pip_packages=["llama-stack-provider-moe"],
        description="Shields: rules for tool calls, probes on hidden states, and what their scores add up to.",
    )
