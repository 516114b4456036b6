"""Tiny models with measurements of random prompts, and plans that edit them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint
from llama_stack_provider_moe.compute.ablation.measurements import SETS, MeasuredSet, Measurements, Provenance
from llama_stack_provider_moe.compute.ablation.states import measure, structure_of
from llama_stack_provider_moe.compute.ablation.subject import Subject
from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.models.hidden_states import EMBEDDINGS, Blocks
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.spec.ablation import BASELINE, TARGET, AblationPlan, Measure
from tests.support import tiny_models
from tests.support.family_subject import IDS

ROWS = 6


def prompts(seed: int) -> list[Prompt]:
    """Random prompts of 3 to 8 tokens."""
    drawn = torch.Generator().manual_seed(seed)
    lengths = [3 + row % 6 for row in range(ROWS)]
    ids = [torch.randint(3, 300, (length,), generator=drawn).tolist() for length in lengths]
    return [Prompt(each, [True] * len(each)) for each in ids]


def load(folder: Path) -> PreTrainedModel:
    """A saved model in fp32, in evaluation mode."""
    made: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return made.eval()


def measured(folder: Path, batch_size: int = 4) -> Measurements:
    """Measurements of the model in a folder."""
    model = load(folder)
    subject = Subject(model, tiny_models.tokenizer(), find_layout(model))
    sets = {TARGET: prompts(1), BASELINE: prompts(2)}
    structure = structure_of(subject, sets[TARGET][0])
    states, _ = measure(subject, sets, Measure(), batch_size, lambda done, total: None)
    layers, width = states[TARGET].mean_LH.shape
    provenance = Provenance(
        model=str(folder), fingerprint=fingerprint(folder), adapter=None, model_type=model.config.model_type,
        layers=layers, width=width, position=-1, dtype="fp32", quantize_bits=None, chat_template="",
        sets={name: MeasuredSet(source=name, rows=ROWS, sha256="") for name in SETS},
        router_norms=structure.router_norms, normed_outputs=structure.normed_outputs,
        output_norms=structure.output_norms,
    )  # fmt: skip
    return Measurements(provenance, states[TARGET], states[BASELINE])


def plan(layers: str, measurement: int = 1, **changes: Any) -> AblationPlan:
    """A plan with one entry; `scale` and `sparsity` go into it, other changes into the plan."""
    entry = {"layer": layers, "measurement": measurement}
    entry |= {name: changes.pop(name) for name in ("scale", "sparsity") if name in changes}
    return AblationPlan.model_validate({"ablate": [entry], **changes})


def along(model: PreTrainedModel, unit_H: Tensor) -> Tensor:
    """What each token's state has of a direction, after the embeddings and after each block: (L + 1, B, T)."""
    blocks = Blocks(model)
    wanted = [EMBEDDINGS, *range(blocks.final)]
    with torch.no_grad():
        states = blocks.states(wanted, IDS, torch.ones_like(IDS))
    return torch.stack([states[block].double() @ unit_H for block in wanted])
