"""GGUF files: every type is what it says, holds what the model computes, and is refused where it does not.

llama.cpp itself runs in these tests (`llama_support.toolchain`), on a tiny Granite MoE with GPT-2's tokenizer.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from transformers import AutoConfig

from llama_stack_provider_moe.compute.export import gguf, verify
from llama_stack_provider_moe.compute.export.gguf_file import read_header
from llama_stack_provider_moe.compute.export.reference import Reference, read_reference
from llama_stack_provider_moe.compute.models.rope import scaled_config
from llama_stack_provider_moe.errors import ExportError, InvalidInput, ModelError, NoRoom, NoToolchain
from llama_stack_provider_moe.llama_cpp import Toolchain
from llama_stack_provider_moe.spec.gguf_types import GGUF_TYPES, GgufType
from llama_stack_provider_moe.spec.options import RopeScaling
from tests.support import llama_support, tiny_models
from tests.support.chosen import few
from tests.support.llama_support import ALIGNED

_MIXTURES = {"q2_k": "Q2_K", "q3_k_m": "Q3_K", "q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_s": "Q5_K", "q5_k_m": "Q5_K"}


@pytest.fixture(scope="module")
def tools() -> Toolchain:
    return llama_support.toolchain()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Iterator[Path]:
    """`model`, whose rows fill blocks of 256 numbers, and `f32.gguf` of it."""
    folder = tmp_path_factory.mktemp("gguf")
    model = llama_support.build("granitemoe", folder / "model", initializer_range=0.03, **ALIGNED)
    gguf.convert(model, folder / "f32.gguf", "f32", tools)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def reference(made: Path) -> Reference:
    return read_reference(made / "model", say=lambda line: None)


def test_f32_is_the_model(made: Path, tools: Toolchain, reference: Reference) -> None:
    check = verify.verify(made / "f32.gguf", made / "model", tools, reference, "f32")
    assert check.logits is not None
    assert check.logits.computed_in == "float32"
    assert check.logits.positions > 100
    # Measured: 3e-6 of the spread.
    assert 0 < check.logits.relative_difference < 1e-4
    assert set(check.tensor_types) == {"F32"}
    assert check.notes == ()
    assert check.continuation
    assert "<|im_start|>" in reference.texts[-1]
    assert reference.chat_template == read_header(made / "f32.gguf").metadata["tokenizer.chat_template"]


@pytest.mark.parametrize("kind", [kind for kind in GGUF_TYPES if kind not in gguf.CONVERTED])
def test_each_quantised_type_is_read_back(
    kind: GgufType, made: Path, tools: Toolchain, reference: Reference, tmp_path: Path
) -> None:
    check = gguf.make(made / "model", tmp_path / "out.gguf", kind, tools, made / "f32.gguf", reference)
    main = _MIXTURES.get(kind, kind.upper())
    assert check.tensor_types[main] > 0
    assert check.logits is not None
    assert 0 < check.logits.mean_kl <= check.logits.bounds["mean_kl"]
    assert not [note for note in check.notes if note.startswith("asked for")]
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    size = (tmp_path / "out.gguf").stat().st_size
    entries = list(gguf.read_model(made / "model").values())
    assert 0.93 * size < gguf._estimate(entries, kind) + gguf._SLACK_BYTES < 1.5 * size + gguf._SLACK_BYTES


@pytest.mark.wide
def test_rows_that_do_not_fill_blocks_are_reported(tools: Toolchain, tmp_path: Path) -> None:
    """The whole way by `make`: the intermediate is made, verified and gone."""
    model = llama_support.build("mixtral", tmp_path / "model", hidden_size=64, intermediate_size=96)
    assert gguf.lossless(model) == "f32"
    said: list[str] = []
    check = gguf.make(model, tmp_path / "out.gguf", "q4_k_m", tools, say=said.append)
    assert "Q4_K" not in check.tensor_types
    (note,) = check.notes
    assert note.startswith("asked for q4_k_m, but only 0 of")
    assert "rows of 64, 96 numbers do not fill blocks of 256" in note
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]
    assert any("lossless.gguf" in line for line in said)


def test_a_file_of_other_weights_is_refused(made: Path, tools: Toolchain, reference: Reference, tmp_path: Path) -> None:
    other = made / "other"
    llama_support.build("granitemoe", other, seed=1, initializer_range=0.03, **ALIGNED)
    wrong = read_reference(other, say=lambda line: None)
    with pytest.raises(ExportError, match="logits differ from the model's: mean_kl"):
        verify.verify(made / "f32.gguf", other, tools, wrong)
    with pytest.raises(ExportError, match="logits differ from the model's: mean_kl"):
        gguf.make(other, tmp_path / "out.gguf", "q2_k", tools, made / "f32.gguf", wrong)
    assert not list(tmp_path.iterdir())
    tokens = ([*reference.tokens[0][:3], 7, *reference.tokens[0][4:]], *reference.tokens[1:])
    with pytest.raises(ExportError, match="differently from transformers, from token 3 on"):
        verify.verify(made / "f32.gguf", made / "model", tools, replace(reference, tokens=tokens))


def test_a_model_too_large_for_memory_is_reported(made: Path, tools: Toolchain) -> None:
    reference = read_reference(made / "model", available_bytes=10**6, say=lambda line: None)
    assert reference.logits is None
    check = verify.verify(made / "f32.gguf", made / "model", tools, reference)
    assert check.logits is None
    assert "not compared: the model needs" in check.notes[0]
    assert "1,000,000 are free" in check.text()


@pytest.mark.parametrize("cut", [3, 1000, -5])
def test_a_broken_file_is_refused(cut: int, made: Path, tools: Toolchain, reference: Reference, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((made / "f32.gguf").read_bytes()[:cut])
    with pytest.raises(ExportError, match=r"broken\.gguf"):
        verify.verify(broken, made / "model", tools, reference)


def test_what_aborts_llama_cpp_is_an_error(made: Path, tools: Toolchain, reference: Reference, tmp_path: Path) -> None:
    """Not a number in a tensor, whose data llama.cpp is told to check; its last words are told."""
    broken = tmp_path / "broken.gguf"
    shutil.copyfile(made / "f32.gguf", broken)
    with broken.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    with pytest.raises(ExportError, match=r"llama\.cpp \(run\) ended with .* its last output"):
        verify.verify(broken, made / "model", tools, reference)


def test_unknown_models_and_tokenizers_are_named(made: Path, tools: Toolchain, tmp_path: Path) -> None:
    trained = tiny_models.build("llama", tmp_path / "trained")
    with pytest.raises(ExportError, match="does not know this tokenizer"):
        gguf.knows(trained, tools)
    strange = tmp_path / "strange"
    shutil.copytree(made / "model", strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(ExportError, match="does not know the architecture NobodysForCausalLM"):
        gguf.convert(strange, tmp_path / "out.gguf", "f16", tools)
    qwen = {**config, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": False}
    (strange / "config.json").write_text(json.dumps(qwen))
    with pytest.raises(ExportError, match="every qwen3_moe model with norm_topk_prob true"):
        gguf.convert(strange, tmp_path / "out.gguf", "f16", tools)
    for file in strange.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        gguf.knows(strange, tools)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strange", "trained"]


def test_bad_arguments(made: Path, tools: Toolchain, tmp_path: Path) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_text("x")
    with pytest.raises(InvalidInput, match="does not exist yet"):
        gguf.make(made / "model", taken, "f16", tools)
    with pytest.raises(InvalidInput, match="f32, f16, bf16, q8_0"):
        gguf.convert(made / "model", tmp_path / "out.gguf", "q4_k_m", tools)
    with pytest.raises(InvalidInput, match="`convert` writes the others"):
        gguf.quantize(made / "f32.gguf", tmp_path / "out.gguf", "q8_0", tools)
    gguf.quantize(made / "f32.gguf", tmp_path / "q4_0.gguf", "q4_0", tools)
    with pytest.raises(InvalidInput, match="a file of F32, F16 or BF16, not of"):
        gguf.quantize(tmp_path / "q4_0.gguf", tmp_path / "out.gguf", "q4_1", tools)
    assert gguf.main([str(made / "model"), str(tmp_path / "out.gguf"), "--type", "q4"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q4_0.gguf", "taken.gguf"]


def test_a_full_disk_is_reported_before_the_start(
    made: Path, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    needed = gguf.bytes_needed(made / "model", ["q4_k_m"])
    size = (made / "f32.gguf").stat().st_size
    assert size < needed < 1.5 * size
    with pytest.raises(NoRoom, match=rf"{needed:,} bytes, and its disk has 1,000,000 free"):
        gguf.make(made / "model", tmp_path / "out.gguf", "q4_k_m", tools)
    with pytest.raises(NoRoom, match="nothing was written"):
        gguf.quantize(made / "f32.gguf", tmp_path / "out.gguf", "q4_k_m", tools)
    assert not list(tmp_path.iterdir())


def test_missing_packages_of_the_converter_are_named(
    made: Path, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "missing_for_conversion", lambda: ["sentencepiece"])
    with pytest.raises(NoToolchain, match=r"sentencepiece.*llama-stack-provider-moe\[export\]"):
        gguf.make(made / "model", tmp_path / "out.gguf", "f16", tools)


def test_leftovers_of_a_killed_export_are_removed(made: Path, tools: Toolchain, tmp_path: Path) -> None:
    left = tmp_path / ".out.gguf.making"
    left.mkdir()
    (left / "out.gguf").write_bytes(b"half")
    gguf.quantize(made / "f32.gguf", tmp_path / "out.gguf", "q5_0", tools)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert read_header(tmp_path / "out.gguf").type_counts()["Q5_0"]


@pytest.mark.parametrize("kind", few(["yarn", "linear"], 1))
def test_a_longer_context_is_in_the_file(kind: Literal["yarn", "linear"], tmp_path: Path, tools: Toolchain) -> None:
    """llama.cpp's keys for scaled RoPE; it computes what transformers does from the same config."""
    model = llama_support.build("llama", tmp_path / "model", max_position_embeddings=64, **ALIGNED)
    config = AutoConfig.from_pretrained(model)
    scaled_config(config, RopeScaling(type=kind, factor=8)).save_pretrained(model)
    gguf.convert(model, tmp_path / "f32.gguf", "f32", tools)
    metadata = read_header(tmp_path / "f32.gguf").metadata
    assert (metadata["llama.rope.scaling.type"], metadata["llama.rope.scaling.factor"]) == (kind, 8)
    if kind == "yarn":
        assert metadata["llama.rope.scaling.original_context_length"] == 64
        assert metadata["llama.context_length"] == 512
    reference = read_reference(model, say=lambda line: None)
    check = verify.verify(tmp_path / "f32.gguf", model, tools, reference, "f32")
    assert check.logits is not None
    assert 0 < check.logits.relative_difference < 1e-3
