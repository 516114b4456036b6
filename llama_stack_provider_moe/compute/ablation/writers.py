"""Which parameters of a model write into the residual stream, and which of its routers read it, by decoder block.

A linear layer writes if its name says so. One whose name is not known, and that has the width of the residual stream,
is an error: leaving a writer out would leave the direction in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers, join, text_config
from llama_stack_provider_moe.errors import LayoutError

Kind = Literal["attention", "dense", "shared", "experts", "router"]

# Attention, linear attention, Mamba and convolutions; then MLPs. `output_linear` is Granite's, `w2` older families'.
_WRITES = frozenset({"o_proj", "out_proj", "o_b_proj", "down_proj", "output_linear", "w2", "fc2"})
_READS = frozenset({
    "q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "kv_proj",
    "o_a_proj", "g_proj", "gate", "gate_proj", "up_proj", "gate_up_proj", "input_linear", "w1", "w3", "fc1", "in_proj",
    "in_proj_qkvz", "in_proj_qkv", "in_proj_ba", "in_proj_z", "in_proj_a", "in_proj_b", "x_proj", "dt_proj",
    "shared_expert_gate", "router",
})  # fmt: skip
_MLPS = ("mlp", "feed_forward", "shared_mlp", "mlps")


@dataclass(frozen=True)
class Writer:
    """A parameter to edit.

    Attributes:
        parameter: full name in memory.
        module: full name of the module that computes with it.
        layer: decoder block.
        kind: what it belongs to; a router reads, all others write.
        columns: a matrix in memory writes by its columns, (.., I, H), not by its rows.
        bias: it is a bias: what it writes is its last axis.
    """

    parameter: str
    module: str
    layer: int
    kind: Kind
    columns: bool = False
    bias: bool = False


def find_writers(model: PreTrainedModel, layout: ExpertLayout | None) -> list[Writer]:
    """Every writer and router of a model, which may be on the meta device.

    Raises:
        LayoutError: a linear layer is not understood, or a block writes nothing.
    """
    path, layers = decoder_layers(model)
    width = int(text_config(model).hidden_size)
    found: list[Writer] = []
    for number, layer in enumerate(layers):
        here = [*_linear(model, layout, layer, join(path, str(number)), number, width), *_routed(model, layout, number)]
        if not any(each.kind != "router" for each in here):
            raise LayoutError(f"{text_config(model).model_type}: nothing in decoder block {number} writes into the "
                              "residual stream, as far as names tell")  # fmt: skip
        found += here
    _require_own(model, found)
    return found


def _linear(
    model: PreTrainedModel, layout: ExpertLayout | None, layer: nn.Module, path: str, number: int, width: int
) -> Iterator[Writer]:
    experts = None if layout is None or number not in layout.moe_layers else layout.experts_path
    for below, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or (experts is not None and below.startswith(f"{experts}.")):
            continue
        leaf, name = below.rpartition(".")[2], join(path, below)
        if leaf not in _WRITES:
            if module.out_features == width and leaf not in _READS:
                raise LayoutError(f"{text_config(model).model_type}: {name} is as wide as the residual stream, and "
                                  "its name does not tell whether it writes into it")  # fmt: skip
            continue
        if module.out_features != width:
            raise LayoutError(f"{text_config(model).model_type}: {name} writes {module.out_features} numbers, expected "
                              f"{width}, the width of the residual stream")  # fmt: skip
        kind = _kind(layout, number, below, name)
        yield Writer(f"{name}.weight", name, number, kind)
        if module.bias is not None:
            yield Writer(f"{name}.bias", name, number, kind, bias=True)


def _kind(layout: ExpertLayout | None, number: int, below: str, name: str) -> Kind:
    shared = layout.shared_path if layout is not None and number in layout.moe_layers else None
    if shared is not None and below.startswith(f"{shared}."):
        return "shared"
    dense = layout is not None and any(name.startswith(f"{path}.") for path in layout.dense_mlps)
    return "dense" if dense or any(part in _MLPS for part in below.split(".")) else "attention"


def _routed(model: PreTrainedModel, layout: ExpertLayout | None, number: int) -> Iterator[Writer]:
    """The routed experts and the router of a block."""
    if layout is None or number not in layout.moe_layers:
        return
    experts = layout.path(number, layout.experts_path)
    module = layout.experts(model)[number]
    if getattr(module, "has_post_expert_norm", False):
        raise LayoutError(f"{layout.model_type}: {experts} has a norm after its down projections, so what they write "
                          "can't be edited in them")  # fmt: skip
    yield Writer(f"{experts}.{layout.down}", experts, number, "experts", columns=layout.transposed)
    if layout.biased:
        yield Writer(f"{experts}.{layout.down}_bias", experts, number, "experts", bias=True)
    if number not in layout.by_token_layers:
        router = layout.path(number, layout.router_path)
        yield Writer(f"{router}.{layout.router_weight}", router, number, "router")


def _require_own(model: PreTrainedModel, found: list[Writer]) -> None:
    """Check that no parameter has two places: an edit for one block would edit the other too."""
    names: dict[int, str] = {}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for each in found:
        other = names.setdefault(id(by_name[each.parameter]), each.parameter)
        if other != each.parameter:
            raise LayoutError(f"{text_config(model).model_type}: {each.parameter} and {other} are one parameter, so "
                              "one block can't be edited alone")  # fmt: skip
