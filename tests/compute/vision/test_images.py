"""Laws of training on rows with images, on tiny models of each kind, with the trainer and the files that users get."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llama_stack_provider_moe.compute.worker.main import COMPLETED
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
        batch = batch_of(processor, folder, row["messages"])
        prompt = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        ids = batch["input_ids"][0].tolist()
        begin = max(at + len(prompt) for at in range(len(ids)) if ids[at : at + len(prompt)] == prompt)
        with torch.no_grad():
            log_probs = model(**batch).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(-1, batch["input_ids"][0, 1:, None])[begin - 1 :, 0]
        total, tokens = total - picked.sum().item(), tokens + len(picked)
    return total / tokens


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_the_loss_is_the_models_own(family: str, workshop: Workshop) -> None:
    """Of the first step, over rows with no, one and two images, to 1e-5; the tower stays as it was, bit for bit."""
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
