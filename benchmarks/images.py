"""Whether a job learns from its images: the colour of a drawn disc, with the images in place and shuffled among rows.

    $ OMP_NUM_THREADS=1 python -m benchmarks.images     # two minutes on one core

A tiny random Qwen3-VL-MoE learns to name the colour of a disc (one of four) that differs in place and size. All weights
of its language model train; the vision tower stays random. Accuracy is on held-out images: which of the four answers'
first tokens has the highest logit. In the second job every row has another row's image, and nothing else differs.
"""

import argparse
import io
import json
import random
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.compute.analysis.plots import DPI, new_figure
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support import tiny_vlms
from tests.support.training_support import Workshop, said

ROOT = Path(__file__).parents[1]
CHART = ROOT / "docs" / "guides" / "vision.svg"
COLOURS = tuple(tiny_vlms.COLOURS)
QUESTION = "Which colour?"


def picture(colour: str, drawn: random.Random) -> bytes:
    """A file of 16 x 16 pixels: a disc of a colour on grey, anywhere, of any size."""
    made = Image.new("RGB", (16, 16), (128, 128, 128))
    size, left, top = drawn.randint(8, 12), drawn.randint(0, 4), drawn.randint(0, 4)
    ImageDraw.Draw(made).ellipse((left, top, left + size, top + size), fill=tiny_vlms.COLOURS[colour])
    file = io.BytesIO()
    made.save(file, "PNG")
    return file.getvalue()


def rows(folder: JobFolder, count: int, shuffled: bool) -> list[Any]:
    """Rows of a job; `shuffled`: each with another row's image."""
    drawn = random.Random(1)
    colours = [COLOURS[index % len(COLOURS)] for index in range(count)]
    parts = [tiny_vlms.put(folder, picture(colour, drawn)) for colour in colours]
    if shuffled:
        drawn.shuffle(parts)
    return [
        {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]},
                said("assistant", colour),
            ]
        }
        for part, colour in zip(parts, colours, strict=True)
    ]


def accuracy(folder: Path, held_out: int) -> float:
    """The share of held-out images whose colour a model in a folder names; plain transformers."""
    drawn = random.Random(2)
    colours = [COLOURS[index % len(COLOURS)] for index in range(held_out)]
    files = [Image.open(io.BytesIO(picture(colour, drawn))).convert("RGB") for colour in colours]
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    batch = processor(text=[text] * held_out, images=files, return_tensors="pt")
    first = [processor.tokenizer(colour, add_special_tokens=False)["input_ids"][0] for colour in COLOURS]
    with torch.no_grad():
        logits = model(**batch).logits[:, -1, first]
    named: list[str] = [COLOURS[index] for index in logits.argmax(dim=-1).tolist()]
    right: int = sum(one == other for one, other in zip(named, colours, strict=True))
    return right / held_out


def measure(count: int, epochs: int, held_out: int, lr: float = 3e-3) -> dict[str, list[float]]:
    """Held-out accuracy before training and after the last epoch, of a job with its images and one with shuffled ones.

    Args:
        count: rows.
        epochs: passes over them.
        held_out: images that accuracy is measured on.
        lr: learning rate.
    """
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as root:
        workshop = Workshop(Path(root))
        base = tiny_vlms.build("qwen3_vl_moe", Path(root) / "base")
        for name in ("images in place", "images shuffled"):
            folder = JobFolder(workshop.next_folder("sft"))
            made = rows(folder, count, name == "images shuffled")
            job = workshop.run(
                "sft", base, made, adapter=None, optimizer={"lr": lr},
                data={"dataset_id": "colours", "validation_dataset_id": None},
                training={"batch_size": 16, "n_epochs": epochs},
                options={"validation_split": 0.0, "keep_checkpoints": epochs},
            )  # fmt: skip
            assert job.exit_code == 0, job.reason
            after = [
                accuracy(job.folder.root / "checkpoints" / f"epoch-{epoch}", held_out) for epoch in range(1, epochs)
            ]
            found[name] = [accuracy(base, held_out), *after, accuracy(job.folder.model, held_out)]
    return found


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Draw accuracy by epoch."""
    figure = new_figure(6.0, 3.2)
    axes = figure.add_subplot()
    for name, values in found.items():
        axes.plot(range(len(values)), values, marker="o", label=name)
    axes.axhline(1 / len(COLOURS), color="grey", linestyle=":", label="chance")
    axes.set(xlabel="epoch", ylabel="held-out accuracy", ylim=(0, 1.05))
    axes.legend(loc="center right")
    figure.savefig(path, dpi=DPI)


def main() -> None:
    """Measure, print, draw, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=100)
    given = parser.parse_args()
    found = measure(given.rows, given.epochs, given.held_out)
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(),
        "versions": versions("torch", "torchvision", "transformers"),
        "shape": {"rows": given.rows, "epochs": given.epochs, "held_out": given.held_out, "colours": len(COLOURS)},
        "accuracy": found,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    path = RESULTS / f"images_{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(found, CHART)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
