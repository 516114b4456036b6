"""A model that is quantised while it is read equals one that is read whole and then quantised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, modeling_utils

from llama_stack_provider_moe.compute.models import quantized_loading
from llama_stack_provider_moe.compute.models.loader import load_weights, model_config
from llama_stack_provider_moe.compute.models.quantized_loading import Quantized, read_quantized
from llama_stack_provider_moe.compute.moe import quantize as module
from llama_stack_provider_moe.compute.moe.backend import code_of
from llama_stack_provider_moe.compute.moe.codes import Code, Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.quantize import CodedLinear, quantizable, quantize
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import Moe
from tests.compute.moe.test_adapters import logits
from tests.support import tiny_models

CPU = torch.device("cpu")
NESTED = Coding(4, nested=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.build("qwen3_moe", tmp_path / "model")


def read(folder: Path, coding: Coding = NESTED, dtype: torch.dtype = torch.float32) -> Quantized:
    return read_quantized(str(folder), model_config(str(folder)), dtype, CPU, coding)


def whole(folder: Path) -> PreTrainedModel:
    return load_weights(str(folder), model_config(str(folder)), torch.float32, CPU).eval()


@pytest.mark.parametrize("coding", [Coding(4), NESTED, Coding(8)], ids=Coding.text)
@pytest.mark.parametrize("family", [*tiny_models.MOE, "llama"])
def test_it_equals_a_model_that_is_quantised_in_memory(family: str, coding: Coding, tmp_path: Path) -> None:
    folder = tiny_models.build(family, tmp_path / "model")
    found = read(folder, coding)
    model = whole(folder)
    layout = find_layout(model)
    expected = quantize(model, layout, coding, CPU)
    assert found.layout == layout
    assert found.report == expected
    for each in (found.model, model):
        apply_moe(each, layout, resolve_moe(Moe(), layout, full=False))
    assert torch.equal(logits(found.model), logits(model))
    kept, others = dict(found.model.named_parameters()), dict(model.named_parameters())
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in kept.items()} == {
        name: (p.shape, p.dtype, p.requires_grad) for name, p in others.items()
    }
    assert not found.model.training


def test_no_mark_of_transformers_own_formats_stays(folder: Path) -> None:
    """PEFT and TRL would take the model for one of bitsandbytes, and a saved config would name a quantiser."""
    found = read(folder).model
    plain = whole(folder)
    for name in ("hf_quantizer", "quantization_method"):
        assert not hasattr(found, name)
    assert not found.is_quantized
    kept = ("_name_or_path", "transformers_version")
    one, other = (
        {key: value for key, value in each.config.to_dict().items() if key not in kept} for each in (found, plain)
    )
    assert one == other
    assert vars(found.config).keys() == vars(plain.config).keys()
    assert found.config.name_or_path == plain.config.name_or_path


def test_each_weight_is_encoded_before_the_next_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never is more than one weight of the model there in 16 bits, and every tensor comes from a read file."""
    order: list[str] = []
    take = quantized_loading._CodesQuantizer.take
    opened = modeling_utils.safe_open
    backends: list[object] = []

    def watched(self: Any, name: str, weight: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        order.append(name)
        return take(self, name, weight, expected)

    def opening(path: object, **keywords: object) -> object:
        backends.append(keywords["backend"])
        return opened(path, **keywords)

    monkeypatch.setattr(quantized_loading._CodesQuantizer, "take", watched)
    monkeypatch.setattr(modeling_utils, "safe_open", opening)
    found = read(folder)
    assert set(backends) == {"pread"}
    assert modeling_utils.safe_open is opening, "restored"
    assert sorted(order) == sorted(quantizable(whole(folder), found.layout)), "each once"


def test_experts_are_all_codes(folder: Path) -> None:
    found = read(folder)
    assert found.layout is not None
    for experts in found.layout.experts(found.model).values():
        assert all(isinstance(code_of(experts, name), Code) for name in ("gate_up_proj", "down_proj"))
    assert sum(isinstance(module, CodedLinear) for module in found.model.modules()) == found.report.linear_layers > 0


@pytest.mark.parametrize("skipped", ["experts.down_proj", "self_attn.q_proj.weight"])
def test_what_was_not_encoded_while_it_was_read_is_encoded_or_an_error(
    folder: Path, skipped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = quantized_loading._CodesQuantizer.param_needs_quantization

    def forgets(self: Any, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        return needs(self, model, param_name) and not param_name.endswith(skipped)

    monkeypatch.setattr(quantized_loading._CodesQuantizer, "param_needs_quantization", forgets)
    expected = read(folder).report
    monkeypatch.undo()
    assert read(folder).report == expected
    monkeypatch.setattr(module, "keep_code", lambda *_: None)
    with pytest.raises(ModelError, match="16 of 16 expert matrices are quantised; these are not"):
        read(folder)


def edited(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"), r"1 missing \(model.layers.0.self_attn.q_proj"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}),
            r"1 of another shape \(model.layers.0.self_attn.q_proj.weight \(3, 3\)",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.0.mlp.experts" in name and "down" in name],
            "1 missing .*experts.down_proj",
        ),
    ],
    ids=["missing", "shape", "experts"],
)
def test_a_damaged_checkpoint_is_named(folder: Path, change: Any, told: str) -> None:
    edited(folder, change)
    with pytest.raises(ModelError, match=told):
        read(folder)
