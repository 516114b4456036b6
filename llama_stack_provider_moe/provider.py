"""`get_provider_spec()`: what a host asks of `module: llama_stack_provider_moe` in a run YAML."""

from typing import Any

import llama_stack_provider_moe
from llama_stack_provider_moe.host import compat


def get_provider_spec() -> Any:
    """The spec of `inline::moe`; on a host with its own post-training router, ours takes that one's place."""
    compat.install_router(llama_stack_provider_moe.create_router)
    return compat.InlineProviderSpec(
        api=compat.POST_TRAINING,
        provider_type="inline::moe",
        module="llama_stack_provider_moe",
        config_class="llama_stack_provider_moe.config.ProviderConfig",
        api_dependencies=compat.ROW_APIS,
        pip_packages=["llama-stack-provider-moe"],
        description="SFT and DPO of Mixture-of-Experts models: durable jobs, run in processes of their own.",
    )
