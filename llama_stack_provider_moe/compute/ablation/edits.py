"""The plan of an ablation on a model's folder: for each tensor on disk its edit, or why it has none.

Only the config and the headers of the files are read. Every mistake that can be known is an error here, before anything
is written.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from llama_stack_provider_moe.compute.ablation.measurements import Provenance
from llama_stack_provider_moe.compute.ablation.writers import Writer, find_writers
from llama_stack_provider_moe.compute.export.places import TensorPlace, find_places
from llama_stack_provider_moe.compute.export.plan import check_tiling
from llama_stack_provider_moe.compute.export.tensors import INDEX, SINGLE, TensorEntry, read_model
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers, text_config
from llama_stack_provider_moe.compute.moe.lora_ranks import of_another_model
from llama_stack_provider_moe.compute.moe.model_types import blank_model
from llama_stack_provider_moe.errors import InvalidInput, ModelError, shorten
from llama_stack_provider_moe.spec.ablation import AblatedLayers, AblationPlan, StreamEdit
from llama_stack_provider_moe.spec.blocks import ranges

EDITED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NOT_A_WRITER = "does not write into the residual stream"
EMBEDDING = "is the embedding, which no entry edits"
OTHER_BLOCK = "is in a block that the plan does not name"
EXPERTS_OFF = "belongs to routed experts, and ablate_individual_experts is false"
OTHER_EXPERT = "belongs to an expert that the plan does not name"
GATE_OFF = "belongs to a router, and gate_scale is 0"
NOT_OF_MODEL = "is not a part of the model by its config"


@dataclass(frozen=True)
class Edit:
    """The edit of one tensor on disk.

    Attributes:
        entry: the tensor.
        place: its place in memory.
        writer: the parameter that it is, or is a piece of.
        layers: the plan's entry for the block.
        columns: a matrix on disk writes by its columns.
        experts: of a stack of experts, those to edit; None: all.
    """

    entry: TensorEntry
    place: TensorPlace
    writer: Writer
    layers: AblatedLayers
    columns: bool
    experts: frozenset[int] | None


@dataclass(frozen=True)
class Edits:
    """The plan on a model's folder.

    Attributes:
        model: the model without weights.
        layers_path: path of its decoder blocks.
        entries: every tensor, in the order of files and of their bytes.
        made_of: parameter in memory -> its tensors on disk.
        edits: name of a tensor -> its edit.
        skipped: reason -> names of the tensors without an edit.
    """

    model: PreTrainedModel
    layers_path: str
    entries: list[TensorEntry]
    made_of: Mapping[str, list[str]]
    edits: dict[str, Edit]
    skipped: dict[str, list[str]]


def plan_edits(folder: Path, plan: AblationPlan, provenance: Provenance) -> Edits:
    """Find the edit of every tensor.

    Args:
        folder: of the model; with its config alone, the tensors are the parameters that it describes, in bf16.
        plan: what to edit.
        provenance: of the measurements.

    Raises:
        ModelError: the model can't be read, is quantised, or lacks a tensor that the plan edits.
        LayoutError: the model is not understood.
        InvalidInput: the plan does not fit the model or the measurements.
    """
    assert plan.from_analysis is None, "the server, or the command, has put the experts into the plan"
    model = _blank(folder)
    if provenance.adapter is not None:
        raise InvalidInput("measurements", "of a model with an adapter", "measurements of the model that is edited; "
                           "merge the adapter, and measure the merged model")  # fmt: skip
    layout, (layers_path, layers) = find_layout(model), decoder_layers(model)
    wanted = plan.edits()
    check_blocks(plan, layout, provenance, len(layers), int(text_config(model).hidden_size))
    if layout is not None:
        _check_experts(plan, layout, wanted)
    writers = {each.parameter: each for each in find_writers(model, layout)}
    has_weights = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    disk = read_model(folder) if has_weights else _described(model)
    shapes = {name: entry.shape for name, entry in disk.items()}
    places = find_places(model, shapes) if has_weights else {name: TensorPlace(name) for name in disk}
    made_of: dict[str, list[str]] = defaultdict(list)
    for name, place in places.items():
        made_of[place.parameter].append(name)
    edits: dict[str, Edit] = {}
    skipped: dict[str, list[str]] = defaultdict(list)
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
    embedding = model.get_input_embeddings().weight
    embeddings = {name for name, each in model.named_parameters(remove_duplicate=False) if each is embedding}
    for name, entry in disk.items():
        place = places[name]
        writer = writers.get(place.parameter)
        reason = NOT_OF_MODEL if place.parameter not in known else _reason(writer, place, plan, wanted, embeddings)
        if reason is not None or writer is None:
            skipped[reason or NOT_A_WRITER].append(name)
            continue
        edits[name] = _edit(entry, place, writer, wanted[writer.layer], plan)
    for parameter in sorted({edit.writer.parameter for edit in edits.values()} | _needed(writers, plan, wanted)):
        _check_found(parameter, model, made_of, places, disk)
    check_norms([edit.writer for edit in edits.values()], provenance)
    return Edits(model, layers_path, list(disk.values()), made_of, edits, dict(skipped))


def _blank(folder: Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError("model: its weights are quantised; give the 16-bit model")
        with torch.device("meta"):
            return blank_model(config, torch.bfloat16)
    except (OSError, ValueError, ImportError) as error:
        text = shorten(" ".join(str(error).split()), 300)[1:-1]
        raise ModelError(f"model: {folder} is not a causal language model that can be built here: {text}") from error


def _described(model: PreTrainedModel) -> dict[str, TensorEntry]:
    """The tensors of a model whose folder has a config alone."""
    named = model.named_parameters()
    return {name: TensorEntry(name, each.dtype, tuple(each.shape), Path(), 0) for name, each in named}


def check_blocks(
    plan: StreamEdit, layout: ExpertLayout | None, provenance: Provenance, layers: int, width: int, above: str = ""
) -> None:
    """Check that a plan and its measurements fit a model.

    Args:
        plan: what to edit.
        layout: of the model's experts; None: it is dense.
        provenance: of the measurements.
        layers: number of the model's decoder blocks.
        width: of its residual stream.
        above: the block that the plan's fields are in, such as `eval.ablated.`, for errors.

    Raises:
        InvalidInput: they don't.
    """
    if (provenance.layers, provenance.width) != (layers, width):
        raise InvalidInput(f"{above}measurements", f"{provenance.layers} blocks, {provenance.width} wide",
                           f"measurements of this model, which has {layers} blocks and is {width} wide")  # fmt: skip
    wanted = plan.edits()
    for layer, entry in wanted.items():
        for field, number in (("layer", layer), ("measurement", entry.measurement)):
            if number >= layers:
                expected = f"a decoder block of this model, 0 to {layers - 1}"
                raise InvalidInput(f"{above}ablate.{field}", number, expected)
    if not plan.ablate_individual_experts:
        return
    if layout is None or not set(layout.moe_layers) & set(wanted):
        which = "a model with experts; this one is dense" if layout is None else (
            f"false, or one of the blocks that have routed experts ({layout.moe_layers[0]} to {layout.moe_layers[-1]}) "
            "in `ablate`")  # fmt: skip
        raise InvalidInput(f"{above}ablate_individual_experts", True, which)


def _check_experts(plan: AblationPlan, layout: ExpertLayout, wanted: Mapping[int, AblatedLayers]) -> None:
    """Check that the model has the experts that a plan names, in blocks that it edits."""
    problem = None if plan.layer_experts_from is None else of_another_model(plan.layer_experts_from, layout)
    if problem is not None:
        raise ModelError(f"layer_experts_from: {problem}")
    last = layout.num_experts - 1
    for expert in plan.expert_subset or ():
        if expert > last:
            raise InvalidInput("expert_subset", expert, f"experts of this model, 0 to {last}")
    by_layer = plan.by_layer()
    for layer, experts in by_layer.items():
        if layer not in layout.moe_layers:
            raise InvalidInput("layer_experts", layer, f"layers with experts: {','.join(ranges(layout.moe_layers))}")
        if max(experts) > last:
            raise InvalidInput(f"layer_experts.{layer}", max(experts), f"experts of this model, 0 to {last}")
    if by_layer and not by_layer.keys() & wanted.keys():
        raise InvalidInput("layer_experts", ",".join(ranges(sorted(by_layer))), "one of the blocks in `ablate`")


def _reason(
    writer: Writer | None,
    place: TensorPlace,
    plan: AblationPlan,
    wanted: Mapping[int, AblatedLayers],
    embeddings: set[str],
) -> str | None:
    """Why a tensor has no edit; None where it has one."""
    if writer is None:
        return EMBEDDING if place.parameter in embeddings else NOT_A_WRITER
    if writer.layer not in wanted:
        return OTHER_BLOCK
    if writer.kind == "router" and not plan.gate_scale:
        return GATE_OFF
    if writer.kind != "experts":
        return None
    if not plan.ablate_individual_experts:
        return EXPERTS_OFF
    chosen = plan.experts_of(writer.layer)
    if chosen is None:
        return None
    # A stack of all experts has an edit if one of them does.
    return None if (place.expert in chosen if place.expert is not None else chosen) else OTHER_EXPERT


def _edit(
    entry: TensorEntry, place: TensorPlace, writer: Writer, layers: AblatedLayers, plan: AblationPlan
) -> Edit:  # fmt: skip
    if entry.dtype not in EDITED_DTYPES:
        raise ModelError(f"model: {entry.name} is stored as {entry.dtype}; expected 16 or 32 bits, not quantised")
    if place.unknown or place.first_row or place.interleaved:
        raise ModelError(f"model: {entry.name} is stored in a form that can't be edited here "
                         f"({place.unknown or 'rows of several matrices are joined'})")  # fmt: skip
    whole = writer.kind == "experts" and place.expert is None
    experts = plan.experts_of(writer.layer) if whole else None
    return Edit(entry, place, writer, layers, writer.columns != place.swapped, experts)


def _needed(writers: Mapping[str, Writer], plan: AblationPlan, wanted: Mapping[int, AblatedLayers]) -> set[str]:
    """The parameters that the plan edits, whether or not the files have them."""
    return {
        name
        for name, writer in writers.items()
        if _reason(writer, TensorPlace(name), plan, wanted, set()) is None
    }  # fmt: skip


def _check_found(
    parameter: str,
    model: PreTrainedModel,
    made_of: Mapping[str, list[str]],
    places: Mapping[str, TensorPlace],
    disk: Mapping[str, TensorEntry],
) -> None:
    """Check that the tensors of an edited parameter form all of it."""
    shape = tuple(model.get_parameter(parameter).shape)
    names = made_of.get(parameter, [])
    if not names:
        raise ModelError(f"model: the plan edits {parameter}, but the files have no tensor for it")
    if len(shape) > 1:
        check_tiling(parameter, shape, {name: (places[name], disk[name].shape) for name in names})
    elif [disk[name].shape for name in names] != [shape]:
        raise ModelError(f"model: {', '.join(names)} do not form {parameter} of shape {shape}")


def check_norms(writers: Iterable[Writer], provenance: Provenance, above: str = "") -> None:
    """Check that what stands between the edited parameters and the residual stream is known: at most one norm.

    Args:
        writers: the parameters.
        provenance: of the measurements.
        above: see `check_blocks`.

    Raises:
        InvalidInput: a router does not read what a norm of its block returns.
        ModelError: what a parameter writes goes through a norm and more.
    """
    for writer in writers:
        if writer.kind == "router":
            if provenance.router_norms.get(writer.layer) is None:
                raise InvalidInput(f"{above}gate_scale", "> 0", f"0: {writer.module} does not read the output of a "
                                   "norm of its block, so the direction that it reads is not known")  # fmt: skip
            continue
        normed = normed_output(writer, provenance)
        if normed is not None and normed not in provenance.output_norms:
            raise ModelError(f"model: the output of {normed} goes through a norm, and through more than that, before "
                             f"it joins the residual stream, so {writer.parameter} can't be edited")  # fmt: skip


def normed_output(writer: Writer, provenance: Provenance) -> str | None:
    """The module that a writer is, or is a part of, whose output goes through a norm; None: there is none."""
    names = [each for each in provenance.normed_outputs if f"{writer.module}.".startswith(f"{each}.")]
    return names[0] if names else None
