"""Main memory while a quantised base is read: the planner's figure, and the measured ones that it agrees with."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import loading_memory as benchmark
from llama_stack_provider_moe.compute.planning.loading import ENCODING, loading_memory
from llama_stack_provider_moe.compute.planning.meta_model import blank, read_config
from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter, Moe, TrainingSpec
from tests.support import tiny_models

ROOT = Path(__file__).parents[3]
FOUR = Adapter(quantize_base=True)


def test_the_committed_measurement_agrees_and_is_within_two_shards() -> None:
    result = json.loads(max((ROOT / "benchmarks" / "results").glob("loading_memory_*.json")).read_bytes())
    config = tiny_models.config("qwen3_moe", **result["shape"])
    assert result["shape"] == benchmark.SHAPE
    assert result["shards"]["count"] > 4
    for way, (bits, nested, as_read) in benchmark.WAYS.items():
        found = result["found"][way]
        assert found["bound"] == found["bytes_after"] + 2 * result["shards"]["largest"]
        if not as_read:
            assert found["peak"] > found["bytes_before"], "that was the fault"
            continue
        assert found["peak"] <= found["bound"]
        adapter = Adapter(quantize_base=True, quantize_bits=4 if bits == 4 else 8, quantize_scales=nested)
        told = loading_memory(blank(config, adapter, Moe(), 4 if bits == 4 else 8), "cpu").host_bytes
        assert told == pytest.approx(found["peak"], rel=0.15), way


@pytest.mark.parametrize("family", [*tiny_models.MOE, "llama"])
def test_every_family_has_a_figure(family: str) -> None:
    made = blank(tiny_models.config(family), FOUR, Moe(), 4)
    host, device = vars(loading_memory(made, "cpu")).values()
    assert device == 0
    assert made.weight_bytes < host
    on_gpu = loading_memory(made, "cuda")
    assert on_gpu.device_bytes == host
    assert 0 < on_gpu.host_bytes < made.weight_bytes


def test_the_terms_by_hand() -> None:
    config = tiny_models.config("qwen3_moe", hidden_size=256, moe_intermediate_size=512, vocab_size=500)
    made = blank(config, FOUR, Moe(), 4)
    gate_up = config.num_experts * 2 * 512 * 256 * 2
    assert loading_memory(made, "cpu").host_bytes == made.weight_bytes + 2 * gate_up + ENCODING
    assert loading_memory(made, "cuda").host_bytes == max(512 * 256 * 2, 500 * 256 * 2)


def test_the_template_for_24_gb_fits() -> None:
    config, _ = read_config(str(ROOT / "tests" / "configs" / "qwen3-30b-a3b.json"))
    job = json.loads((ROOT / "job_templates" / "qwen3_moe_24gb_sft.json").read_bytes())
    spec: TrainingSpec = JOB_SPEC.validate_python(job)  # type: ignore[assignment]
    plan = Planner(config, Machine("cuda", 24 * 10**9)).plan(spec)
    assert plan.verdict == "fits"
    guide = " ".join((ROOT / "docs" / "guides" / "four-bit.md").read_text(encoding="utf-8").split())
    assert plan.chosen is not None
    assert f"in {plan.chosen.peak_bytes / 1e9:.1f} GB by the [planner]" in guide
    assert plan.loading is not None
    assert f"({plan.loading.host_bytes / 1e6:.0f} MB for Qwen3-30B-A3B)" in guide
    embedding = 151_936 * 2048 * torch.bfloat16.itemsize
    assert plan.loading.host_bytes == embedding, "the largest tensor of its files"
    without = spec.model_copy(update={"adapter": spec.adapter.model_copy(update={"quantize_scales": False})})  # type: ignore[union-attr]
    assert Planner(config, Machine("cuda", 24 * 10**9)).plan(without).verdict == "tight"
