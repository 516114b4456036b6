"""Jobs whose experts are in main memory: every figure and file is that of a job without it."""

from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

FOUR: dict[str, Any] = {"plan": "all_experts", "rank": 4, "quantize_base": True, "quantize_scales": True}


def both(workshop: Workshop, recipe: str, family: str, **blocks: Any) -> tuple[Run, Run]:
    without, offloaded = (
        workshop.run(recipe, family, efficiency={"offload_experts": offload}, adapter=FOUR, **blocks)
        for offload in (False, True)
    )
    assert (without.exit_code, offloaded.exit_code) == (COMPLETED, COMPLETED), offloaded.reason
    return without, offloaded


# Fused in its files, and apart in them.
@pytest.mark.parametrize("family", ["granitemoe", "qwen3_moe"])
def test_an_sft_job_is_equal_bit_by_bit(family: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    without, offloaded = both(workshop, "sft", family, options={"save_merged": True})
    for name in ("loss", "grad_norm"):
        assert offloaded.steps(name) == without.steps(name)
    assert offloaded.held_out("validation_loss") == without.held_out("validation_loss")
    adapter = offloaded.adapter()
    assert all(torch.equal(each, adapter[name]) for name, each in without.adapter().items())
    merged = [(run.folder.artifacts / "merged" / "model.safetensors").read_bytes() for run in (without, offloaded)]
    assert merged[0] == merged[1]
    told = offloaded.resolved["quantized"]["offloaded"]
    assert without.resolved["quantized"]["offloaded"] is None
    assert told["layers"] == 2
    assert told["device_bytes"] == told["host_bytes"] > 0
    line = f"base      the experts of 2 layers are in main memory, {told['host_bytes'] / 2**20:,.1f} MiB"
    assert line in capsys.readouterr().out


def test_a_job_that_generates_writes_the_same(workshop: Workshop) -> None:
    without, offloaded = both(workshop, "grpo", "granitemoe")
    assert offloaded.steps("loss") == without.steps("loss")
    adapter = offloaded.adapter()
    assert all(torch.equal(each, adapter[name]) for name, each in without.adapter().items())
