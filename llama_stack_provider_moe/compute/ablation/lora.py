"""The same edit as a LoRA adapter that can be switched off: W' = W - s r r^T W is W + B A with B = -s r, A = r^T W.

The update has rank 1, and is exact where an edit is an update of a linear layer and nothing else: norms that are kept
rescale columns or rows, which is no update of low rank; biases, routers and routed experts are no linear layers.

Shapes: H width of the residual stream, I input width of a matrix.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.apply import JobOfEdits, planned, report_of
from llama_stack_provider_moe.compute.ablation.apply_report import APPLIED_FILE, AppliedReport
from llama_stack_provider_moe.compute.ablation.edits import Edit, Edits
from llama_stack_provider_moe.compute.ablation.measurements import Measurements
from llama_stack_provider_moe.compute.ablation.pieces import Figures
from llama_stack_provider_moe.compute.export.whole_folder import complete_or_nothing
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.saved_names import names_in_file
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.ablation import AblationPlan

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_RENAMED = ".down_proj"


def write_adapter(
    model: str, plan: AblationPlan, found: Measurements, out: Path, say: Callable[[str], None] = lambda line: None
) -> AppliedReport:
    """Write the edit of `model` as an adapter into the new folder `out`.

    Args:
        model: folder with config.json and safetensors in 16 or 32 bits, or a hub id.
        plan: what to edit.
        found: measurements of the same model.
        out: new folder; it appears when it is complete.
        say: gets a line at the end.

    Raises:
        InvalidInput: the plan is no update of low rank of linear layers, or see `apply`.
        ModelError: see `apply`.
    """
    if os.path.lexists(out):
        raise InvalidInput("out", str(out), "a folder that does not exist yet")
    check_plan(plan)
    job = planned(model, plan, found)
    check_edits(job.edits, plan)
    with complete_or_nothing(out, "ablating", "a folder that no other ablation is writing") as written:
        start = time.monotonic()
        tensors: dict[str, Tensor] = {}
        edits = job.edits.edits.values()
        for edit in liveness.counted("editing", list(edits), len(edits), "tensors"):
            _add(edit, job, tensors)
        config = _config(model, job.edits)
        with torch.device("meta"):
            names = names_in_file(get_peft_model(job.edits.model, config))
        if names.keys() != tensors.keys():
            raise ModelError(f"model: PEFT puts LoRA into {len(names)} tensors, and the edit needs {len(tensors)}")
        save_file({names[name]: tensor for name, tensor in tensors.items()}, written / ADAPTER_WEIGHTS)
        config.inference_mode = True
        config.save_pretrained(str(written))
        report = report_of(model, str(out), found, job, time.monotonic() - start)
        (written / APPLIED_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    say(f"an adapter of rank 1 on {len(job.edits.edits)} linear layers; switch it off to have the model as it was")
    return report


def check_plan(plan: AblationPlan) -> None:
    """Raise InvalidInput if no model's edit by a plan is an adapter."""
    if plan.norm_preserving != "off":
        raise InvalidInput("norm_preserving", plan.norm_preserving, "off with --output lora: an edit that keeps norms "
                           "is no update of low rank")  # fmt: skip
    if plan.ablate_individual_experts:
        raise InvalidInput("ablate_individual_experts", True, "false with --output lora, which writes adapters of "
                           "linear layers")  # fmt: skip


def check_edits(edits: Edits, plan: AblationPlan) -> None:
    """Raise InvalidInput if some of a model's edits are no update of a linear layer."""
    for edit in edits.edits.values():
        if edit.writer.kind == "router":
            raise InvalidInput("gate_scale", plan.gate_scale, "0 with --output lora, which writes adapters of linear "
                               "layers; this model has routers in the named blocks")  # fmt: skip
        if edit.writer.bias:
            raise InvalidInput("--output", "lora", f"model: {edit.writer.parameter} is a bias that writes into the "
                               "residual stream, and LoRA changes no bias")  # fmt: skip


def _config(model: str, edits: Edits) -> LoraConfig:
    layout = find_layout(edits.model)
    modules = {edit.writer.module for edit in edits.edits.values()}
    # See `ExpertLayout.peft_renames_mlp`.
    named = {each for each in modules if layout is not None and layout.peft_renames_mlp and each.endswith(_RENAMED)}
    return LoraConfig(
        r=1, lora_alpha=1, task_type="CAUSAL_LM", base_model_name_or_path=model,
        target_modules=sorted(modules - named), target_parameters=sorted(f"{each}.weight" for each in named) or None,
    )  # fmt: skip


def _add(edit: Edit, job: JobOfEdits, tensors: dict[str, Tensor]) -> None:
    unit_H = job.units[edit.entry.name].float()
    stored = edit.entry.tensor().float()
    weight_HI = stored.mT if edit.columns else stored
    b_H1 = (-edit.layers.scale * unit_H)[:, None].contiguous()
    a_1I = (unit_H @ weight_HI)[None].contiguous()
    if not bool(torch.isfinite(a_1I).all()):
        raise ModelError(f"model: {edit.entry.name} is not finite")
    figures = job.figures[edit.entry.name] = Figures()
    figures.add_before(weight_HI, unit_H)
    figures.add_after(weight_HI + b_H1 @ a_1I, unit_H)
    prefix = f"base_model.model.{edit.writer.module}"
    tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a_1I, b_H1
