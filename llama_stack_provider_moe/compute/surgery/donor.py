"""MLPs of another model, as experts of this one: those of a dense model, or experts of one that has some.

Shapes: I hidden neurons, H width of the residual stream. A gated MLP is gate (I, H), up (I, H) and down (H, I).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import GATE_UP, ExpertLayout, decoder_layers, text_config
from llama_stack_provider_moe.compute.moe.model_types import blank_model
from llama_stack_provider_moe.compute.surgery.resized import Described
from llama_stack_provider_moe.compute.surgery.slices import Files, Reader, files_of, read_whole
from llama_stack_provider_moe.errors import InvalidInput, ModelError


class Mlp(NamedTuple):
    """One gated MLP in fp32; biases None: it has none."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class Donor:
    """A checked model whose MLPs fit.

    Attributes:
        files: of its folder.
        reader: of its experts; None: it is dense.
        path: of its decoder layers.
    """

    files: Files
    reader: Reader | None
    path: str

    def mlp(self, layer: int, expert: int) -> Mlp:
        """An MLP of its layer; `expert` counts only where it has experts.

        Raises:
            ModelError: the files do not have it.
        """
        if self.reader is not None:
            return _of_expert(self.reader, layer, expert)
        start = f"{self.path}.{layer}.mlp"

        def read(name: str) -> Tensor:
            return read_whole(self.files, f"{start}.{name}.weight")

        if f"{start}.{GATE_UP}.weight" in self.files.of_parameter:
            gate, up = read(GATE_UP).chunk(2)
            return Mlp(gate, up, read("down_proj"))
        return Mlp(read("gate_proj"), read("up_proj"), read("down_proj"))


def open_donor(folder: Path, before: Described, count: int, first: int | None, field: str, given: str) -> Donor:
    """Check that a model's MLPs can be experts of `before`; no weight is read.

    Args:
        folder: of the donor.
        before: the model that gets the experts.
        count: number of new experts in each layer.
        first: the donor's first expert to take.
        field: name of the setting that names the donor, in errors.
        given: its value.

    Raises:
        InvalidInput: they do not fit; it says why.
        ModelError: the donor can't be read, or is quantised.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = blank_model(config, torch.bfloat16)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{field}: {folder} can't be read: {' '.join(str(error).split())[:300]}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{field}: the weights of {folder} are quantised; expected the 16-bit model")
    layout, ours = find_layout(model), before.layout
    path, layers = decoder_layers(model)
    reason = _misfit(model, layout, len(layers), before) or _too_few(layout, count, first, ours)
    if reason is None:
        reason = _other_shape(model, layout, path, before)
    if reason is not None:
        raise InvalidInput(field, given, f"a model whose MLPs fit {ours.family}: {reason}")
    reader = None
    if layout is not None:
        start = tuple(layout.path(layer, layout.experts_path) + "." for layer in layout.moe_layers)
        reader = Reader(
            Described(folder, {}, model, layout), {name: 0 for name in model.state_dict() if name.startswith(start)}
        )
    return Donor(files_of(folder, model), reader, path)


def as_part(mlp: Mlp, name: str, layout: ExpertLayout, turns: bool, shape: tuple[int, ...]) -> Tensor:
    """The part of an expert's parameter that the MLP gives, in the form of the family.

    Args:
        mlp: the MLP.
        name: of the parameter below the experts, such as `down_proj_bias`.
        layout: of the model that gets it.
        turns: gate and up take turns on their axis.
        shape: of the part; biases that the MLP lacks are 0.
    """
    if name == layout.down:
        return mlp.down.mT if layout.transposed else mlp.down
    if name == layout.gate_up:
        joined = _joined(mlp.gate, mlp.up, turns)
        return joined.mT if layout.transposed else joined
    if name == f"{layout.gate_up}_bias" and mlp.gate_bias is not None and mlp.up_bias is not None:
        return _joined(mlp.gate_bias, mlp.up_bias, turns)
    if name == f"{layout.down}_bias" and mlp.down_bias is not None:
        return mlp.down_bias
    return torch.zeros(shape)


def _joined(gate: Tensor, up: Tensor, turns: bool) -> Tensor:
    return torch.stack([gate, up], dim=1).flatten(0, 1) if turns else torch.cat([gate, up])


def _of_expert(reader: Reader, layer: int, expert: int) -> Mlp:
    layout = reader.layout
    start = layout.path(layer, layout.experts_path)
    gate_up, down = (reader.part(f"{start}.{name}", expert) for name in (layout.gate_up, layout.down))
    if layout.transposed:
        gate_up, down = gate_up.mT, down.mT
    gate, up = _parted(gate_up, reader.turns)
    if not layout.biased:
        return Mlp(gate, up, down)
    gate_bias, up_bias = _parted(reader.part(f"{start}.{layout.gate_up}_bias", expert), reader.turns)
    return Mlp(gate, up, down, gate_bias, up_bias, reader.part(f"{start}.{layout.down}_bias", expert))


def _parted(joined: Tensor, turns: bool) -> tuple[Tensor, Tensor]:
    gate, up = (joined[0::2], joined[1::2]) if turns else joined.chunk(2)
    return gate, up


def _misfit(model: PreTrainedModel, layout: ExpertLayout | None, layers: int, before: Described) -> str | None:
    """Why its MLPs compute something else than experts of this model would; None: they do not."""
    ours = before.layout
    needed = len(ours.moe_layers) + len(ours.dense_layers)
    if ours.gate_up != GATE_UP or (layout is not None and layout.gate_up != GATE_UP):
        return "an expert without a gate can't be exchanged here"
    if layers != needed:
        return f"it has {layers} layers, expected {needed}"
    if layout is not None and (missing := set(ours.moe_layers) - set(layout.moe_layers)):
        return f"its layer {min(missing)} has no experts"
    acts = [getattr(text_config(each), "hidden_act", None) for each in (model, before.model)]
    own = layout.own_gate if layout is not None else False
    if acts[0] != acts[1] or own != ours.own_gate:
        return f"its activation is {acts[0]}, expected {acts[1]}{', as its family clamps it' if ours.own_gate else ''}"
    if layout is not None and layout.biased and not ours.biased:
        return "its experts have biases, and this model's have none"
    return None


def _too_few(layout: ExpertLayout | None, count: int, first: int | None, ours: ExpertLayout) -> str | None:
    if layout is None:
        return None if first is None else "it is dense, so `mlp_expert` has no effect"
    if (first or 0) + count > layout.num_experts:
        return f"it has experts 0 to {layout.num_experts - 1}, and {count} from {first or 0} on were asked for"
    return None


def _other_shape(model: PreTrainedModel, layout: ExpertLayout | None, path: str, before: Described) -> str | None:
    ours = before.layout
    experts = next(iter(ours.experts(before.model).values()))
    neurons, width = sorted_shape(tuple(experts.get_parameter(ours.down).shape)[1:], ours.transposed)
    if layout is not None:
        theirs = next(iter(layout.experts(model).values()))
        found = sorted_shape(tuple(theirs.get_parameter(layout.down).shape)[1:], layout.transposed)
    else:
        state = model.state_dict()
        names = [f"{path}.{layer}.mlp.down_proj.weight" for layer in ours.moe_layers]
        ups = [f"{path}.{layer}.mlp.{name}.weight" for layer in ours.moe_layers for name in ("gate_proj", GATE_UP)]
        if not all(name in state for name in names) or sum(name in state for name in ups) != len(names):
            return "its layers have no mlp with gate_proj, up_proj and down_proj"
        if any(f"{path}.{ours.moe_layers[0]}.mlp.{name}.bias" in state for name in ("down_proj", "up_proj")):
            return "its MLPs have biases"
        found = sorted_shape(tuple(state[names[0]].shape), False)
    if found != (neurons, width):
        return f"its MLPs have {found[0]} hidden neurons of width {found[1]}, expected {neurons} of {width}"
    return None


def sorted_shape(down: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """(I, H) from the shape of a down projection."""
    one, other = down
    return (one, other) if transposed else (other, one)
