"""The planner counts a vision tower and its projector: their weights, and what LoRA on them needs."""

from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.moe.vision_parts import part_of
from llama_stack_provider_moe.compute.planning.lora_report import report
from llama_stack_provider_moe.compute.planning.memory import Batch
from llama_stack_provider_moe.compute.planning.meta_model import blank
from llama_stack_provider_moe.compute.planning.planner import Machine, MemoryPlan, Planner
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter, Moe
from tests.support import tiny_vlms

CONFIG = tiny_vlms.config("qwen3_vl_moe")
AN_IMAGE_LAYER = 16  # bytes of LoRA in fp32: the weight, its gradient and two moments, 4 each


def job(**adapter: Any) -> Any:
    """A small job."""
    body = {"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, "adapter": {"rank": 4, **adapter},
            "training": {"batch_size": 2}, "options": {"max_length": 64}}  # fmt: skip
    return JOB_SPEC.validate_python(body)


def planned(**adapter: Any) -> MemoryPlan:
    """The plan of a small job."""
    return Planner(CONFIG, Machine("cpu", 10**12)).plan(job(**adapter))


def gradients(vision: str) -> int:
    """Bytes of gradients at the optimiser's step, as the dry run finds them."""
    (*_, (moment, terms)) = (
        Planner(CONFIG, Machine("cpu", 10**12))._rehearsed(job(vision=vision)).step.moments(False, 0)
    )
    assert moment == "optimiser's step"
    return terms.gradients


def certain(vision: str) -> int:
    """Bytes that a job needs whatever its batch."""
    [option] = planned(vision=vision).options
    assert option.estimate is not None
    return option.certain_bytes


def test_the_names_on_disk_are_found_below_an_adapter() -> None:
    """A base in 4 bits is read weight by weight; the family's conversion looks for weights that PEFT hides."""
    loading = planned(quantize_base=True).loading
    assert loading is not None
    assert loading.host_bytes > 0


def test_all_weights_of_the_whole_model_count() -> None:
    whole = tiny_vlms.model("qwen3_vl_moe")
    held = sum(weight.numel() for weight in whole.parameters()) * 2
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in whole.buffers())
    found = blank(CONFIG, Adapter(rank=4), Moe()).weight_bytes
    # Embeddings of positions and buffers of RoPE may be wider than bf16.
    assert held <= found <= held + 2 * buffers


@pytest.mark.parametrize("vision", ["projector", "tower"])
def test_lora_on_images_counts_with_gradients_and_moments(vision: str) -> None:
    adapted = blank(CONFIG, Adapter(rank=4, vision=vision), Moe())  # type: ignore[arg-type]
    added = sum(adapted.report.by_group[part] for part in {"projector", vision})
    by_name = {
        part: sum(weight.numel() for name, weight in adapted.model.named_parameters()
                  if weight.requires_grad and "language_model" not in name and part_of(name) == part)
        for part in ("projector", "tower")
    }  # fmt: skip
    assert added == sum(by_name[part] for part in {"projector", vision}) > 0
    assert certain(vision) - certain("off") == AN_IMAGE_LAYER * added
    assert gradients(vision) - gradients("off") == 4 * added


def test_a_report_says_what_trains_beside_the_language_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    CONFIG.save_pretrained(folder)
    found = report(
        str(folder), Adapter(rank=4, vision="projector"), Moe(), Batch(1, 16), (16,), None, "cpu", load=False
    )
    assert any("what adapter.vision names" in note for note in found.notes)
    [line] = [note for note in found.notes if note.startswith("vision: ")]
    assert f"{found.by_group['projector']:,} train, tower of" in line
    assert line.endswith(" 0 train")
    assert found.memory
