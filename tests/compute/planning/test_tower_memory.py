"""What a vision tower takes, by the planner: against the processors, against real tensors and against real jobs."""

import gc
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from llama_stack_provider_moe.compute.models.images import Images
from llama_stack_provider_moe.compute.models.row_images import Image
from llama_stack_provider_moe.compute.moe.layout import decoder_layers, without_adapters
from llama_stack_provider_moe.compute.planning.dry_run import Rehearsal
from llama_stack_provider_moe.compute.planning.estimated_time import flops_a_token
from llama_stack_provider_moe.compute.planning.expected_images import ExpectedImages, images_of_rows
from llama_stack_provider_moe.compute.planning.meta_model import adapt, blank
from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
from llama_stack_provider_moe.compute.planning.tower_inputs import (
    ImageSize,
    Limits,
    Rows,
    assumed,
    processor_limits,
    tower_inputs,
    within,
)
from llama_stack_provider_moe.compute.planning.tower_memory import tower_memory, tower_operations
from llama_stack_provider_moe.compute.train.fit import CHECKPOINTING
from llama_stack_provider_moe.control.cli.plan import shown
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter, Moe
from tests.support import tiny_vlms
from tests.support.cli_support import moe_train
from tests.support.every_family import tiny_config
from tests.support.measured_memory import Case, estimated, measure

LENGTH = 96
SIZES = [ImageSize(24, 16), ImageSize(64, 64), ImageSize(200, 40), ImageSize(3, 90), ImageSize(56, 57)]
SMALL: Rows = ((ImageSize(24, 16), ImageSize(40, 40)), ())
LARGE: Rows = ((ImageSize(64, 64),), (ImageSize(64, 64),))


def limits_of(family: str, folder: Path) -> Limits:
    """The limits of the tiny model's processor, as read beside a model."""
    tiny_vlms.processor(family).save_pretrained(folder)
    return processor_limits(folder)


def batch_of(family: str, rows: Rows, length: int) -> dict[str, torch.Tensor]:
    """A real batch of rows with drawn images, each padded to a length with text."""
    processor: Any = tiny_vlms.processor(family)
    files = [Pillow.open(io.BytesIO(tiny_vlms.drawn("red", *size))).convert("RGB") for row in rows for size in row]
    texts = ["".join("x" + processor.image_token for _ in row) for row in rows]
    made = processor(text=texts, images=files, images_kwargs={"return_tensors": "pt"})
    text = processor.tokenizer.convert_tokens_to_ids("x")
    ids = torch.tensor([[*row, *[text] * (length - len(row))] for row in made.pop("input_ids")])
    batch = {name: value.float() if value.is_floating_point() else value for name, value in made.items()
             if isinstance(value, torch.Tensor)}  # fmt: skip
    if "image_grid_thw" in batch:
        batch["mm_token_type_ids"] = torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))
    return {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_inputs_and_tokens_are_the_processors(family: str, tmp_path: Path) -> None:
    limits, processor = limits_of(family, tmp_path), tiny_vlms.processor(family)
    images = Images(processor, JobFolder(tmp_path), processor.image_token, torch.float32)
    config = tiny_vlms.config(family)
    patch = config.image_token_id
    for size in SIZES:
        given = tower_inputs(config, ((size,),), limits)
        real = batch_of(family, ((size,),), 0)
        assert given.pixels == tuple(real["pixel_values"].shape), size
        assert given.grid is None or [list(each) for each in given.grid] == real["image_grid_thw"].tolist()
        ids = processor.tokenizer(images.tokens(Image("", "png", *size)))["input_ids"]
        assert given.tokens == ((ids.count(patch),),), size


def test_images_are_made_smaller_until_their_tokens_fit() -> None:
    for family in tiny_vlms.FAMILIES:
        config = tiny_vlms.config(family)
        asked = ((ImageSize(1024, 512), ImageSize(1024, 512)),)
        [row] = within(config, asked, Limits(), LENGTH)
        [tokens] = tower_inputs(config, (row,), Limits()).tokens
        assert LENGTH // 4 < sum(tokens) < LENGTH
        assert row[0].width == pytest.approx(2 * row[0].height, rel=0.05)
        assert within(config, ((ImageSize(16, 16),),), Limits(), LENGTH) == ((ImageSize(16, 16),),)
        assert within(config, asked, Limits(), 2) == ((),)


class _Reached(Exception):
    """The language model begins."""


def most(changes: list[int], now: int = 0) -> int:
    """The largest running sum."""
    found = now
    for change in changes:
        now += change
        found = max(found, now)
    return found


def changes_until(stop: str, model: Any, batch: dict[str, torch.Tensor]) -> list[int]:
    """Sizes of all allocations (positive) and releases (negative) of torch's CPU allocator in a real pass, in order.

    Args:
        stop: `reached`, the language model; `left`, when only what its backward pass needs is there; or `backward`.
        model: in memory.
        batch: with images.
    """
    path, _ = decoder_layers(model)
    trunk = without_adapters(model).get_submodule(path.rpartition(".")[0])
    given: list[Any] = []

    def caught(**kwargs: Any) -> None:
        given.extend([kwargs["inputs_embeds"], *(kwargs.get("deepstack_visual_embeds") or ())])
        raise _Reached

    trunk.forward = caught
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    gc.collect()
    gc.disable()  # it would release tensors of other tests in the middle of the pass
    profiler.start()
    try:
        model(**batch, use_cache=False)
    except _Reached:
        if stop == "reached":
            profiler.stop()
    finally:
        del trunk.forward
    if stop != "reached":
        learnt = [each for each in given if each.requires_grad]
        edges = [torch.autograd.graph.get_gradient_edge(each) for each in learnt]
        shapes = [each.shape for each in learnt]
        learnt.clear()
        given.clear()
        if stop == "backward" and edges:
            torch.autograd.backward(edges, [torch.empty(shape) for shape in shapes])
        profiler.stop()
    gc.enable()
    model.zero_grad(set_to_none=True)
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [
        size for _, size in sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    ]


def measured(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """What a real tower takes, as `TowerMemory` has it."""
    with torch.no_grad(), model.disable_adapter():
        alone = changes_until("reached", model, batch)
    reached, left, backward = (changes_until(stop, model, batch) for stop in ("reached", "left", "backward"))
    assert left == backward[: len(left)], "the same pass"
    embeddings = batch["input_ids"].numel() * without_adapters(model).config.get_text_config().hidden_size * 4
    return {
        "forward": most(reached), "held": sum(reached) - embeddings, "kept": sum(left),
        "backward": most(backward[len(left) :], sum(left)) if len(backward) > len(left) else 0,
        "alone": most(alone), "held_alone": sum(alone) - embeddings,
    }  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vision", ["off", "projector", "tower"])
@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_a_tower_takes_what_a_real_one_does(family: str, vision: Any, checkpointing: bool, tmp_path: Path) -> None:
    """Frozen and trained, with few small images and with many patches; nothing is sampled."""
    adapter, limits = Adapter(rank=4, vision=vision), limits_of(family, tmp_path)
    real = adapt(tiny_vlms.model(family), adapter, Moe()).model.train()
    if checkpointing:
        settings = {"use_reentrant": False, "preserve_rng_state": False}  # a state has 5 KB, whatever the layer
        base = without_adapters(real)
        getattr(base, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": settings})
        base.enable_input_require_grads()
    rehearsal = Rehearsal(blank(tiny_vlms.config(family), adapter, Moe(), dtype=torch.float32).model, "cpu")
    for rows in (SMALL, LARGE):
        given = tower_inputs(tiny_vlms.config(family), rows, limits)
        told = tower_memory(rehearsal, given, LENGTH, checkpointing)
        found = measured(real, batch_of(family, rows, LENGTH))
        for name, value in found.items():
            # Masks and positions of a few bytes a token are in neither or in both; only large differences count.
            assert getattr(told, name) == pytest.approx(value, rel=0.15, abs=4000), (name, told, found)


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_a_towers_operations_are_a_real_ones(family: str, tmp_path: Path) -> None:
    limits, counted = limits_of(family, tmp_path), {}
    for vision in ("off", "tower"):
        adapter = Adapter(rank=4, vision=vision)  # type: ignore[arg-type]
        rehearsal = Rehearsal(blank(tiny_vlms.config(family), adapter, Moe(), dtype=torch.float32).model, "cpu")
        told = tower_operations(rehearsal, tower_inputs(tiny_vlms.config(family), LARGE, limits), LENGTH)
        real = adapt(tiny_vlms.model(family), adapter, Moe()).model.train()
        with FlopCounterMode(display=False) as counter:
            changes_until("backward", real, batch_of(family, LARGE, LENGTH))
        assert told.learning == counter.get_total_flops() > 0
        counted[vision] = told
    assert counted["off"].learning == counted["off"].alone, "no backward pass, and no adapter"
    trained = counted["tower"]
    assert trained.alone == counted["off"].alone
    assert 1.9 < trained.learning / trained.alone < 3.5, "gradients of inputs, and of LoRA's matrices"


def test_the_time_of_a_job_has_the_towers(tmp_path: Path) -> None:
    family = "qwen3_vl_moe"
    limits, config = limits_of(family, tmp_path), tiny_vlms.config(family)
    machine = Machine("cuda", 80 * 10**9)
    body = {"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, "training": {"batch_size": 2},
            "options": {"max_length": LENGTH}, "adapter": {"rank": 4}, "resources": {"gpus": 1}}  # fmt: skip
    for recipe, passes in (("sft", 1), ("dpo", 2)):
        spec: Any = JOB_SPEC.validate_python(body | {"recipe": recipe})
        shown_once = Planner(config, machine, assumed(1, ImageSize(64, 64), limits))
        plain, seeing = (flops_a_token(planner, spec) for planner in (Planner(config, machine), shown_once))
        vision = shown_once.vision(spec)
        assert vision is not None
        assert vision.operations is not None
        once = vision.operations().alone / (2 if recipe == "sft" else 4)  # texts of a micro-batch
        assert (seeing - plain) * LENGTH == pytest.approx(passes * once)


# Estimate over measured peak of these: 0.99 (checkpointed), 1.09 (pairs, shown beside the head), 1.11 (dense).
JOBS = {
    "checkpointed": Case("sft", "llama4", images=3, adapter={"rank": 4, "vision": "tower"}, length=160,
                         checkpointing=True),
    "trained": Case("sft", "llama4", images=3, adapter={"rank": 4, "vision": "tower"}, length=160),
    "frozen": Case("sft", "llama4", images=4, adapter={"rank": 4}, length=160),
    "pairs": Case("dpo", "glm4v_moe", images=1, adapter={"rank": 4, "vision": "tower"}, length=128, batch=2),
    "dense": Case("sft", "qwen3_vl", images=1, adapter={"rank": 4, "vision": "tower"}, length=128),
}  # fmt: skip
# A tile of the head's logits is larger than a tiny tower, and than what a frozen one leaves for the language model.
BESIDE_THE_HEAD = ("pairs", "dense", "frozen")


@pytest.mark.parametrize("name", [each if each == "checkpointed" else pytest.param(each, marks=pytest.mark.wide)
                                  for each in JOBS])  # fmt: skip
def test_a_job_on_images_takes_the_estimated_memory(name: str, tmp_path: Path) -> None:
    case = JOBS[name]
    told, found = estimated(case), measure(case)
    # The pixels are made before the step that is measured.
    assert told.peak_bytes - pixels_of(case, tmp_path) == pytest.approx(found.peak, rel=0.15)
    if name not in BESIDE_THE_HEAD:
        assert told.peak_bytes - told.terms.vision != pytest.approx(found.peak, rel=0.15), "the tower is visible"


def pixels_of(case: Case, folder: Path) -> int:
    """Bytes of a micro-batch's pixels in bf16; in pairs both answers see them."""
    row = (ImageSize(case.side, case.side),) * case.images
    given = tower_inputs(tiny_vlms.config(case.family), (row,) * case.batch, limits_of(case.family, folder))
    return math.prod(given.pixels) * 2 * (2 if case.recipe == "dpo" else 1)


CONFIG = tiny_vlms.config("qwen3_vl_moe")


def job(recipe: str = "sft", **blocks: Any) -> Any:
    """A small job."""
    body = {"recipe": recipe, "model": "a/b", "data": {"dataset_id": "d"}, "adapter": {"rank": 4},
            "training": {"batch_size": 2}, "options": {"max_length": 64}, **blocks}  # fmt: skip
    return JOB_SPEC.validate_python(body)


def planner(images: int = 1, memory_bytes: int = 80 * 10**9) -> Planner:
    """A planner for rows with images."""
    return Planner(CONFIG, Machine("cuda", memory_bytes), assumed(images, ImageSize(32, 32), Limits()))


def test_more_images_take_more_and_pairs_see_each_twice() -> None:
    def tower(images: int, **blocks: Any) -> Any:
        found = planner(images).plan(job(**blocks)).vision
        assert found is not None
        assert found.tower is not None
        return found.tower

    one, two, pairs = tower(1), tower(2), tower(1, recipe="dpo")
    assert (one.tokens, two.tokens, pairs.tokens) == (32, 64, 64)
    assert two.inputs == pairs.inputs == 2 * one.inputs
    assert 1.5 * one.forward < two.forward < 2.1 * one.forward
    trained, checkpointed = tower(1, adapter={"rank": 4, "vision": "tower"}), tower(
        1, adapter={"rank": 4, "vision": "tower"}, efficiency={"enable_activation_checkpointing": True}
    )  # fmt: skip
    assert one.kept < checkpointed.kept < trained.kept
    assert one.backward < checkpointed.backward < trained.backward


def test_a_plan_says_what_the_images_take_and_offers_nothing_that_they_refuse() -> None:
    plan = planner().plan(job(resources={"gpus": 2}))
    assert plan.vision is not None
    assert plan.vision.text().startswith(
        "assumed: 1 image of 32 x 32 pixels in each row, up to 16 tokens a row; 2 images"
    )
    assert plan.as_json()["vision"]["bytes"] == plan.vision.tower.peak  # type: ignore[index,union-attr]
    refused = {option.strategy: option.refused for option in plan.options}
    assert refused["ddp"] is None
    for way in {"fsdp", "ep"} & set(refused):
        assert "because the rows have images" in str(refused[way])
    small = planner(memory_bytes=3_000_000)
    fields = {name for change in small.changes(job()) for name in change.fields}
    assert "adapter.quantize_base" not in fields
    without = Planner(CONFIG, Machine("cuda", 80 * 10**9)).plan(job())
    assert without.vision is None
    assert without.chosen.estimate.terms.vision == 0  # type: ignore[union-attr]


def test_what_can_not_be_measured_is_said() -> None:
    config = tiny_config("aria")
    seen = assumed(1, ImageSize(32, 32), Limits())
    plan = Planner(config, Machine("cuda", 80 * 10**9), seen).plan(job())
    assert plan.vision is not None
    assert plan.vision.as_json()["bytes"] is None
    assert "not in the figures: what a vision tower of aria reads of an image is not known" in plan.vision.text()


def test_images_are_expected_where_a_job_can_train_on_them() -> None:
    def expected(each: int | None, config: Any = CONFIG, **blocks: Any) -> Any:
        return ExpectedImages(each).of_job(job(**blocks), config, "nowhere")

    found, told = expected(None)
    assert (found.rows, found.assumed, told) == (((ImageSize(1024, 1024),),), True, None)
    assert expected(0) == (None, "rows without images: it does not run")
    nothing, told = expected(None, adapter={"quantize_base": True})
    assert nothing is None
    assert told.startswith(
        "rows without images: it does not run. With images, adapter.quantize_base: True is not valid"
    )
    with pytest.raises(InvalidInput, match=r"adapter\.quantize_base"):
        expected(2, adapter={"quantize_base": True})
    text = tiny_config("mixtral")
    assert expected(None, text) == (None, None)
    with pytest.raises(InvalidInput, match="--images: 2 is not valid; expected 0, because this model has no vision"):
        expected(2, text)


def test_a_job_counts_the_largest_images_of_its_rows(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    assert images_of_rows(job(), folder) is None
    wide, small = (tiny_vlms.put(folder, tiny_vlms.drawn("red", *size)) for size in ((40, 16), (16, 16)))
    said = {"role": "assistant", "content": "Red."}
    rows = [{"messages": [{"role": "user", "content": content}, said]}
            for content in ("Hello.", [small], [wide, small], [small, small], [wide])]  # fmt: skip
    folder.train_rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = images_of_rows(job(), folder)
    assert found is not None
    assert found.of(2) == ((ImageSize(40, 16), ImageSize(16, 16)), (ImageSize(40, 16),))


def test_the_command_has_a_line_about_it(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    file = tmp_path / "job.json"
    file.write_text(json.dumps({**job().model_dump(mode="json"), "model": str(tmp_path)}))
    done = moe_train("plan", str(file), "--memory", "1GB", "--images", "2", "--image-size", "32x16", "--json")
    assert done.code == 0, done.err
    assert done.document["vision"].startswith("assumed: 2 images of 32 x 16 pixels in each row, up to 16 tokens a row")
    assert done.document["plan"]["vision"]["images"] == 4
    [option] = done.document["plan"]["options"]
    assert option["estimate"]["terms"]["vision"] > 0
    rows = dict(line.split("  ", 1) for line in rendered(done.document) if "  " in line)
    assert rows["vision tower"].strip() == done.document["vision"]
    wrong = moe_train("plan", str(file), "--image-size", "1024")
    assert wrong.code == 2
    assert "--image-size: '1024' is not valid; expected width x height in pixels" in wrong.err


def rendered(document: Any) -> list[str]:
    """The lines that the command shows."""
    console = Console(width=400)
    with console.capture() as printed:
        console.print(shown(document))
    return printed.get().splitlines()
