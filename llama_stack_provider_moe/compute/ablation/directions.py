"""The direction of each edit: what is removed from a block's writers, and what its router no longer reads."""

import copy

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.ablation.edits import Edit, Edits
from llama_stack_provider_moe.compute.ablation.measurements import Measurements
from llama_stack_provider_moe.compute.methods.ablation import NoDirection, direction, read_direction
from llama_stack_provider_moe.compute.moe.layout import join
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.spec.ablation import AblatedLayers, AblationPlan, StreamEdit


def directions(found: Measurements, plan: AblationPlan, edits: Edits) -> dict[str, Tensor]:
    """Name of an edited tensor -> its unit direction, (H,) in fp64; tensors of a block share theirs.

    Raises:
        InvalidInput: the measurements give no direction.
        ModelError: a norm's weights can't be read.
    """
    written: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}
    made = {}
    for name, edit in edits.edits.items():
        layer = edit.writer.layer
        if layer not in written:
            written[layer] = written_direction(found, plan, edit.layers)
        if edit.writer.kind == "router" and layer not in read:
            read[layer] = _read(found, edits, edit, written[layer])
        made[name] = (read if edit.writer.kind == "router" else written)[layer]
    return made


def written_direction(found: Measurements, plan: StreamEdit, entry: AblatedLayers, above: str = "") -> Tensor:
    """The direction that a block's writers lose, (H,) in fp64, of length 1.

    Args:
        found: the measurements.
        plan: names the kind of direction.
        entry: of one block.
        above: the block that the plan's fields are in, for errors.

    Raises:
        InvalidInput: the measurements give no direction.
    """
    target_LH, baseline_LH = found.target.mean_LH, found.baseline.mean_LH
    at, layer = entry.measurement, int(entry.layer)
    try:
        return direction(target_LH[at], baseline_LH[at], plan.direction, baseline_LH[layer], entry.sparsity)
    except NoDirection as error:
        raise InvalidInput(f"{above}ablate.measurement", at, f"a block after which the sets differ: {error}") from None


def _read(found: Measurements, edits: Edits, edit: Edit, unit_H: Tensor) -> Tensor:
    layer = edit.writer.layer
    name = found.provenance.router_norms[layer]
    assert name is not None, "checked with the plan"
    try:
        return read_direction(unit_H, norm_weight(edits, join(edits.layers_path, str(layer), name)))
    except NoDirection as error:
        raise InvalidInput("gate_scale", "> 0", f"0 for block {layer}: {error}") from None


def norm_weight(edits: Edits, path: str) -> Tensor:
    """What a norm multiplies each dimension by, (H,) in fp64, whatever its formula: found by running it.

    Its input is +1 and -1 in turns, which has mean 0 and a root mean square of 1.

    Args:
        edits: the plan, with the model's tensors.
        path: full name of the norm.

    Raises:
        ModelError: the files lack its weights.
    """
    module: nn.Module = copy.deepcopy(edits.model.get_submodule(path)).to_empty(device="cpu").double()
    entries = {entry.name: entry for entry in edits.entries}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            names = edits.made_of.get(f"{path}.{name}", [])
            if len(names) != 1 or entries[names[0]].shape != tuple(parameter.shape):
                raise ModelError(f"model: the files have no tensor {path}.{name} of shape {tuple(parameter.shape)}")
            parameter.copy_(entries[names[0]].tensor())
    return response(module, path)


def response(norm: nn.Module, path: str) -> Tensor:
    """What a norm in fp64 on the CPU multiplies each dimension by, (H,): see `norm_weight`.

    Raises:
        ModelError: its weights are not finite.
    """
    width = next(norm.parameters()).numel()
    signs = torch.ones(width, dtype=torch.float64)
    signs[1::2] = -1
    with torch.no_grad():
        found: Tensor = (norm(signs) - norm(torch.zeros_like(signs))) * signs
    if not bool(torch.isfinite(found).all()):
        raise ModelError(f"model: the weights of {path} are not finite")
    return found.double()
