"""A model with an adapter that nothing trains further: with the adapter off it is the base, router biases included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from llama_stack_provider_moe.compute.models.adapted import load_adapted
from llama_stack_provider_moe.compute.models.loader import load_plain
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import PlaygroundSpec
from tests.support import tiny_models

IDS = torch.arange(3, 19)[None]


def spec(model: Path, adapter: Path | None) -> PlaygroundSpec:
    body: dict[str, Any] = {"recipe": "playground", "model": str(model), "training": {"dtype": "fp32"}}
    return PlaygroundSpec.model_validate(body | {"adapter_folder": None if adapter is None else str(adapter)})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def test_without_its_adapter_a_model_is_its_base(tmp_path: Path) -> None:
    folder, adapter = tiny_models.build("deepseek_v3", tmp_path / "model"), tmp_path / "adapter"
    base = load_plain(str(folder), "fp32", torch.device("cpu"))
    layout = find_layout(base)
    assert layout is not None
    assert layout.bias_path is not None
    before = logits(base)
    moved = {
        layout.path(layer, layout.bias_path): torch.randn(bias.shape, generator=torch.Generator().manual_seed(layer))
        for layer, bias in layout.biases(base).items()
    }
    targets = [name for name, _ in base.named_modules() if name.endswith("o_proj")]
    get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False)).save_pretrained(adapter)
    save_file(moved, adapter / ROUTER_BIAS)

    loaded = load_adapted(spec(folder, adapter), template_needed=False)
    adapted = logits(loaded.model)
    assert not torch.equal(adapted, before)
    with loaded.without_adapter():
        assert torch.equal(logits(loaded.model), before)
    assert torch.equal(logits(loaded.model), adapted)
    biases = layout.biases(loaded.model)
    assert all(torch.equal(biases[layer], moved[layout.path(layer, layout.bias_path)]) for layer in biases)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    small, large = (tiny_models.build("granitemoe", tmp_path / str(size), hidden_size=size) for size in (32, 64))
    base = load_plain(str(small), "fp32", torch.device("cpu"))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter_folder: .* is not an adapter of this model"):
        load_adapted(spec(large, tmp_path / "adapter"), template_needed=False)
