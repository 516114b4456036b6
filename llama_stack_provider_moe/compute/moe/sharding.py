"""Sharding of a model's experts: each process holds some experts of every layer, and can gather all of them.

Until adapters are added, the model looks whole: `set_aside` replaces its experts by placeholders with the full shapes
(`placeholder`, which takes no memory). So all processes draw LoRA for all experts exactly as one process would, and
every count and check is for the whole model. `take` then leaves each process with its own part of both.

Experts are the first axis of their weights and biases, and of LoRA's A, (E*r, in) with rows e*r + k; in LoRA's B,
(out, r*E) with columns k*E + e, they are the innermost axis (peft 0.21).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llama_stack_provider_moe.compute.moe.exchange import Shard, keep_shard, shard_of
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, without_adapters
from llama_stack_provider_moe.compute.moe.quantize import placeholder
from llama_stack_provider_moe.compute.moe.rates import Rates
from llama_stack_provider_moe.errors import ModelError

_LORA_A, _LORA_B = re.compile(r"\.lora_A\."), re.compile(r"\.lora_B\.")


@dataclass
class ShardedExperts:
    """The sharded experts of one model and of models built like it (a reference).

    Attributes:
        layout: layout of the whole model.
        shard: the part of each layer that this process holds.
        aside: while the model looks whole: (layer, name) -> this process's part of an expert parameter.
    """

    layout: ExpertLayout
    shard: Shard
    aside: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def set_aside(self, model: nn.Module, keep: Callable[[Tensor], Tensor] | None = None) -> None:
        """Replace the experts of `model` by placeholders.

        Args:
            model: its experts are sharded already, unless `keep` is given.
            keep: takes a whole parameter, returns this process's part.

        Raises:
            ModelError: a parameter is not sharded as expected.
        """
        for layer, experts in self.layout.experts(model).items():
            for name, weight in self._weights(experts):
                own = self._own(layer, name, weight) if keep is None else keep(weight.detach())
                self.aside[layer, name] = own
                whole = torch.empty((), dtype=own.dtype, device=own.device).expand(self._whole_shape(own))
                setattr(experts, name, placeholder(whole))

    def take(self, model: nn.Module, rates: Rates) -> None:
        """Leave this process with its own experts and their LoRA, with gradients of a mean over processes.

        An expert gets tokens from every process, and each process multiplies its loss by their number, as averaged
        gradients require. Gradients of experts are not averaged, so a hook divides by that number.

        Args:
            model: a model from `set_aside`, with its adapters.
            rates: rates of the adapter's weights; rates within a weight are cut like the weight.
        """
        for layer, experts in self.layout.experts(model).items():
            for name, weight in self._weights(experts):
                own = nn.Parameter(self.aside.pop((layer, name)), requires_grad=weight.requires_grad)
                setattr(experts, name, own)
            keep_shard(experts, self.shard)
        for name, parameter in self.parameters(model):
            if _LORA_A.search(name) or _LORA_B.search(name):
                parameter.data = self.part(name, parameter.data).clone()
                if parameter in rates.within:
                    rates.within[parameter] = self.part(name, rates.within[parameter]).clone()
            if parameter.requires_grad:
                parameter.register_hook(self._as_a_mean)  # type: ignore[no-untyped-call]
        bare = {id(experts) for experts in self.layout.experts(model).values()}
        for module in model.modules():
            if isinstance(module, ParamWrapper) and id(module.get_base_layer()) in bare:
                module.num_experts = self.shard.experts_each
        self._check(model)
        # DDP would make rank 0's experts those of all.
        names = [name for name, _ in self.parameters(model)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]

    def _as_a_mean(self, gradient: Tensor) -> Tensor:
        return gradient / self.shard.size

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are sharded."""
        return ((name, each) for name, each in model.named_parameters() if self.covers(name))

    def alone(self, model: nn.Module) -> bool:
        """Whether only experts train, so that there is nothing to average."""
        return all(self.covers(name) for name, each in model.named_parameters() if each.requires_grad)

    def covers(self, name: str) -> bool:
        """Whether a parameter, or a tensor of a saved adapter, belongs to experts, by its name."""
        below = re.search(rf"(?:^|\.){re.escape(self.layout.layers_path)}\.(\d+)\.(.*)", name)
        if below is None or int(below[1]) not in self.layout.moe_layers:
            return False
        if not below[2].startswith(f"{self.layout.experts_path}."):
            return False
        leaf = name.rpartition(".")[2]
        return leaf in self.names(self.layout) or bool(_LORA_A.search(name) or _LORA_B.search(name))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a tensor with all experts; `name` is the name of its parameter."""
        count, first, held = self.shard.num_experts, self.shard.first, self.shard.experts_each
        if _LORA_B.search(name):
            return whole.view(whole.shape[0], -1, count)[:, :, first : first + held].flatten(1)
        each = whole.shape[0] // count
        return whole[first * each : (first + held) * each]

    def gathered(self, name: str, part: Tensor) -> Tensor | None:
        """The tensor with all experts from the parts of all processes: on rank 0, on the CPU; None on other ranks."""
        part = part.detach().contiguous()
        leads = self.shard.rank == 0
        parts = [torch.empty_like(part) for _ in range(self.shard.size)] if leads else None
        distributed.gather(part, parts, dst=0, group=self.shard.group)
        if parts is None:
            return None
        if _LORA_B.search(name):
            by_expert = [each.view(each.shape[0], -1, self.shard.experts_each) for each in parts]
            return torch.cat(by_expert, dim=2).flatten(1).cpu()
        return torch.cat(parts).cpu()

    def whole_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict with all experts, on rank 0; empty on other ranks. All processes must call it.

        Tensors are gathered one by one, so a device holds at most one whole tensor beside its own part.
        """
        base = "lora_" if any("lora_" in name for name, _ in model.named_parameters()) else ""
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if base and base not in name:  # an adapted model saves only its adapter
                continue
            found = self.gathered(name, tensor) if self.covers(name) else tensor
            if found is not None and self.shard.rank == 0:
                state[name] = found
        return state

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A saved adapter's tensors, with this process's part of the expert tensors."""
        return {name: self.part(name, each).contiguous() if self.covers(name) else each
                for name, each in tensors.items()}  # fmt: skip

    def text(self, model: nn.Module) -> str:
        """What this process holds, for the start of a job's log."""
        own = sum(each.numel() * each.element_size() for _, each in self.parameters(model))
        total = sum(each.numel() * each.element_size() for each in model.parameters())
        return (
            f"each of {self.shard.size} processes holds {self.shard.experts_each} of {self.shard.num_experts} experts "
            f"per layer; {own / 2**20:,.1f} of its {total / 2**20:,.1f} MiB of weights are its own experts"
        )

    @staticmethod
    def names(layout: ExpertLayout) -> tuple[str, ...]:
        """Names of the parameters of an experts module that have an experts axis."""
        weights = (layout.gate_up, layout.down)
        return (*weights, *(f"{name}_bias" for name in weights)) if layout.biased else weights

    def _weights(self, experts: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, experts.get_parameter(name)) for name in self.names(self.layout))

    def _whole_shape(self, own: Tensor) -> tuple[int, ...]:
        return (self.shard.num_experts, *own.shape[1:])

    def _own(self, layer: int, name: str, weight: Tensor) -> Tensor:
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        if not isinstance(weight, DTensor) or own.shape[0] != self.shard.experts_each:
            raise ModelError(
                f"resources.strategy: ep: {self.layout.path(layer, f'{self.layout.experts_path}.{name}')} has "
                f"{own.shape[0]} experts here, expected {self.shard.experts_each} of {self.shard.num_experts}"
            )
        return own.detach().clone(memory_format=torch.contiguous_format)

    def _check(self, model: nn.Module) -> None:
        """Check that this process has its part of every expert parameter, and nothing is left aside."""
        held = self.shard.experts_each
        wrong = [f"{name} {tuple(each.shape)}" for name, each in self.parameters(model)
                 if each.shape[_LORA_B.search(name) is not None] % held or each.isnan().all()]  # fmt: skip
        wrong += [f"{layer}.{name}" for layer, experts in self.layout.experts(model).items()
                  for name, weight in self._weights(experts) if weight.shape[0] != held]  # fmt: skip
        assert not wrong, f"this process does not hold exactly its part of {wrong}"
        assert not self.aside, f"not taken: {sorted(self.aside)}"


def undividable(model: nn.Module, layout: ExpertLayout) -> str | None:
    """Why processes can't divide the experts of `model`, whatever their number; None where they can."""
    experts = next(iter(layout.experts(model).values()))
    for name in ShardedExperts.names(layout):
        rows = experts.get_parameter(name).shape[0]
        if rows != layout.num_experts:
            return (
                f"{name} of {layout.experts_class} is a stack of {rows} matrices for {layout.num_experts} experts: it "
                "also has some for the choices that compute nothing"
            )
    return None


def pieces(model: nn.Module, layout: ExpertLayout | None) -> int:
    """The number of processes that share the experts of `model`; 1 if this one holds them all."""
    if layout is None:
        return 1
    shard = shard_of(next(iter(layout.experts(without_adapters(model)).values())))
    return 1 if shard is None else shard.size
