"""Take measured directions out of what a model computes, inside a `with`: its weights stay, and nothing is written.

Every module that writes into the residual stream returns y - s r (r^T y), and every router of an edited block gets
x - c q (q^T x); q stands for r where a norm follows. The logits are those of the edited weights with
`norm_preserving: off` (`compute.methods.ablation`).

Shapes: H width of the residual stream; `..` any axes before it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.ablation.directions import norm_of, response, through_norm, written_direction
from llama_stack_provider_moe.compute.ablation.edits import check_blocks, check_norms
from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint, sha256
from llama_stack_provider_moe.compute.ablation.measurements import Measurements, Provenance
from llama_stack_provider_moe.compute.ablation.writers import Writer, find_writers
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.described import described_model
from llama_stack_provider_moe.compute.moe.layout import decoder_layers, text_config, without_adapters
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.spec.ablation import AblatedLayers, StreamEdit

_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Removal:
    """Directions that can be taken out of one model.

    Attributes:
        plan: what to take out, and where.
        found: the measurements.
        layers_path: path of the model's decoder blocks.
        writers: the parameters that the plan edits; their modules get the hooks.
        above: the block that the plan's fields are in, such as `eval.ablated.`, for errors.
    """

    plan: StreamEdit
    found: Measurements
    layers_path: str
    writers: list[Writer]
    above: str

    @contextmanager
    def taken_out(self, model: nn.Module) -> Iterator[None]:
        """Take them out of passes inside the `with`.

        Args:
            model: the model of `removal`, with or without adapters. What adapters write loses the directions too.

        Raises:
            InvalidInput: a router's norm has weight 0 along the direction.
            ModelError: inside, the model computed with some of the modules and not with others.
        """
        whole, edits = without_adapters(model), self.plan.edits()
        called: dict[str, int] = {}
        handles = []
        try:
            for writer in {each.module: each for each in self.writers}.values():
                called[writer.module] = 0
                entry = edits[writer.layer]
                unit_H = self._direction(whole, writer, entry).float()
                module = whole.get_submodule(writer.module)
                if writer.kind == "router":
                    hook = _reads_without(unit_H, self.plan.gate_scale * entry.scale, writer.module, called)
                    handles.append(module.register_forward_pre_hook(hook))
                else:
                    hook = _writes_without(unit_H, entry.scale, writer.module, called)
                    handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
        silent = [name for name, times in called.items() if not times]
        if silent and len(silent) < len(called):
            raise ModelError(f"model: it computes without calling {silent[0]}, so a direction can't be taken out there")

    def _direction(self, whole: nn.Module, writer: Writer, entry: AblatedLayers) -> Tensor:
        unit_H = written_direction(self.found, self.plan, entry, self.above)
        path = norm_of(writer, self.found.provenance, self.layers_path)
        if path is None:
            return unit_H
        norm = copy.deepcopy(whole.get_submodule(path)).to(device="cpu", dtype=torch.float64)
        return through_norm(unit_H, response(norm, path, writer.kind != "router"), writer, self.above)


def removal(model: nn.Module, plan: StreamEdit, found: Measurements, above: str = "") -> Removal:
    """Find what a plan takes out of a model.

    Args:
        model: with or without adapters, quantised or not.
        plan: what to take out, and where.
        found: measurements of the same model (see `require_same_model`).
        above: the block that the plan's fields are in, such as `eval.ablated.`, for errors.

    Raises:
        InvalidInput: the plan or the measurements don't fit the model, or give no direction.
        ModelError, LayoutError: the model is not understood, or its writers can't be edited.
    """
    # Modules of the model in memory may be wrapped by adapters or quantised; those of its config are not.
    blank = described_model(without_adapters(model))
    layout, (layers_path, layers) = find_layout(blank), decoder_layers(blank)
    check_blocks(plan, layout, found.provenance, len(layers), int(text_config(blank).hidden_size), above)
    writers = list(_edited(find_writers(blank, layout), plan, plan.edits()))
    check_norms(writers, found.provenance, above)
    made = Removal(plan, found, layers_path, writers, above)
    with made.taken_out(model):  # every direction is made here once, before a long step begins
        pass
    return made


def require_same_model(provenance: Provenance, model: str, adapter: Path | None, field: str) -> None:
    """Check that measurements are of a model, or of that model with its adapter.

    Args:
        provenance: of the measurements.
        model: its folder or hub id.
        adapter: folder of the adapter that it has, or starts with; None: it has none.
        field: the name of the setting that names the measurements, for errors.

    Raises:
        InvalidInput: they are of another model, or of the model with another adapter.
        ModelError: the model's files can't be read.
    """
    here = fingerprint(model_folder(model, "model"))
    if provenance.fingerprint != here:
        raise InvalidInput(field, provenance.fingerprint[:12], f"measurements of this model, whose fingerprint is "
                           f"{here[:12]}; measure it again")  # fmt: skip
    if provenance.adapter is None:
        return
    own = None if adapter is None else sha256(adapter / _ADAPTER_WEIGHTS)
    if provenance.adapter != own:
        raise InvalidInput(field, f"of a model with adapter {provenance.adapter[:12]}", "measurements of the model "
                           f"without an adapter, or with {'the one that it has' if own else 'none'}")  # fmt: skip


def _edited(writers: Iterable[Writer], plan: StreamEdit, wanted: dict[int, AblatedLayers]) -> Iterator[Writer]:
    for writer in writers:
        off = {"router": not plan.gate_scale, "experts": not plan.ablate_individual_experts}
        if writer.layer in wanted and not off.get(writer.kind, False):
            yield writer


def _without(states: Tensor, unit_H: Tensor, scale: float) -> Tensor:
    """(.., H) without the share `scale` of its part along a direction, computed in fp32."""
    unit_H = unit_H.to(states.device)
    exact = states.float()
    made: Tensor = (exact - scale * (exact @ unit_H)[..., None] * unit_H).to(states.dtype)
    return made


def _writes_without(unit_H: Tensor, scale: float, name: str, called: dict[str, int]) -> Callable[..., object]:
    def hook(module: nn.Module, inputs: object, output: object) -> object:
        called[name] += 1
        written, more = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if not isinstance(written, Tensor) or written.shape[-1] != len(unit_H):
            raise ModelError(f"model: {name} does not return a tensor that is {len(unit_H)} wide")
        left = _without(written, unit_H, scale)
        return left if more is None else (left, *more)

    return hook


def _reads_without(unit_H: Tensor, scale: float, name: str, called: dict[str, int]) -> Callable[..., object]:
    def hook(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        called[name] += 1
        if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].shape[-1] != len(unit_H):
            raise ModelError(f"model: {name} is not given a tensor that is {len(unit_H)} wide")
        return (_without(inputs[0], unit_H, scale), *inputs[1:])

    return hook
