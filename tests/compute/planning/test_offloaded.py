"""Experts in main memory, in the planner: what the device and main memory hold, and when it is suggested."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.compute.planning.estimated_time import flops_a_token
from llama_stack_provider_moe.compute.planning.meta_model import read_config
from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
from llama_stack_provider_moe.spec import JOB_SPEC, TrainingSpec
from tests.support import tiny_models
from tests.support.measured_memory import Case, estimated, measure

ROOT = Path(__file__).parents[3]
CONFIG = tiny_models.config("mixtral", hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
OFFLOAD = {"offload_experts": True}


def job(**blocks: Any) -> TrainingSpec:
    body = {"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, "training": {"batch_size": 1},
            "adapter": {"rank": 4, "quantize_base": True}, "options": {"max_length": 32},
            "resources": {"gpus": 1}}  # fmt: skip
    made: TrainingSpec = JOB_SPEC.validate_python({**body, **blocks})  # type: ignore[assignment]
    return made


def test_the_device_holds_two_layers_and_main_memory_all() -> None:
    planner = Planner(CONFIG, Machine("cuda", 10**10))
    there, away = (planner.estimate(job(efficiency={"offload_experts": on}), "ddp")[0] for on in (False, True))
    layer = 4 * 3 * 512 * 1024 * (4 + 32 / 64) / 8  # of 4 experts, each three matrices
    assert (there.offloaded_bytes, away.offloaded_bytes) == (0, 6 * layer)
    assert there.terms.weights - away.terms.weights == 4 * layer
    on_cpu = Planner(CONFIG, Machine("cpu", 10**10))
    here, moved = (
        on_cpu.estimate(job(efficiency={"offload_experts": on}, resources={"gpus": 0}), "ddp")[0]
        for on in (False, True)
    )
    assert moved.terms.weights - here.terms.weights == 2 * layer
    assert moved.offloaded_bytes == 0, "both are in the same memory, and counted"


def test_what_loading_takes() -> None:
    planner = Planner(CONFIG, Machine("cuda", 10**10))
    there, away = (planner.plan(job(efficiency={"offload_experts": on})).loading for on in (False, True))
    assert there is not None
    assert away is not None
    layer = 4 * 3 * 512 * 1024 * (4 + 32 / 64) / 8
    assert away.device_bytes < there.device_bytes
    assert away.host_bytes == 6 * layer + max(layer, there.host_bytes)


@pytest.mark.wide
def test_a_job_takes_the_estimated_memory() -> None:
    """On a CPU, where the experts and the buffers are in the same memory."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5}
    case = Case("sft", "mixtral", shape, {"plan": "all_experts", "rank": 8}, 1, 64, 4, checkpointing=True, offload=True)
    told, without = estimated(case), estimated(replace(case, offload=False))
    assert told.peak_bytes > 1.05 * without.peak_bytes
    assert told.peak_bytes == pytest.approx(measure(case).peak, rel=0.15)


def test_it_is_suggested_where_it_makes_a_job_fit() -> None:
    planner = Planner(CONFIG, Machine("cuda", 10**10))
    away = planner.estimate(job(efficiency=OFFLOAD), "ddp")[0].peak_bytes
    small = Planner(CONFIG, Machine("cuda", int(away / 0.9) + 1))
    small._seen = planner._seen
    fields = [change.fields for change in small.changes(job())]
    assert {"efficiency.offload_experts": True} in fields
    assert small.plan(job(efficiency=OFFLOAD)).verdict == "fits"


def test_operations_do_not_depend_on_how_the_base_is_held() -> None:
    """The settings beside `quantize_base` were kept when it was taken away, and refused the job."""
    planner = Planner(CONFIG, Machine("cuda", 10**10))
    held: list[dict[str, Any]] = [
        {}, {"quantize_base": True}, {"quantize_base": True, "quantize_scales": True},
        {"quantize_base": True, "quantize_bits": 8},
    ]  # fmt: skip
    plain, *others = (flops_a_token(planner, job(adapter={"rank": 4, **each})) for each in held)
    away = job(efficiency=OFFLOAD, adapter={"rank": 4, "quantize_base": True, "quantize_scales": True})
    assert {*others, flops_a_token(planner, away)} == {plain}


def test_a_dense_model_has_none() -> None:
    (option,) = Planner(tiny_models.config("llama"), Machine("cuda", 10**10)).plan(job(efficiency=OFFLOAD)).options
    assert option.refused == "the model is dense: it has no experts to offload"


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"adapter": None}, "adapter null, which trains the experts"),
        ({"adapter": {"rank": 4}}, "adapter.quantize_base false; expected true"),
        ({"loader": "unsloth"}, "loader 'unsloth', which holds the experts itself"),
        ({"resources": {"gpus": 2, "strategy": "fsdp"}}, "efficiency.offload_experts true, whose experts"),
        ({"resources": {"gpus": 2, "strategy": "ep"}}, "efficiency.offload_experts true, whose experts"),
    ],
)
def test_the_door_names_what_does_not_go_together(blocks: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        job(efficiency=OFFLOAD, **blocks)


@pytest.mark.wide
def test_the_template_for_12_gb_fits() -> None:
    config, _ = read_config(str(ROOT / "tests" / "configs" / "qwen3-30b-a3b.json"))
    body = json.loads((ROOT / "job_templates" / "qwen3_moe_12gb_sft.json").read_bytes())
    spec: TrainingSpec = JOB_SPEC.validate_python(body)  # type: ignore[assignment]
    planner = Planner(config, Machine("cuda", 12 * 10**9))
    plan = planner.plan(spec)
    assert plan.verdict == "fits"
    assert plan.chosen is not None
    assert plan.chosen.estimate is not None
    assert plan.loading is not None
    assert plan.loading.device_bytes <= plan.machine.usable_bytes
    guide = " ".join((ROOT / "docs" / "guides" / "memory-planning.md").read_text(encoding="utf-8").split())
    assert f"{plan.chosen.peak_bytes / 1e9:.1f} GB by the planner" in guide
    assert f"{plan.chosen.estimate.offloaded_bytes / 1e9:.1f} GB of experts in main memory" in guide
    body["efficiency"]["offload_experts"] = False
    without: TrainingSpec = JOB_SPEC.validate_python(body)  # type: ignore[assignment]
    assert planner.plan(without).verdict == "too large"
