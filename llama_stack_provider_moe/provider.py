"""`get_provider_spec()`, which a host calls for `module: llama_stack_provider_moe` in a run YAML."""

import llama_stack_provider_moe
from llama_stack_provider_moe.control.server import compat


def get_provider_spec() -> object:
    """Return the spec of `inline::moe`; on a host with its own post-training router, replace that router by ours."""
    compat.install_router(llama_stack_provider_moe.create_router)
    return compat.InlineProviderSpec(
        api=compat.POST_TRAINING,
        provider_type="inline::moe",
        module="llama_stack_provider_moe",
        config_class="llama_stack_provider_moe.control.config_check.start.HostConfig",
        api_dependencies=compat.ROW_APIS,
        optional_api_dependencies=[*compat.OPTIONAL_ROW_APIS, compat.Api.models],
        pip_packages=["llama-stack-provider-moe"],
        description="SFT and DPO of Mixture-of-Experts models, as durable jobs in separate processes.",
    )
