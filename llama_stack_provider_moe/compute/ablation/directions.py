"""The direction of each edit: what is removed from a block's writers, and what its router no longer reads.

Writers whose output goes through a norm lose the direction that the norm would turn into the measured one.
"""

import copy

import torch
from torch import Tensor, nn

from llama_stack_provider_moe.compute.ablation.edits import Edits, normed_output
from llama_stack_provider_moe.compute.ablation.measurements import Measurements, Provenance
from llama_stack_provider_moe.compute.ablation.writers import Writer
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
    kept: dict[tuple[int, str | None], Tensor] = {}
    made = {}
    for name, edit in edits.edits.items():
        writer, path = edit.writer, norm_of(edit.writer, found.provenance, edits.layers_path)
        if (writer.layer, path) not in kept:
            unit_H = written_direction(found, plan, edit.layers)
            if path is not None:
                unit_H = through_norm(unit_H, norm_weight(edits, path, writer.kind != "router"), writer)
            kept[writer.layer, path] = unit_H
        made[name] = kept[writer.layer, path]
    return made


def norm_of(writer: Writer, provenance: Provenance, layers_path: str) -> str | None:
    """Full name of the norm that a router reads, or that a writer's output goes through; None: there is none."""
    if writer.kind == "router":
        name = provenance.router_norms[writer.layer]
        assert name is not None, "checked by check_norms"
        return join(layers_path, str(writer.layer), name)
    normed = normed_output(writer, provenance)
    return None if normed is None else provenance.output_norms[normed]


def through_norm(unit_H: Tensor, weight_H: Tensor, writer: Writer, above: str = "") -> Tensor:
    """The direction on the other side of a norm, (H,), of length 1.

    Args:
        unit_H: the direction in the stream.
        weight_H: what the norm multiplies each dimension by.
        writer: the router, or the parameter whose output goes through the norm.
        above: the block that the plan's fields are in, for errors.

    Raises:
        InvalidInput: the norm's weight is 0 along the direction.
    """
    try:
        return read_direction(unit_H, weight_H)
    except NoDirection as error:
        field, given, expected = ("gate_scale", "> 0", "0 for") if writer.kind == "router" else (
            "ablate.layer", str(writer.layer), "another block than")  # fmt: skip
        raise InvalidInput(f"{above}{field}", given, f"{expected} block {writer.layer}: {error}") from None


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


def norm_weight(edits: Edits, path: str, scales: bool) -> Tensor:
    """What a norm multiplies each dimension by, (H,) in fp64, whatever its formula: found by running it.

    Its input is +1 and -1 in turns, which has mean 0 and a root mean square of 1.

    Args:
        edits: the plan, with the model's tensors.
        path: full name of the norm.
        scales: see `response`.

    Raises:
        ModelError: the files lack its weights; or see `response`.
    """
    module: nn.Module = copy.deepcopy(edits.model.get_submodule(path)).to_empty(device="cpu").double()
    entries = {entry.name: entry for entry in edits.entries}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            names = edits.made_of.get(f"{path}.{name}", [])
            if len(names) != 1 or entries[names[0]].shape != tuple(parameter.shape):
                raise ModelError(f"model: the files have no tensor {path}.{name} of shape {tuple(parameter.shape)}")
            parameter.copy_(entries[names[0]].tensor())
    return response(module, path, scales)


def response(norm: nn.Module, path: str, scales: bool) -> Tensor:
    """What a norm in fp64 on the CPU multiplies each dimension by, (H,): see `norm_weight`.

    Args:
        norm: the module.
        path: its full name, for errors.
        scales: it must do nothing else, such as take out the mean over all dimensions, or add a bias.

    Raises:
        ModelError: its weights are not finite, or it does more than it must.
    """
    width = next(norm.parameters()).numel()
    signs = torch.ones(width, dtype=torch.float64)
    signs[1::2] = -1
    with torch.no_grad():
        found: Tensor = (norm(signs) - norm(torch.zeros_like(signs))) * signs
    if not bool(torch.isfinite(found).all()):
        raise ModelError(f"model: the weights of {path} are not finite")
    with torch.no_grad():
        if scales and not torch.allclose(norm(torch.ones_like(signs)), found):
            raise ModelError(f"model: {path} does more than scale each dimension before it adds to the residual stream")
    return found.double()
