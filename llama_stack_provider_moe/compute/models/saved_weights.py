"""Restore a checkpoint's weights into a model.

Transformers 5.23 matches a checkpoint's tensors to the model by their names on disk. For most experts the names in
memory differ, and transformers only logs a name that does not match: such a run would resume with untrained experts.
"""

from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.distributed.expert_parallel import local
from llama_stack_provider_moe.compute.distributed.full_state import reshard
from llama_stack_provider_moe.compute.distributed.sharded_checkpoint import is_sharded, read_weights
from llama_stack_provider_moe.compute.models.loader import load_checkpoint_like, load_held
from llama_stack_provider_moe.compute.moe.saved_names import names_in_file
from llama_stack_provider_moe.compute.moe.sharding import ShardedExperts
from llama_stack_provider_moe.errors import CheckpointError

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def restore_weights(model: PreTrainedModel | PeftModel, folder: Path, experts: ShardedExperts | None = None) -> None:
    """Restore the weights of a checkpoint, an adapter's or all, into `model`; every tensor must match.

    Args:
        experts: the experts that processes share; the checkpoint has all experts, and a process takes its own.

    Raises:
        CheckpointError: a name or a shape differs between the checkpoint and the model.
    """
    if isinstance(model, PeftModel):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        if experts is not None:
            names = names_in_file(model)
            own = {name: tensors[in_file] for name, in_file in names.items() if in_file in tensors}
            tensors = {names[name]: part for name, part in experts.parts(own).items()}
        expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        before = {name: parameter._version for name, parameter in model.named_parameters() if name in expected}
        outcome = set_peft_model_state_dict(model, tensors)
        after = {name: parameter._version for name, parameter in model.named_parameters() if name in expected}
        untouched = sorted(name for name in expected if after[name] == before[name])
        if outcome.unexpected_keys or untouched:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} belongs to another adapter: {len(outcome.unexpected_keys)} tensors match "
                f"no weight ({', '.join(outcome.unexpected_keys[:3])}), {len(untouched)} weights have no tensor "
                f"({', '.join(untouched[:3])})"
            )
        return
    if is_sharded(folder):
        read_weights(model, folder)
        return
    reshard(model)
    if experts is None:
        source = load_checkpoint_like(folder, model)
        weights = dict(source.named_parameters())
    else:
        config = type(model.config).from_pretrained(folder)
        source = load_held(str(folder), config, model.dtype, model.device, experts.shard.size)
        weights = {name: local(parameter) for name, parameter in source.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                raise CheckpointError(f"{folder} has no tensor for {name} {tuple(parameter.shape)}")
            parameter.copy_(weights[name])
