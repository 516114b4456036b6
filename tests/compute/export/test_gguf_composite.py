"""GGUF files of vision-language models: the language model, equal to transformers', and the projector file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from llama_stack_provider_moe.compute.export import gguf
from llama_stack_provider_moe.compute.export.gguf_file import read_header
from llama_stack_provider_moe.compute.export.projector import NoProjector, ProjectorCheck, check_projector
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.errors import ExportError, InvalidInput
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder
from llama_stack_provider_moe.jobdir.scan import saved_artifacts
from llama_stack_provider_moe.spec.local_commands import GgufCommand
from tests.compute.recipes.test_export import asked, done, reason, states
from tests.compute.vision.test_images import rows_of
from tests.support import llama_support, tiny_vlms
from tests.support.training_support import Workshop, workshop

__all__ = ["workshop"]
FAMILY = "qwen3_vl_moe"


def build(family: str, folder: Path, seed: int = 0, **text: int) -> Path:
    """A tiny model with a tokenizer that the converter knows, saved by transformers."""

    def known(family: str) -> PreTrainedTokenizerFast:
        found, own = llama_support.tokenizer(), own_tokenizer(family)
        added = [AddedToken(each.content, normalized=False) for each in own.added_tokens_decoder.values()]
        found.add_tokens(added, special_tokens=True)
        found.chat_template, found.pad_token = own.chat_template, own.pad_token
        return found

    own_tokenizer = tiny_vlms.tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_vlms, "tokenizer", known)
        return tiny_vlms.build(family, folder, seed, vocab_size=len(known(family)), **text)


def as_published(folder: Path) -> None:
    """Give experts the order that they have in the family's published files."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.mT.contiguous() if ".experts." in name else tensor
               for name, tensor in load_file(file).items()}  # fmt: skip
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def base(workshop: Workshop) -> Path:
    """A tiny model in the order of its published files."""
    made = build(FAMILY, workshop.root / "models" / "published")
    as_published(made)
    return made


@pytest.fixture(scope="module")
def files(workshop: Workshop, base: Path) -> dict[str, Artifact]:
    """The artifacts of an export of a job that trained language model and projector on images."""
    folder = JobFolder(workshop.next_folder("sft"))
    job = workshop.run("sft", base, rows_of(folder, 4), adapter={"vision": "projector"},
                       data={"dataset_id": "train", "validation_dataset_id": None}, training={"batch_size": 4},
                       options={"max_length": 256, "validation_split": 0.0})  # fmt: skip
    assert job.exit_code == COMPLETED, job.reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_TRAIN_CACHE", str(llama_support.CACHE))
        llama_support.toolchain()
        made = asked(job, "files", gguf=["f32"])
        assert done(made) == COMPLETED, reason(made)
    assert states(made) == dict.fromkeys(("merged", "gguf-f32", "gguf-mmproj"), "completed")
    return {Path(each.path).name: each for each in saved_artifacts(made)}


def test_experts_in_the_order_of_transformers_are_refused(tmp_path: Path) -> None:
    """The converter would read them as something else."""
    model = tiny_vlms.build(FAMILY, tmp_path / "model")
    with pytest.raises(ExportError, match=r"experts, out, in\): \[4, \d+, \d+\] where the second is not the hidden"):
        gguf.make(model, tmp_path / "out.gguf", "f32", llama_support.toolchain())


def test_the_language_model_is_exported_and_the_other_file_is_named(files: dict[str, Artifact]) -> None:
    artifact = files["gguf-f32"]
    assert artifact.verification is not None
    assert artifact.verification["logits"]["relative_difference"] < 1e-4
    [note] = [note for note in artifact.verification["notes"] if "gguf-mmproj" in note]
    assert "reads text alone; its other parts (vision) are not in it" in note
    [file] = Path(artifact.path).glob("*.gguf")
    assert not [tensor for tensor in read_header(file).tensors if tensor.name.startswith("v.")]


def test_the_projector_file_has_the_trained_tower_and_projector(
    files: dict[str, Artifact], base: Path, tmp_path: Path
) -> None:
    """Every number, and none of the language model's; the base has another projector."""
    artifact = files["gguf-mmproj"]
    assert artifact.kind == "gguf"
    figures = artifact.verification
    assert figures is not None
    outside = [tensor for name, tensor in load_file(base / "model.safetensors").items() if ".visual." in name]
    assert figures["numbers"] == figures["same"] == figures["in_folder"] == sum(each.numel() for each in outside)
    assert (figures["projector"], figures["layers"], figures["width"]) == ("qwen3vl_merger", 2, 32)
    [file] = Path(artifact.path).glob("mmproj-*.gguf")
    names = {tensor.name for tensor in read_header(file).tensors}
    assert {"v.blk.1.attn_qkv.weight", "v.deepstack.0.fc1.weight", "mm.0.weight", "v.patch_embd.weight.1"} <= names
    assert not [name for name in names if not name.startswith(("v.", "mm."))]
    found = ProjectorCheck.model_validate({name: figures[name] for name in ProjectorCheck.model_fields})
    assert f"its {found.numbers:,} numbers are those of the folder's" in found.text()
    assert "the converter changed the others" in found.model_copy(update={"same": found.numbers - 8}).text()
    for other in (base, tiny_vlms.build(FAMILY, tmp_path / "other", seed=9)):  # another projector, another model
        with pytest.raises(ExportError, match=rf"[\d,]+ of its [\d,]+ numbers are those of {other.name}; expected all"):
            check_projector(file, other)
    narrow = tiny_vlms.build(FAMILY, tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (narrow / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="it makes vectors of 32 numbers, and the language model's have 64"):
        check_projector(file, narrow)


def test_broken_files_are_refused(files: dict[str, Artifact], base: Path, tmp_path: Path) -> None:
    [file] = Path(files["gguf-mmproj"].path).glob("*.gguf")
    [language] = Path(files["gguf-f32"].path).glob("*.gguf")
    with pytest.raises(ExportError, match=r"is not a projector file: general.architecture is 'qwen3vlmoe'"):
        check_projector(language, base)
    content, last = bytearray(file.read_bytes()), read_header(file).tensors[-1]
    content[last.start : last.start + 4] = torch.tensor([float("nan")]).numpy().tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    with pytest.raises(ExportError, match=f"tensor {last.name} has numbers that are not finite"):
        check_projector(broken, base)


def test_a_family_that_the_converter_does_not_know_is_named(base: Path, tmp_path: Path) -> None:
    """The converter itself says so; a text model has no such file."""
    (tmp_path / "model").mkdir()
    for file in base.iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["AriaForConditionalGeneration"]}
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(NoProjector, match=r"makes no projector file \(mmproj\) of AriaForConditionalGeneration"):
        gguf.make_projector(tmp_path / "model", tmp_path / "out.gguf", llama_support.toolchain())
    assert not list(tmp_path.glob("*.gguf"))
    text = llama_support.build("llama", tmp_path / "text")
    with pytest.raises(NoProjector, match="text has no vision tower"):
        gguf.make_projector(text, tmp_path / "out.gguf", llama_support.toolchain())


def test_a_projector_file_does_not_ask_for_the_order_of_experts(tmp_path: Path) -> None:
    """It has none of them; the language model's file does."""
    model = build(FAMILY, tmp_path / "model")
    found = gguf.make_projector(model, tmp_path / "out.gguf", llama_support.toolchain())
    assert found.numbers == found.same == found.in_folder > 10_000
    with pytest.raises(ExportError, match="has the order of transformers 5"):
        gguf.convert(model, tmp_path / "language.gguf", "f32", llama_support.toolchain())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "glm4v_moe", "llama4"])
def test_projector_files_of_other_families(family: str, tmp_path: Path) -> None:
    chunk = {"attention_chunk_size": 8192} if family == "llama4" else {}
    model = build(family, tmp_path / "model", **chunk)
    found = gguf.make_projector(model, tmp_path / "out.gguf", llama_support.toolchain())
    assert found.numbers == found.same == found.in_folder > 10_000


def test_the_command_takes_one_of_both_files() -> None:
    command = {"model": "MODEL", "out": "OUT"}
    GgufCommand.model_validate({**command, "mmproj": True}).require_one_file()
    for more, expected in (({}, "--type: is missing"), ({"type": "f16", "mmproj": True}, "none with --mmproj")):
        with pytest.raises(InvalidInput, match=expected):
            GgufCommand.model_validate({**command, **more}).require_one_file()
