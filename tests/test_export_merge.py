"""A merge on disk: logits of the adapted model, every tensor once, bounded memory, and all of it or nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.errors import AdapterError, InvalidInput, ModelError, MoeError, NoRoom
from llama_stack_provider_moe.experts.adapters import add_lora
from llama_stack_provider_moe.experts.layout import find_layout
from llama_stack_provider_moe.experts.settings import apply_moe, resolve_moe
from llama_stack_provider_moe.experts.steering import ROUTER_BIAS
from llama_stack_provider_moe.export import merge as merging
from llama_stack_provider_moe.export.merge import main, merge, shard_size
from llama_stack_provider_moe.export.tensors import read_header, read_model
from llama_stack_provider_moe.spec import Adapter, Moe
from llama_stack_provider_moe.training import checkpoints
from tests import tiny_models

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))
EVERYTHING = Adapter(rank=2, alpha=4, apply_lora_to_output=True)
# Measured over all families, with logits of about 2: see `test_every_family`.
LOGITS_TOLERANCE, WEIGHTS_TOLERANCE = 1e-5, 1e-6


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def gap(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def adapted(base: Path, out: Path, adapter: Adapter, **moe: Any) -> Path:
    """Save an adapter of `base` as a job does, with B as if trained."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    layout = find_layout(model)
    resolved = resolve_moe(Moe(**moe), layout, full=False)
    shipped = apply_moe(model, layout, resolved)
    peft_model = add_lora(model, adapter, layout, resolved).model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    checkpoints.save(peft_model, tiny_models.tokenizer(), out, shipped.restored(), step=1)
    return out


def by_peft(base: Path, adapter: Path) -> PeftModel:
    model: PeftModel = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_equal_to_peft(base: Path, adapter: Path, out: Path, folder: Path) -> None:
    """The laws: PEFT's logits, its in-memory merge's weights under the same names, and something did change."""
    model = by_peft(base, adapter)
    plain, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    expected = logits(model)
    assert gap(logits(plain.eval()), expected) <= LOGITS_TOLERANCE
    with model.disable_adapter():
        assert gap(logits(model), expected) > 1e-3
    checkpoints.merge(model).save_pretrained(folder / "in_memory")
    by_torch, ours = tensors(folder / "in_memory"), tensors(out)
    assert set(ours) == set(by_torch) == set(tensors(base))
    for name, tensor in ours.items():
        assert tensor.dtype == by_torch[name].dtype
        assert gap(tensor, by_torch[name]) <= WEIGHTS_TOLERANCE, name


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    base = tiny_models.build(family, tmp_path / "base")
    moe = {} if family in tiny_models.DENSE else {"train_router": True}
    adapter = adapted(base, tmp_path / "adapter", EVERYTHING, **moe)
    report = merge(base, adapter, tmp_path / "out")
    assert_equal_to_peft(base, adapter, tmp_path / "out", tmp_path)
    # What is not adapted is the base's, bit by bit; every other tensor moved.
    before, after = tensors(base), tensors(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == report.merged > 0
    assert (report.merged + report.copied, report.replaced) == (len(before), 0)
    assert 2 * sum(report.adapted.values()) == report.adapter_tensors
