"""Laws of rows with images before anything trains: tokens, labels, lengths, files that can't be decoded, refusals."""

import io
import json
import pickle
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DefaultDataCollator

from llama_stack_provider_moe.compute.data.answers import DpoEncoder
from llama_stack_provider_moe.compute.data.encoding import Limit, Problem, SftEncoder
from llama_stack_provider_moe.compute.data.image_collator import ImageCollator
from llama_stack_provider_moe.compute.data.rendering import Rendering
from llama_stack_provider_moe.compute.data.token_profile import profile
from llama_stack_provider_moe.compute.models.images import Images
from llama_stack_provider_moe.compute.models.row_images import image_of, images_of
from llama_stack_provider_moe.compute.worker.main import FAILED
from llama_stack_provider_moe.errors import DataError, InvalidInput
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.image_limits import require_trainable_images
from tests.support import tiny_vlms
from tests.support.training_support import Workshop, said, workshop

__all__ = ["workshop"]

LONG = Limit(4096)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    """An empty job's folder."""
    return JobFolder(tmp_path / "job")


def images_in(folder: JobFolder, family: str = "qwen3_vl_moe") -> Images:
    """The images of a job on a tiny model of a family."""
    processor = tiny_vlms.processor(family)
    return Images(processor, folder, processor.image_token, torch.float32)


def encoder(images: Images, limit: Limit = LONG, rendering: Rendering = Rendering(), **more: Any) -> SftEncoder:  # noqa: B008
    """An encoder of the tiny model's rows."""
    return SftEncoder(images.processor.tokenizer, rendering, limit, images=images, **more)


def row(folder: JobFolder, text: str = "Which colour?", width: int = 24) -> Any:
    """A row with one image behind a text."""
    part = tiny_vlms.put(folder, tiny_vlms.drawn("blue", width))
    content = [{"type": "text", "text": text}, part, {"type": "text", "text": "?"}]
    return {"messages": [{"role": "user", "content": content}, said("assistant", "It is blue.")]}


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_tokens_are_the_processors_and_no_image_is_learnt(family: str, folder: JobFolder) -> None:
    """Also where all tokens of a row are learnt; only the answer where they are not."""
    images, one = images_in(folder, family), row(folder, width=80)
    [[encoded]], [[whole]] = encoder(images)([one]), encoder(images, train_on_input=True)([one])
    asked = [{"type": "image"} if part["type"] == "image" else part for part in one["messages"][0]["content"]]
    messages = [{"role": "user", "content": asked}, one["messages"][1]]
    text = images.processor.apply_chat_template(messages, tokenize=False)
    opened = [images.opened(image) for image in images_of(one["messages"])]
    ids = images.processor(text=[text], images=opened)["input_ids"][0]
    assert whole.columns["input_ids"] == ids
    of_images = images.ids(images_of(one["messages"]))
    assert len([token for token in ids if token in of_images]) > 5
    labelled = [token in of_images for token in ids]
    assert [label == -100 for label in whole.columns["labels"]] == labelled
    learnt = [token for token in encoded.columns["labels"] if token != -100]
    assert images.processor.tokenizer.decode(learnt) == "It is blue.<|im_end|>"
    assert [image_of(text) for text in encoded.texts["pictures"].split()] == images_of(one["messages"])


def test_a_row_too_long_is_named_and_never_cut(folder: JobFolder) -> None:
    images, one = images_in(folder), row(folder, width=160)
    length = len(encoder(images)([one])[0][0].columns["input_ids"])  # type: ignore[union-attr]
    for truncate in ("right", "left", "refuse", "drop"):
        [problem] = encoder(images, Limit(length - 1, truncate))([one])  # type: ignore[arg-type]
        assert isinstance(problem, Problem)
        told = f"has {length} tokens, 40 of them for images, more than options.max_length = {length - 1}"
        assert problem.reason.startswith(told)
        assert problem.droppable == (truncate == "drop")
    pair: Any = {"prompt": one["messages"][:1], "chosen": one["messages"][1:], "rejected": [said("assistant", "Red.")]}
    tokenizer = images.processor.tokenizer
    [problem] = DpoEncoder(tokenizer, Rendering(), Limit(40), images=images)([pair])
    assert isinstance(problem, Problem)
    assert "40 of them for images" in problem.reason


def test_a_typed_image_token_stays_text(folder: JobFolder) -> None:
    images = images_in(folder)
    typed = row(folder, "What does <|image_pad|> mean beside this?")
    [[encoded]] = encoder(images)([typed])
    token = images.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert encoded.columns["input_ids"].count(token) == 6
    [problem] = encoder(images, rendering=Rendering(special_tokens="control"))([typed])
    assert isinstance(problem, Problem)
    assert problem.reason.startswith("it has 1 image, and its text 2 times '<|image_pad|>'")


def test_an_answer_has_no_image(folder: JobFolder) -> None:
    one = row(folder)
    one["messages"][1]["content"] = [one["messages"][0]["content"][1]]
    [problem] = encoder(images_in(folder))([one])
    assert isinstance(problem, Problem)
    assert "message of the assistant has an image" in problem.reason


def _written(folder: JobFolder, one: Any) -> None:
    text = {"messages": [said("user", "Hello."), said("assistant", "Good day.")]}
    folder.train_rows.write_text("".join(json.dumps(each) + "\n" for each in (text, one)), encoding="utf-8")


@pytest.mark.parametrize("how", ["truncated", "size", "format", "pixels", "gone"])
def test_a_file_that_cannot_be_decoded_names_row_and_part(
    how: str, folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = row(folder, width=64)
    part = one["messages"][0]["content"][1]
    path = folder.image(part["sha256"], "png")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:80])
    elif how == "size":
        part["width"] = 32
    elif how == "format":
        path.write_bytes(tiny_vlms.drawn("blue", 64, kind="jpeg"))
    elif how == "gone":
        path.unlink()
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    _written(folder, one)
    expected = {"size": "is 64 x 16 pixels; the row says 32 x 16", "pixels": "has more than 1,000 pixels"}
    [image] = images_of(one["messages"])
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: messages\[0\]\.content\[1\]: the image") as caught:
        images_in(folder).opened(image)
    assert expected.get(how, "can't be decoded") in str(caught.value)


def _saved(picture: Image.Image, **more: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **more)
    return file.getvalue()


def _clear() -> dict[str, bytes]:
    """Files with a red pixel and a black one that is transparent, in each form of PNG."""
    drawing = Image.new("RGBA", (2, 1))
    drawing.putpixel((0, 0), (255, 0, 0, 255))
    named = drawing.convert("RGB")
    table = Image.new("P", (2, 1))
    table.putpalette([0, 0, 0, 255, 0, 0])
    table.putpixel((0, 0), 1)
    return {"RGBA": _saved(drawing), "RGB": _saved(named, transparency=(0, 0, 0)), "P": _saved(table, transparency=0)}


@pytest.mark.parametrize("mode", _clear())
def test_what_is_transparent_is_white(mode: str, folder: JobFolder) -> None:
    """As transformers' processors have it, and not the colour that the file hides there."""
    part = tiny_vlms.put(folder, _clear()[mode])
    seen = images_in(folder).opened(images_of([said("user", [part])])[0])
    assert [seen.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (255, 255, 255)]


def test_greys_of_16_bits_stay_apart(folder: JobFolder) -> None:
    greys = Image.fromarray(np.array([[0, 255, 256 * 7, 65535]], dtype=np.uint16))
    part = tiny_vlms.put(folder, _saved(greys))
    seen = images_in(folder).opened(images_of([said("user", [part])])[0])
    assert [seen.getpixel((x, 0)) for x in range(4)] == [(grey,) * 3 for grey in (0, 0, 7, 255)]
    hidden = tiny_vlms.put(folder, _saved(greys, transparency=256 * 7))
    seen = images_in(folder).opened(images_of([said("user", [hidden])])[0])
    assert [seen.getpixel((x, 0)) for x in range(4)] == [(grey,) * 3 for grey in (0, 0, 255, 255)]


def test_an_image_that_the_processor_does_not_take_is_named(folder: JobFolder) -> None:
    """Qwen's processors refuse one that is 200 times as wide as high."""
    wide = row(folder)
    wide["messages"][0]["content"].append(tiny_vlms.put(folder, tiny_vlms.drawn("red", 3000, 5)))
    [problem, fine] = encoder(images_in(folder))([wide, row(folder)])
    assert isinstance(problem, Problem)
    told = "image 2 of 2: Qwen3VLProcessor does not take an image of 3000 x 5 pixels: absolute aspect ratio"
    assert problem.reason.startswith(told)
    assert not isinstance(fine, Problem)


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_a_profile_counts_the_tokens_of_images(recipe: str, folder: JobFolder, tmp_path: Path) -> None:
    """As a job does: the same lengths, and the same rows refused."""
    model = tiny_vlms.build("qwen3_vl_moe", tmp_path / "model")
    rows: list[Any] = [row(folder), row(folder, width=160)]
    if recipe == "dpo":
        rows = [{"prompt": one["messages"][:1], "chosen": one["messages"][1:], "rejected": [said("assistant", "Red.")]}
                for one in rows]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps([at, one]) + "\n" for at, one in enumerate(rows, start=1)))
    job = {"recipe": recipe, "model": str(model), "data": {"dataset_id": "x"}, "options": {"max_length": 64}}
    found = profile({"job": job, "rows": str(path), "show": 1})
    shown, tokens = found["shown"], found["tokens"]
    assert isinstance(shown, list)
    assert isinstance(tokens, dict)
    assert shown[0]["pieces"].count("<|image_pad|>") == 6
    [refused] = tokens["refused_rows"]
    assert (refused["row"], "40 of them for images" in refused["reason"]) == (2, True)


def test_a_collator_reaches_other_processes(folder: JobFolder) -> None:
    """A batch of rows with and without images; one without any has no input for images."""
    images = images_in(folder)
    rows = [
        {"input_ids": one[0].columns["input_ids"], "labels": one[0].columns["labels"], **one[0].texts}  # type: ignore[index,union-attr]
        for one in encoder(images)([row(folder), row(folder)])
    ]
    collate = pickle.loads(pickle.dumps(ImageCollator(DefaultDataCollator(), images, repeats=2)))  # noqa: S301
    batch = collate(rows)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6]] * 4
    assert batch["mm_token_type_ids"].sum() == 12
    assert not {"pixel_values", "pictures"} & set(collate([{**rows[0], "pictures": ""}]))


REFUSED: dict[str, dict[str, Any]] = {
    "data.packed": {"data": {"dataset_id": "d", "packed": True}},
    "options.chat_template": {"options": {"chat_template": "chatml"}},
    "resources.strategy": {"resources": {"gpus": 2, "strategy": "fsdp"}},
    "adapter.quantize_base": {"adapter": {"quantize_base": True}},
    "adapter.vision": {"adapter": {"vision": "tower"}, "resources": {"gpus": 2}},
    "recipe": {"recipe": "grpo", "reward": [{"grader": {"type": "regex", "name": "n", "pattern": "e"}}]},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_does_not_work_with_images_is_refused_by_name(field: str) -> None:
    body = {"recipe": "sft", "job_uuid": "j", "model": "m", "data": {"dataset_id": "d"}, **REFUSED[field]}
    with pytest.raises(InvalidInput) as caught:
        require_trainable_images(JOB_SPEC.validate_python(body))
    assert caught.value.field == field


def test_a_text_model_and_a_missing_library_are_named(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = workshop.run("sft", "llama", adapter={"vision": "tower"})
    assert "adapter.vision: 'tower' is not valid; expected 'off', because no row has an image" in nothing.reason
    folder = JobFolder(workshop.next_folder("sft"))
    job = workshop.run("sft", "llama", [row(folder)] * 4)
    assert (job.exit_code, "no processor of images" in job.reason) == (FAILED, True), job.reason
    there = util.find_spec
    name = "llama_stack_provider_moe.compute.models.vision.find_spec"
    monkeypatch.setattr(name, lambda module: None if module == "torchvision" else there(module))
    again = workshop.again(job)
    assert "no torchvision; install 'llama-stack-provider-moe[vision]'" in again.reason
