"""Laws of training on rows with images, on tiny models of each kind, with the trainer and the files that users get."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llama_stack_provider_moe.compute.export.load_check import AS_TRAINED, check, check_adapter, check_merged
from llama_stack_provider_moe.compute.worker.main import COMPLETED, STOPPED
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.jobdir.checkpoint_index import verify
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support import tiny_vlms
from tests.support.training_support import Run, Workshop, said, workshop

__all__ = ["workshop"]

NAMES = list(tiny_vlms.COLOURS)


def vlm(workshop: Workshop, family: str) -> Path:
    """Folder of the tiny model of a family."""
    folder = workshop.root / "models" / family
    return folder if folder.is_dir() else tiny_vlms.build(family, folder)


def asked(*parts: Any) -> dict[str, Any]:
    """A user's message of parts; a text may stand for its part."""
    made = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": made}


def rows_of(folder: JobFolder, count: int = 8) -> list[Any]:
    """Rows of which each third has no image, each fourth two, and sizes differ."""
    rows: list[Any] = []
    for index in range(count):
        colour, other = NAMES[index % 4], NAMES[(index + 1) % 4]
        picture = tiny_vlms.put(folder, tiny_vlms.drawn(colour, 24 + 8 * (index % 2), 16))
        if index % 3 == 2:
            rows.append({"messages": [said("user", f"Say {colour}."), said("assistant", f"It is {colour}.")]})
        elif index % 4 == 3:
            second = tiny_vlms.put(folder, tiny_vlms.drawn(other, 16, 16, "webp"))
            answer = said("assistant", f"{colour}, then {other}.")
            rows.append({"messages": [asked(picture, "and", second, "?"), answer]})
        else:
            rows.append({"messages": [asked(picture, "Which colour?"), said("assistant", f"It is {colour}.")]})
    return rows


def pairs_of(folder: JobFolder, count: int = 8) -> list[Any]:
    """The same rows as pairs, the answer against another."""
    return [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [said("assistant", "I can't see.")]}
        for row in rows_of(folder, count)
    ]


def run(workshop: Workshop, family: str, rows: Any = rows_of, recipe: str = "sft", **blocks: Any) -> Run:
    """A job on such rows: two steps of four rows, in the order of the file."""
    folder = JobFolder(workshop.next_folder(recipe))
    made = rows(folder)
    settings: dict[str, Any] = {
        "data": {"dataset_id": "train", "validation_dataset_id": None, "shuffle": False},
        "training": {"batch_size": 4},
        "options": {"max_length": 256, "validation_split": 0.0},
    }
    for name, block in blocks.items():
        settings[name] = {**settings.get(name, {}), **block} if isinstance(block, dict) else block
    return workshop.run(recipe, vlm(workshop, family), made, **settings)


def batch_of(processor: Any, folder: JobFolder, messages: list[Any]) -> dict[str, torch.Tensor]:
    """Transformers' own batch of one conversation: none of our code."""
    files, plain = [], []
    for message in messages:
        if isinstance(message["content"], str):
            plain.append(message)
            continue
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                files.append(Image.open(folder.image(part["sha256"], part["format"])).convert("RGB"))
            parts.append({"type": "image"} if part["type"] == "image" else part)
        plain.append({**message, "content": parts})
    text = processor.apply_chat_template(plain, tokenize=False).removesuffix("\n")
    given: dict[str, Any] = {"images": files, "images_kwargs": {"return_tensors": "pt"}} if files else {}
    batch = {name: torch.as_tensor(value) for name, value in processor(text=[text], **given).items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


def nll(model: Any, processor: Any, folder: JobFolder, rows: list[Any]) -> float:
    """Cross entropy of the answers' tokens, one row at a time, by plain transformers."""
    total, tokens = 0.0, 0
    for row in rows:
        found, count = score(model, batch_of(processor, folder, row["messages"]), header(processor))
        total, tokens = total - found, tokens + count
    return total / tokens


def header(processor: Any) -> list[int]:
    """The tokens in front of an answer."""
    ids: list[int] = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    return ids


def score(model: Any, batch: dict[str, torch.Tensor], prompt: list[int]) -> tuple[float, int]:
    """Summed log-probability of the tokens behind the last prompt, and their number."""
    ids = batch["input_ids"][0].tolist()
    begin = max(at + len(prompt) for at in range(len(ids)) if ids[at : at + len(prompt)] == prompt)
    with torch.no_grad():
        log_probs = model(**batch).logits[0, :-1].log_softmax(-1)
    picked = log_probs.gather(-1, batch["input_ids"][0, 1:, None])[begin - 1 :, 0]
    return picked.sum().item(), len(picked)


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_the_loss_is_the_models_own(family: str, workshop: Workshop) -> None:
    """Of the first step, over rows with no, one and two images, to 1e-5; the tower stays as it was, bit for bit.

    Adapter and merged model load in plain transformers and PEFT, and their processor beside them; the load check asks
    both about images.
    """
    job = run(workshop, family, options={"save_merged": True})
    assert job.exit_code == COMPLETED, job.reason
    folder = vlm(workshop, family)
    processor, base = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    rows = rows_of(job.folder)
    assert job.steps("ce")[0] == pytest.approx(nll(base, processor, job.folder, rows[:4]), abs=1e-5)
    merged = AutoModelForImageTextToText.from_pretrained(job.folder.merged).eval()
    before, after = dict(base.named_parameters()), dict(merged.named_parameters())
    vision = [name for name in before if "language_model" not in name and not name.startswith("lm_head")]
    assert len(vision) > 20
    assert all(torch.equal(before[name], after[name]) for name in vision)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for card in (job.folder.adapter, job.folder.merged):
        assert "from transformers import AutoModelForImageTextToText, AutoProcessor" in (card / "README.md").read_text()
    kept = AutoProcessor.from_pretrained(job.folder.merged)
    batch = batch_of(kept, job.folder, rows[0]["messages"])
    tuned = PeftModel.from_pretrained(base, job.folder.adapter).eval()
    with torch.no_grad():
        assert (merged(**batch).logits - tuned(**batch).logits).abs().max() < 1e-5
    found, of_merged = check(job.folder.root), check_merged(job.folder.merged, job.folder.adapter)
    assert found.as_trained.greatest == 0
    for effect in (found.effect_of_image, of_merged.effect_of_image):
        assert effect is not None
        assert effect.share > 100 * AS_TRAINED["fp32"]
    assert "through the saved processor; another image moves logits by" in found.text()
    if family != "qwen3_vl":
        sets = job.events("routing")[0].sets
        assert set(sets) == {"text", "image"}
        assert sets["text"] != sets["image"]


def test_a_load_check_notices_another_processor_and_a_blind_model(workshop: Workshop, tmp_path: Path) -> None:
    """Nothing else differs: the weights of adapter and language model are those of the training."""
    job = run(workshop, "qwen3_vl_moe", options={"save_merged": True})
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    shutil.copytree(job.folder.merged, merged)
    shutil.copytree(job.folder.adapter, adapter)
    base = vlm(workshop, "qwen3_vl_moe")
    weights = load_file(merged / "model.safetensors")
    blind = {name: value * 0 if ".merger.linear_fc2." in name or ".deepstack" in name else value
             for name, value in weights.items()}  # fmt: skip
    save_file(blind, merged / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="another image moves the loaded model's logits by 0 of their spread"):
        check_merged(merged, job.folder.adapter)

    [file] = [each for each in adapter.glob("*processor_config.json") if "image_mean" in each.read_text()]
    said = file.read_text()
    file.write_text(said.replace('"patch_size": 4', '"patch_size": 8'))
    with pytest.raises(AdapterError, match="tokens for a question about an image that had"):
        check_adapter(adapter, str(base))
    file.write_text(said.replace('"do_normalize": true', '"do_normalize": false'))
    with pytest.raises(AdapterError, match="does not hold what was trained"):
        check_adapter(adapter, str(base))
    file.unlink()
    with pytest.raises(AdapterError, match="the processor of images beside it can't be loaded"):
        check_adapter(adapter, str(base))


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_pairs_with_images_in_the_prompt(family: str, workshop: Workshop) -> None:
    """The log-probabilities of the first step are the model's own: of pairs with no, one and two images."""
    job = run(workshop, family, pairs_of, "dpo")
    assert job.exit_code == COMPLETED, job.reason
    folder = vlm(workshop, family)
    processor, base = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    for which in ("chosen", "rejected"):
        wanted = [
            score(base, batch_of(processor, job.folder, row["prompt"] + row[which]), header(processor))[0]
            for row in pairs_of(job.folder)[:4]
        ]
        assert job.steps(f"logps/{which}")[0] == pytest.approx(sum(wanted) / 4, abs=1e-4)


def swapped(folder: JobFolder) -> list[Any]:
    """The rows with the images of the first two swapped."""
    rows = rows_of(folder)
    first, second = rows[0]["messages"][0]["content"], rows[1]["messages"][0]["content"]
    first[0], second[0] = second[0], first[0]
    return rows


def with_another(folder: JobFolder) -> list[Any]:
    """The rows with another image of the same size in the first."""
    rows = rows_of(folder)
    rows[0]["messages"][0]["content"][0] = tiny_vlms.put(folder, tiny_vlms.drawn("red", place=6))
    return rows


def test_images_and_their_places_change_the_loss(workshop: Workshop) -> None:
    """Another backend of experts does not."""
    plain = run(workshop, "qwen3_vl_moe")
    for rows in (swapped, with_another):
        other = run(workshop, "qwen3_vl_moe", rows)
        assert other.exit_code == COMPLETED, other.reason
        assert abs(other.steps("ce")[0] - plain.steps("ce")[0]) > 1e-4
    grouped = run(workshop, "qwen3_vl_moe", moe={"experts_backend": "peft"})
    backends = [each.resolved["moe"]["experts_implementation"] for each in (plain, grouped)]
    assert backends == ["moe_torch", "grouped_mm"]
    for name in ("ce", "grad_norm"):
        assert grouped.steps(name)[0] == pytest.approx(plain.steps(name)[0], abs=1e-5)


def test_a_resumed_job_ends_as_an_unbroken_one(workshop: Workshop) -> None:
    job = run(workshop, "qwen3_vl_moe", training={"n_epochs": 2}, data={"shuffle": True})
    shutil.rmtree(job.folder.root / "checkpoints" / "epoch-2")
    resumed = workshop.again(Run(workshop.copied(job), 0))
    assert resumed.exit_code == COMPLETED, resumed.reason
    assert [event.step for event in resumed.events("step")][-2:] == [3, 4]
    wanted, found = job.adapter(), resumed.adapter()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_cancelled_job_finishes_its_step_and_leaves_a_checkpoint(workshop: Workshop) -> None:
    """With images in every batch; the checkpoint is one that a job goes on from."""
    events = JobFolder(workshop.next_folder("sft")).events

    def watch() -> None:
        while sum(event.type == "step" for event in read(events).events) < 2:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    job = run(workshop, "qwen3_vl_moe", training={"n_epochs": 500})
    watcher.join()
    assert job.exit_code == STOPPED
    assert job.folder.read_manifest() is None
    saved = job.events("saved")[-1].artifact  # named by its step, or by its epoch where that was the epoch's last
    assert saved["step"] == job.events("step")[-1].step == job.events("cancelled")[0].step
    assert verify(Path(saved["path"])) is None


@pytest.mark.parametrize(
    ("family", "vision"), [("qwen3_vl_moe", "projector"), ("llama4", "tower"), ("glm4v_moe", "tower")]
)
def test_tower_and_projector_train_when_asked(family: str, vision: str, workshop: Workshop) -> None:
    job = run(workshop, family, adapter={"vision": vision})
    assert job.exit_code == COMPLETED, job.reason
    parts = {"projector", "tower"} if vision == "tower" else {"projector"}
    groups = job.resolved["adapter"]["by_group"]
    assert set(groups) & {"projector", "tower"} == parts
    beside = [name for name in job.adapter() if "language_model" not in name]
    assert all(groups[part] > 0 for part in parts)
    assert beside
    assert all(job.adapter()[name].abs().max() > 0 for name in beside if "lora_B" in name)
