"""`resources.strategy: ep`: each process reads, keeps and trains its own experts; everything else works as with DDP.

transformers 5.23 has expert parallelism too (`DistributedConfig(ep_size=...)`). This project does not use it:

- Its experts are DTensors, to which PEFT adds no LoRA.
- It also shards all other weights (FSDP2), or needs a plan for tensor parallelism that most families do not have.
- It sends a token once for each of its experts (see `compute.moe.exchange`).

This project does use its way of reading a checkpoint: of a parameter that is a DTensor each process reads only its own
part, also if the file has one tensor for each expert.
"""

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Sharded
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.exchange import Shard
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.model_types import blank_model, class_of
from llama_stack_provider_moe.compute.moe.sharding import ShardedExperts, undividable
from llama_stack_provider_moe.compute.runtime.peers import WAIT_LIMIT, Peers
from llama_stack_provider_moe.errors import ModelError


def require_divisible(config: PreTrainedConfig, processes: int) -> ExpertLayout:
    """The layout of a model, if its experts divide evenly among the processes; this does not read weights.

    Raises:
        ModelError: the model has no experts, or they do not divide evenly.
    """
    with torch.device("meta"):
        model = blank_model(config)
        layout = find_layout(model)
    if layout is None:
        raise ModelError(
            "resources.strategy: 'ep' is not valid for this model: it is dense, without experts; expected 'ddp' or "
            "'fsdp'"
        )
    if (reason := undividable(model, layout)) is not None:
        raise ModelError(
            f"resources.strategy: 'ep' is not valid for {layout.family}: {reason}; expected 'ddp' or 'fsdp'"
        )
    if layout.num_experts % processes:
        fitting = [str(count) for count in range(2, layout.num_experts + 1) if not layout.num_experts % count]
        raise ModelError(
            f"resources.strategy: 'ep' is not valid with {processes} processes: a layer of this model has "
            f"{layout.num_experts} experts; expected a number of processes that divides them: {', '.join(fitting)}"
        )
    return layout


def sharing_class(config: PreTrainedConfig, device: torch.device, processes: int) -> type[PreTrainedModel]:
    """A subclass of the model's class, whose experts are DTensors while transformers reads the weights.

    transformers calls `maybe_distribute_model` after it has created the model on no device and before it reads the
    weights. `with_original_class` gives the loaded model its own class back.
    """
    layout = require_divisible(config, processes)
    known = class_of(config)
    assert known is not None, "it has a layout"
    original: type[PreTrainedModel] = known

    class Sharing(original):
        """Has the name of the original class, because transformers looks up names by it."""

        @classmethod
        def maybe_distribute_model(cls, model: PreTrainedModel, *_: object) -> PreTrainedModel:
            mesh = init_device_mesh(device.type, (processes,))
            for experts in layout.experts(model).values():
                for name in ShardedExperts.names(layout):
                    blank = experts.get_parameter(name)
                    part = distribute_tensor(blank, mesh, [Sharded(0)], src_data_rank=None)
                    experts.register_parameter(name, nn.Parameter(part, requires_grad=blank.requires_grad))
            return model

    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(Sharing, attribute, getattr(original, attribute))
    return Sharing


def with_original_class(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model of a `sharing_class` its own class, and remove from its config how it was read."""
    model.__class__ = type(model).__mro__[1]
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "distributed_config"):
            del config.distributed_config
    return model


def share_experts(model: nn.Module, layout: ExpertLayout, peers: Peers) -> ShardedExperts:
    """Set aside the experts that this process has read, until the model has its adapters (`ShardedExperts.take`)."""
    group = distributed.new_group(timeout=WAIT_LIMIT)
    assert isinstance(group, distributed.ProcessGroup), "every process is in it"
    experts = ShardedExperts(layout, Shard(peers.rank, peers.size, layout.num_experts, group))
    experts.set_aside(model)
    return experts


def clip(model: nn.Module, experts: ShardedExperts, max_norm: float) -> Tensor:
    """Clip gradients to `max_norm`, and return their norm, which includes the experts of all processes."""
    own = {id(each) for _, each in experts.parameters(model)}
    everything = [each for each in model.parameters() if each.grad is not None]
    mine = [each.grad for each in everything if each.grad is not None and id(each) in own]
    shared = [each.grad for each in everything if each.grad is not None and id(each) not in own]
    shared_squared, own_squared = (get_total_norm(each).square().to(everything[0].device) for each in (shared, mine))
    distributed.all_reduce(own_squared, group=experts.shard.group)
    norm = (shared_squared + own_squared).sqrt()
    if max_norm != float("inf"):
        clip_grads_with_norm_(everything, max_norm, norm)
    return norm


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
