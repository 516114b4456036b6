"""What a merge on disk refuses: it ignores nothing in base or adapter, and leaves nothing behind."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.export.tensors import read_header, read_model
from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.spec import Adapter
from tests.support import tiny_models
from tests.support.export_support import adapted


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixtral")
    base = tiny_models.build("mixtral", folder / "base")
    return base, adapted(base, folder / "adapter", Adapter(rank=2))


def corrupted(folder: Path, out: Path, change: Any) -> Path:
    """A copy of an adapter whose weights or config were changed by `change(weights, config)`."""
    shutil.copytree(folder, out)
    weights = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    change(weights, config)
    save_file(weights, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Any, str]] = {
    "a tensor too many": (lambda w, c: w.update({"base_model.model.gone.lora_A.weight": torch.ones(2)}),
                          r"holds 1 tensor\(s\) that have no place .* config: base_model\.model\.gone\.lora_A\.weight"),
    "a tensor too few": (lambda w, c: w.pop(KEY), rf"lacks 1 tensor\(s\): {re.escape(KEY)}"),
    "another shape": (lambda w, c: w.update({KEY: torch.ones(2, 31)}), r"has shape \(2, 31\), this base needs"),
    "not finite": (lambda w, c: w.update({KEY: torch.full((2, 32), torch.nan)}), "q_proj.weight has numbers that"),
    "dora": (lambda w, c: c.update(use_dora=True), "use_dora True can't be merged here"),
    "bias": (lambda w, c: c.update(bias="all"), "bias 'all' can't be merged here"),
    "whole modules": (lambda w, c: c.update(modules_to_save=["lm_head"]), "modules_to_save .* can't be merged here"),
    "pissa": (lambda w, c: c.update(init_lora_weights="pissa"), "init_lora_weights 'pissa' can't be merged"),
    "a setting of the future": (lambda w, c: c.update(use_magic=True), "use_magic True can't be merged here"),
    "another kind": (lambda w, c: c.update(peft_type="IA3"), "is not the config of a LoRA adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_no_tensor_and_no_setting_is_ignored(name: str, mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    change, expected = REFUSED[name]
    changed = corrupted(mixtral[1], tmp_path / "adapter", change)
    with pytest.raises(AdapterError, match=expected):
        merge(mixtral[0], changed, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
BASES: dict[str, tuple[Any, str]] = {
    "an expert is missing": (lambda w: w.pop(W1), r"do not form model\.layers\.1\.mlp\.experts\.gate_up_proj"),
    "an expert is narrower": (lambda w: w.update({W1: w[W1][:-1].clone()}), "do not form"),
    "a weight is missing": (
        lambda w: w.pop("model.layers.0.self_attn.q_proj.weight"),
        "files have no tensor for it",
    ),
    "a weight of bytes": (lambda w: w.update({W1: w[W1].to(torch.uint8)}), "is stored as torch.uint8"),
    "an expert that overflows": (lambda w: w.update({W1: torch.full_like(w[W1], 7e4)}), "is not finite in float16"),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_does_not_fit(name: str, mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    change, expected = BASES[name]
    base = tmp_path / "base"
    shutil.copytree(mixtral[0], base)
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors")
    with pytest.raises(ModelError, match=expected):
        merge(base, mixtral[1], tmp_path / "out", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda raw: raw[:-1], "has .* bytes, expected .* by its header"),
        (lambda raw: raw[:20], "does not fit a file of 20"),
        (lambda raw: b"", "is not a safetensors file"),
        (lambda raw: raw.replace(b'"F32"', b'"F99"', 1), "is not a safetensors file that this version can read"),
        (lambda raw: raw.replace(b"[0,", b"[8,", 1), "can't have"),
    ],
)
def test_a_damaged_file_is_reported(change: Any, expected: str, mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(change((mixtral[0] / path.name).read_bytes()))
    with pytest.raises(ModelError, match=expected):
        read_header(path)


def test_an_index_leads_nowhere_else(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(ModelError, match="which is not a file beside it"):
        read_model(tmp_path)
    shutil.copyfile(mixtral[0] / "model.safetensors", tmp_path / "a.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(ModelError, match=r"holds lm_head\.weight, but .* does not say so"):
        read_model(tmp_path)


def test_a_quantised_base_is_refused(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(mixtral[0], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ModelError, match="its weights are quantised; give the 16-bit model"):
        merge(base, mixtral[1], tmp_path / "out")
