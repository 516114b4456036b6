"""Tiny models for surgery: eight experts where routers choose groups, and biases for the choice that are not zero."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from tests.support import tiny_models

IN_GROUPS = ("glm4_moe", "deepseek_v3")
# A token may use one of two groups of four experts.
EIGHT: dict[str, dict[str, Any]] = {
    family: {"n_routed_experts": 8, "n_group": 2, "topk_group": 1} for family in IN_GROUPS
}
_COUNTS = ("num_local_experts", "num_experts", "moe_num_experts")


def eight(family: str) -> dict[str, Any]:
    """The changes that give a tiny model of the family eight experts."""
    own = next((name for name in _COUNTS if name in tiny_models.FAMILIES[family]), None)
    return EIGHT.get(family, {}) if own is None else {own: 8}


def build(family: str, folder: Path, **changes: Any) -> Path:
    """Save a tiny model of eight experts a layer with its tokenizer."""
    model = tiny_models.model(family, **{**eight(family), **changes})
    drawn = torch.Generator().manual_seed(9)
    for bias in layout_of(model).biases(model).values():
        bias.data.copy_(torch.rand(bias.shape, generator=drawn) * 0.1)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """A saved model in fp32, in evaluation mode; every tensor has its place."""
    made, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    found: PreTrainedModel = made.eval()
    return found


def layout_of(model: PreTrainedModel) -> ExpertLayout:
    """Where its experts are."""
    layout = find_layout(model)
    assert layout is not None
    return layout


def prompts(rows: int, length: int, seed: int = 5) -> list[Prompt]:
    """Random rows of `length` and of `length` + 1 tokens in turn."""
    drawn = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 300, (length + row % 2,), generator=drawn).tolist() for row in range(rows)]
    return [Prompt(each, [True] * len(each)) for each in ids]
