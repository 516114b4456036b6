"""Tiny models for mixing: a dense base or its upcycled pair, and branches that differ from it by known steps."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from llama_stack_provider_moe.spec.mixing import MixPlan
from tests.support import tiny_models

IDS = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(7))
DENSE = ("llama", "mistral", "qwen3", "tied llama", "bf16 llama")


def dense(family: str, folder: Path, **changes: Any) -> Path:
    """A tiny model of a family that upcycling knows, with rope and norms that differ from the MoE family's defaults."""
    if family == "mistral":
        config = MistralConfig(**{**tiny_models._SHAPE, "intermediate_size": 48, "sliding_window": 16, **changes})
        torch.manual_seed(3)
        MistralForCausalLM(config).save_pretrained(folder)
    elif family == "bf16 llama":
        tiny_models.model("llama").to(torch.bfloat16).save_pretrained(folder)
    else:
        changes = {"rms_norm_eps": 1e-3, **changes}
        tiny_models.build(
            family.removeprefix("tied "), folder, tie_word_embeddings=family.startswith("tied"), **changes
        )
    return folder


def changed(base: Path, folder: Path, scale: float, only: str = "", seed: int = 1) -> Path:
    """A copy of `base` whose tensors with `only` in their names differ by noise of `scale` standard deviations."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        noise = torch.randn(tensors[name].shape, generator=generator)
        if only in name:
            spread = tensors[name].float().std(correction=0)
            tensors[name] = (tensors[name] + scale * spread * noise).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def plan(method: str, branches: dict[str, Path], **more: Any) -> MixPlan:
    named = [{"name": name, "model": str(folder)} for name, folder in branches.items()]
    return MixPlan.model_validate({"method": method, "branches": named, **more})
