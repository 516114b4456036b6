"""GGUF files of vision-language models: the language model, equal to transformers', and a word on what is left out."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llama_stack_provider_moe.compute.export import gguf
from llama_stack_provider_moe.compute.export.gguf_file import read_header
from llama_stack_provider_moe.errors import ExportError
from tests.support import llama_support, tiny_vlms


def build(folder: Path, **text: int) -> Path:
    """A tiny Qwen3-VL-MoE with a tokenizer that the converter knows, saved by transformers."""
    known = llama_support.tokenizer()
    ids = {"vocab_size": len(known), "eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id}
    tiny_vlms.model("qwen3_vl_moe", **ids, **text).save_pretrained(folder)
    tiny_vlms.processor("qwen3_vl_moe").save_pretrained(folder)
    known.save_pretrained(folder)
    return folder


def as_published(folder: Path) -> None:
    """Give experts the order that they have in the family's published files."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.mT.contiguous() if ".experts." in name else tensor
               for name, tensor in load_file(file).items()}  # fmt: skip
    save_file(tensors, file, {"format": "pt"})


def test_the_language_model_is_exported_and_the_rest_is_named(tmp_path: Path) -> None:
    """Experts in the order of transformers 5 are refused: the converter would read them as something else."""
    model, tools = build(tmp_path / "model"), llama_support.toolchain()
    with pytest.raises(ExportError, match=r"experts, out, in\): \[4, \d+, \d+\] where the second is not the hidden"):
        gguf.make(model, tmp_path / "out.gguf", "f32", tools)
    as_published(model)
    check = gguf.make(model, tmp_path / "out.gguf", "f32", tools)
    assert check.logits is not None
    assert check.logits.relative_difference < 1e-4
    [note] = [note for note in check.notes if "--mmproj" in note]
    assert "reads text alone; its other parts (vision) are not in it" in note
    assert not [tensor for tensor in read_header(tmp_path / "out.gguf").tensors if tensor.name.startswith("v.")]
