"""The same edit as a LoRA adapter that can be switched off: W' = W - s r r^T W is W + B A with B = -s r, A = r^T W.

The update of each matrix has rank 1, and is exact: of linear layers, of routers, W - c (W q) q^T, and of each matrix of
a stack of experts. Keeping norms rescales columns or rows, which is not an update of low rank; LoRA has no biases.

Shapes: H width of the residual stream, E experts; the update of a parameter (.., a, b) is left (.., a) times right
(.., b).
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.apply import JobOfEdits, Progress, planned, report_of
from llama_stack_provider_moe.compute.ablation.apply_report import APPLIED_FILE, AppliedReport
from llama_stack_provider_moe.compute.ablation.edits import Edit, Edits
from llama_stack_provider_moe.compute.ablation.measurements import Measurements
from llama_stack_provider_moe.compute.ablation.pieces import Figures, pieces_of, writing_rows
from llama_stack_provider_moe.compute.export.card import TOKENIZER_FILES, side_files
from llama_stack_provider_moe.compute.export.updates import adapted
from llama_stack_provider_moe.compute.export.whole_folder import check_room, complete_or_nothing
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.moe.adapters import ADAPTER_NAME
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.errors import AdapterError, InvalidInput, ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.ablation import OFF_FOR_LORA, AblationPlan

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_RENAMED = ".down_proj"


@dataclass(frozen=True)
class _Update:
    """Of one parameter in memory; experts that are not edited have zeros."""

    left: Tensor
    right: Tensor


def write_adapter(
    model: str,
    plan: AblationPlan,
    found: Measurements,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
    named: Path | None = None,
) -> AppliedReport:
    """Write the edit of `model` as an adapter, with the model's tokenizer, into the new folder `out`.

    Args:
        model: folder with config.json and safetensors in 16 or 32 bits, or a hub id.
        plan: what to edit.
        found: measurements of the same model.
        out: new folder; it appears when it is complete.
        say: gets a line at the end.
        progress: called with the number of tensors that are done and their total.
        named: folder that the report names, where `out` is renamed later; None: `out`.

    Raises:
        InvalidInput: the plan is no update of rank 1, PEFT can't express it for this model, or see `apply`.
        ModelError, NoRoom: see `apply`.
    """
    if os.path.lexists(out):
        raise InvalidInput("out", str(out), "a folder that does not exist yet")
    if plan.norm_preserving != "off":
        raise InvalidInput("norm_preserving", plan.norm_preserving, OFF_FOR_LORA)
    job = planned(model, plan, found)
    check_edits(job.edits)
    with complete_or_nothing(out, "ablating", "a folder that no other ablation is writing") as written:
        check_room(out, bytes_of(job.edits))
        start = time.monotonic()
        updates: dict[str, _Update] = {}
        edits = list(job.edits.edits.values())
        for done, edit in enumerate(liveness.counted("editing", edits, len(edits), "tensors"), start=1):
            _add(edit, job, updates)
            progress(done, len(edits))
        config = config_of(model, job.edits)
        save_file(_tensors(job.edits, config, updates), written / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config.inference_mode = True
        config.save_pretrained(str(written))
        folder = model_folder(model, "model")
        for name, file in side_files(folder, folder).items():
            if name in TOKENIZER_FILES:
                shutil.copyfile(file, written / name)
        report = report_of(model, str(named or out), found, job, time.monotonic() - start)
        (written / APPLIED_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    say(f"an adapter of rank 1 on {len(updates)} parameters; switch it off to have the model as it was")
    return report


def check_edits(edits: Edits) -> None:
    """Raise InvalidInput if some of a model's edits are no update of a matrix."""
    for edit in edits.edits.values():
        if edit.writer.bias:
            raise InvalidInput("output", "lora", f"model: {edit.writer.parameter} is a bias that writes into the "
                               "residual stream, and LoRA changes no bias")  # fmt: skip


def bytes_of(edits: Edits) -> int:
    """Size of the adapter's weights, in fp32."""
    names = {each.writer.parameter for each in edits.edits.values()}
    shapes = [tuple(map(int, edits.model.get_parameter(name).shape)) for name in names]
    return 4 * sum(prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes)


def config_of(model: str, edits: Edits) -> LoraConfig:
    """PEFT's config of an adapter on every edited parameter.

    Args:
        model: that the adapter names as its base.
        edits: the plan on it.
    """
    layout = find_layout(edits.model)
    modules, parameters = set[str](), set[str]()
    for edit in edits.edits.values():
        writer = edit.writer
        # See `ExpertLayout.peft_renames_mlp`.
        renamed = layout is not None and layout.peft_renames_mlp and writer.module.endswith(_RENAMED)
        if renamed or writer.kind in ("experts", "router"):
            parameters.add(writer.parameter)
        else:
            modules.add(writer.module)
    return LoraConfig(
        r=1, lora_alpha=1, task_type="CAUSAL_LM", base_model_name_or_path=model,
        target_modules=sorted(modules), target_parameters=sorted(parameters) or None,
    )  # fmt: skip


def _add(edit: Edit, job: JobOfEdits, updates: dict[str, _Update]) -> None:
    """Add the update of one tensor on disk to that of its parameter."""
    shape = tuple(job.edits.model.get_parameter(edit.writer.parameter).shape)
    if edit.writer.parameter not in updates:
        blank = _Update(torch.zeros(shape[:-1]), torch.zeros(*shape[:-2], shape[-1]))
        updates[edit.writer.parameter] = blank
    update = updates[edit.writer.parameter]
    unit_H = job.units[edit.entry.name].float()
    figures = job.figures.setdefault(edit.entry.name, Figures())
    for expert, numbers in _matrices(edit):
        rows_HI = writing_rows(numbers, edit)
        along_I = unit_H @ rows_HI
        if not bool(torch.isfinite(along_I).all()):
            raise ModelError(f"model: {edit.entry.name} is not finite")
        scale = edit.layers.scale * (job.plan.gate_scale if edit.writer.kind == "router" else 1.0)
        figures.add_before(rows_HI, unit_H)
        figures.add_after(rows_HI - scale * torch.outer(unit_H, along_I), unit_H)
        # A router, (E, H), and a writer by columns, (.., I, H), have the stream's dimensions last.
        last = edit.writer.columns or edit.writer.kind == "router"
        left, right = (along_I, -scale * unit_H) if last else (-scale * unit_H, along_I)
        place = () if len(shape) < 3 else (expert,)
        update.left[place], update.right[place] = left, right
        liveness.alive()


def _matrices(edit: Edit) -> Iterator[tuple[int, Tensor]]:
    """(number of the expert, its matrix on disk in fp32) of the experts that are edited; a single matrix has 0."""
    for number, piece in enumerate(pieces_of(edit.entry, edit)):
        if piece.edit is not None:
            expert = number if edit.place.expert is None else edit.place.expert
            yield expert, piece.entry.tensor().float()


def _tensors(edits: Edits, config: LoraConfig, updates: dict[str, _Update]) -> dict[str, Tensor]:
    """The adapter's tensors, by their names in its file."""
    try:
        layers, names = adapted(edits.model, config)
    except AdapterError as error:
        raise InvalidInput("output", "lora", f"model, for this model: {error}") from None
    if layers.keys() != updates.keys():
        lost = sorted(layers.keys() ^ updates.keys())
        raise InvalidInput("output", "lora", f"model, for this model: PEFT puts LoRA into {len(layers)} parameters, "
                           f"and the edit needs {len(updates)} ({', '.join(lost[:2])})")  # fmt: skip
    found = {}
    for parameter, (key, layer) in layers.items():
        for part, tensor in zip(("lora_A", "lora_B"), _weights(layer, updates[parameter]), strict=True):
            shape = tuple(getattr(layer, part)[ADAPTER_NAME].weight.shape)
            assert tensor.shape == shape, f"{parameter}: {part} has shape {tuple(tensor.shape)}, PEFT expects {shape}"
            found[names[f"{key}.{part}.weight"]] = tensor.contiguous()
    return found


def _weights(layer: LoraLayer, update: _Update) -> tuple[Tensor, Tensor]:
    """A and B as PEFT stores them; those of experts (E, a, b) are side by side."""
    if update.left.dim() == 1:
        return update.right[None], update.left[:, None]
    # PEFT takes (E, in, out) for experts, except for families where it swaps the two.
    swapped = isinstance(layer, ParamWrapper) and layer._did_swap_in_out_features
    by_in, by_out = (update.right, update.left) if swapped else (update.left, update.right)
    return by_in, by_out.mT
