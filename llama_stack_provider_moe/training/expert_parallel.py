"""`resources.strategy: ep`: each process reads, holds and trains its own experts; all else is as under DDP.

transformers 5.23 has expert parallelism too (`DistributedConfig(ep_size=...)`), and it is not used here: its experts
are DTensors, on which PEFT puts no LoRA; it shares out all other weights as well (FSDP2), or wants a plan of tensor
parallelism that most families lack; and it sends a token as often as it has experts (see `experts.exchange`). Its way
of reading a checkpoint is used: of a parameter that is a DTensor each process reads its own part, also where a file has
one tensor an expert.
"""

from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Sharded
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.experts.exchange import Shard
from llama_stack_provider_moe.experts.layout import ExpertLayout, find_layout
from llama_stack_provider_moe.experts.sharding import ShardedExperts
from llama_stack_provider_moe.training.peers import WAIT_LIMIT, Peers


def require_divisible(config: PreTrainedConfig, processes: int) -> ExpertLayout:
    """The layout of a model whose experts so many processes can hold; its weights are not read for that.

    Raises:
        ModelError: it has no experts, or the processes can't have equally many.
    """
    with torch.device("meta"):
        layout = find_layout(AutoModelForCausalLM.from_config(config))
    if layout is None:
        raise ModelError("resources.strategy: 'ep' is not valid for this model: it is dense, without experts")
    if layout.num_experts % processes:
        fitting = [str(count) for count in range(2, layout.num_experts + 1) if not layout.num_experts % count]
        raise ModelError(
            f"resources.strategy: 'ep' is not valid with {processes} processes: a layer of this model has "
            f"{layout.num_experts} experts; expected as many processes as divide them: {', '.join(fitting)}"
        )
    return layout


def sharing_class(config: PreTrainedConfig, device: torch.device, processes: int) -> type[PreTrainedModel]:
    """The model's class, but that its experts are placeholders of a part each when its weights are read.

    `maybe_distribute_model` is where transformers lets a model be shared out, between its making, on no device, and its
    loading. What is loaded is of the class itself again (`as_made`).
    """
    layout = require_divisible(config, processes)
    known = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
    made: type[PreTrainedModel] = known[0] if isinstance(known, tuple) else known

    class Sharing(made):
        """Told to transformers as the class itself, which it looks up names by."""

        @classmethod
        def maybe_distribute_model(cls, model: Any, *_: Any) -> Any:
            mesh = init_device_mesh(device.type, (processes,))
            for experts in layout.experts(model).values():
                for name in ShardedExperts.names(layout):
                    blank = experts.get_parameter(name)
                    part = distribute_tensor(blank, mesh, [Sharded(0)], src_data_rank=None)
                    experts.register_parameter(name, nn.Parameter(part, requires_grad=blank.requires_grad))
            return model

    Sharing.__name__, Sharing.__qualname__, Sharing.__module__ = made.__name__, made.__qualname__, made.__module__
    return Sharing


def as_made(model: PreTrainedModel) -> PreTrainedModel:
    """Of the class that it was meant to be of, and without a word in its config of how it was read."""
    model.__class__ = type(model).__mro__[1]
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "distributed_config"):
            del config.distributed_config
    return model


def share_experts(model: nn.Module, layout: ExpertLayout, peers: Peers) -> ShardedExperts:
    """Put the experts that this process has read aside, until adapters are on the model (`ShardedExperts.take`)."""
    group = distributed.new_group(timeout=WAIT_LIMIT)
    assert isinstance(group, distributed.ProcessGroup), "every process is in it"
    experts = ShardedExperts(layout, Shard(peers.rank, peers.size, layout.num_experts, group))
    experts.set_aside(model)
    return experts


def clip(model: nn.Module, experts: ShardedExperts, max_norm: float) -> Tensor:
    """The norm of all gradients, all processes' experts among them; where it is above `max_norm` they are scaled."""
    own = {id(each) for _, each in experts.parameters(model)}
    everything = [each for each in model.parameters() if each.grad is not None]
    mine = [each.grad for each in everything if each.grad is not None and id(each) in own]
    shared = [each.grad for each in everything if each.grad is not None and id(each) not in own]
    alike, apart = (get_total_norm(each).square().to(everything[0].device) for each in (shared, mine))
    distributed.all_reduce(apart, group=experts.shard.group)
    norm = (alike + apart).sqrt()
    if max_norm != float("inf"):
        clip_grads_with_norm_(everything, max_norm, norm)
    return norm


def local(parameter: Tensor) -> Tensor:
    """What this process has of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
