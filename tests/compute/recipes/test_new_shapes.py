"""Jobs on families whose layout only the derivation finds: without a gate, hybrid, composite, and other shapes.

SFT completes, held-out loss falls, and the merged model is a whole model of its own class; DPO and circuit breakers
complete.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from llama_stack_provider_moe.compute.moe.model_types import class_of
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.support import tiny_models
from tests.support.family_subject import Subject
from tests.support.training_support import Workshop, workshop

__all__ = ["workshop"]

# Model type -> what is special about it.
SHAPES = {
    "nemotron_h": "experts without a gate; a layer is attention, Mamba, an MLP or experts",
    "jamba": "hybrid",
    "kimi_linear": "hybrid, with groups of experts in its config",
    "deepseek_v4": "a fixed choice by the token's id, and several streams of hidden states",
    "longcat_flash": "choices that compute nothing, and a loop of its own",
    "gemma4": "composite; a dense MLP beside the experts, which are in the layer itself",
    "qwen3_vl_moe": "composite; stacked weights that may be transposed on disk",
    "glm4v_moe": "composite; a bias for the choice",
    "step3p7": "composite; a loop of its own, and weights that are joined on disk",
}


def tiny(workshop: Workshop, model_type: str) -> Path:
    folder = workshop.root / "models" / model_type
    if not folder.is_dir():
        Subject(model_type).model().save_pretrained(folder)
        tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", SHAPES)
def test_sft(model_type: str, workshop: Workshop) -> None:
    folder = tiny(workshop, model_type)
    run = workshop.run(
        "sft", folder, training={"n_epochs": 2}, efficiency={"enable_activation_checkpointing": True},
        options={"save_merged": True},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    losses = run.held_out("validation_loss")
    assert losses[-1] < losses[0]
    base, merged = (AutoConfig.from_pretrained(each) for each in (folder, run.folder.artifacts / "merged"))
    kind = class_of(base)
    assert kind is not None
    assert class_of(merged) is kind
    model, loading = kind.from_pretrained(run.folder.artifacts / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    before = kind.from_pretrained(folder)
    decoder = Subject(model_type).layout.layers_path
    for (name, one), (_, other) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        if not name.startswith(f"{decoder}."):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("model_type", ["nemotron_h", "jamba", "qwen3_vl_moe", "gemma4"])
def test_dpo(model_type: str, workshop: Workshop) -> None:
    run = workshop.run("dpo", tiny(workshop, model_type))
    assert run.exit_code == COMPLETED, run.reason


@pytest.mark.parametrize("model_type", ["deepseek_v4", "qwen3_vl_moe", "gemma4"])
def test_circuit_breaker(model_type: str, workshop: Workshop) -> None:
    run = workshop.run("circuit_breaker", tiny(workshop, model_type))
    assert run.exit_code == COMPLETED, run.reason


def test_full_training_of_a_composite_model(workshop: Workshop) -> None:
    """All weights of its language model train; the others are saved as they were, bit for bit."""
    folder = tiny(workshop, "qwen3_vl_moe")
    run = workshop.run("sft", folder, adapter=None, optimizer={"lr": 1e-3})
    assert run.exit_code == COMPLETED, run.reason
    kind = class_of(AutoConfig.from_pretrained(run.folder.model))
    assert kind is not None
    before, after = (dict(kind.from_pretrained(each).named_parameters()) for each in (folder, run.folder.model))
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved
    assert all(".language_model." in name or name.startswith("lm_head") for name in moved)
