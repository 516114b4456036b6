"""What stands between the residual stream and the matrices that read or write it: norms, found in one forward pass.

A norm is between two modules if the very memory that one returned is what the other was given. Norms after attention
and after an MLP are the last step before the stream if what they return adds up to what their block adds to it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers

_NORM = "norm"
_ROUNDING = 0.02  # of sums in bf16, as a share of their length


@dataclass
class Structure:
    """What was found; see the fields of the same names in `Provenance`."""

    router_norms: dict[int, str | None] = field(default_factory=dict)
    normed_outputs: list[str] = field(default_factory=list)
    output_norms: dict[str, str] = field(default_factory=dict)


@dataclass
class _Seen:
    """Of one pass of a block.

    Attributes:
        norms, outputs: what norms and other modules returned, by address.
        after: full name of a module whose output goes through a norm -> name of the norm in the block.
        written: what these norms returned.
        stream: what the block was given.
    """

    norms: dict[int, str] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    written: list[Tensor] = field(default_factory=list)
    stream: Tensor | None = None


@contextmanager
def observed(model: nn.Module, layout: ExpertLayout | None) -> Iterator[Structure]:
    """Observe one pass inside the `with`.

    Args:
        model: with or without adapters, in evaluation mode. Every module's output is kept until the end, so the pass
            should be of a few tokens.
        layout: of its experts; None: a dense model.
    """
    path, layers = decoder_layers(model)
    found, kept = Structure(), list[object]()  # what is kept alive can't give its address to another tensor
    handles = []
    for number, layer in enumerate(layers):
        seen = _Seen()
        for name, module in layer.named_modules():
            if not name or name.rpartition(".")[2].startswith("lora_"):
                continue
            is_norm = _NORM in type(module).__name__.lower() and "." not in name
            if is_norm:
                handles.append(module.register_forward_pre_hook(_normed(found, seen, f"{path}.{number}.", name)))
            handles.append(module.register_forward_hook(_output(seen, name, is_norm, kept)))
        if layout is not None and number in layout.moe_layers:
            router = layout.submodule(model, number, layout.router_path)
            handles.append(router.register_forward_pre_hook(_router(found, seen, number)))
        handles.append(layer.register_forward_pre_hook(_given(seen), with_kwargs=True))
        handles.append(layer.register_forward_hook(_added(found, seen, f"{path}.{number}.")))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _address(value: object) -> int | None:
    if isinstance(value, tuple) and value:
        value = value[0]
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


def _output(seen: _Seen, name: str, is_norm: bool, kept: list[object]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        address = _address(output)
        if address is not None:
            (seen.norms if is_norm else seen.outputs).setdefault(address, name)
            kept.append(output)
        if is_norm and isinstance(output, Tensor) and name in seen.after.values():
            seen.written.append(output)

    return hook


def _normed(found: Structure, seen: _Seen, prefix: str, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[object, ...]) -> None:
        address = _address(inputs)
        if address is not None and address in seen.outputs:
            found.normed_outputs.append(prefix + seen.outputs[address])
            seen.after[prefix + seen.outputs[address]] = name

    return hook


def _given(seen: _Seen) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        stream = inputs[0] if inputs else named.get("hidden_states")
        seen.stream = stream if isinstance(stream, Tensor) else None

    return hook


def _added(found: Structure, seen: _Seen, prefix: str) -> Callable[..., None]:
    """Keep the norms of a block if it adds to the stream what they return, and nothing else."""

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        left = output[0] if isinstance(output, tuple) and output else output
        if seen.stream is None or not seen.written or not isinstance(left, Tensor):
            return
        added = left.float() - seen.stream.float()
        rest = added - torch.stack([each.float() for each in seen.written]).sum(dim=0)
        if float(rest.norm()) <= _ROUNDING * float(added.norm()):
            found.output_norms |= {name: prefix + norm for name, norm in seen.after.items()}

    return hook


def _router(found: Structure, seen: _Seen, number: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[object, ...]) -> None:
        address = _address(inputs)
        found.router_norms[number] = None if address is None else seen.norms.get(address)

    return hook
