"""What `options.save_merged` takes over a quantised base: the planner's figure, the measured one, and the refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import loading_memory as benchmark
from llama_stack_provider_moe.compute.models.loader import DTYPES
from llama_stack_provider_moe.compute.moe.quantize import merge_memory
from llama_stack_provider_moe.compute.planning.merging import merging_bytes
from llama_stack_provider_moe.compute.planning.meta_model import bare, blank, read_config
from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
from llama_stack_provider_moe.compute.train import strategy
from llama_stack_provider_moe.control.cli import plan as command
from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter, Moe, TrainingSpec
from tests.support import tiny_models

ROOT = Path(__file__).parents[3]
QWEN = str(ROOT / "tests" / "configs" / "qwen3-30b-a3b.json")
ALL = Adapter(quantize_base=True, plan="all_experts", rank=16)
GB = 10**9


def job(save_merged: bool = True, **adapter: Any) -> TrainingSpec:
    body = {"recipe": "sft", "model": QWEN, "data": {"dataset_id": "d"}, "training": {"batch_size": 1},
            "adapter": {"rank": 4, "quantize_base": True, **adapter}, "resources": {"gpus": 1},
            "options": {"max_length": 32, "save_merged": save_merged}}  # fmt: skip
    made: TrainingSpec = JOB_SPEC.validate_python(body)  # type: ignore[assignment]
    return made


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(read_config(QWEN)[0], Machine("cuda", 24 * GB))


def test_the_committed_measurement_agrees() -> None:
    result = json.loads(max((ROOT / "benchmarks" / "results").glob("loading_memory_*.json")).read_bytes())
    assert result["shape"] == benchmark.SHAPE
    merged = result["merged"]
    told = merging_bytes(blank(tiny_models.config("qwen3_moe", **result["shape"]), ALL, Moe(), 4))
    assert told == merged["estimated"]
    assert told == pytest.approx(merged["peak"], rel=0.15)
    assert merged["peak"] > 2 * merged["bytes_before_merging"], "that is what a job did not count"


@pytest.mark.parametrize("family", [*tiny_models.MOE, "llama"])
def test_every_family_has_a_figure(family: str) -> None:
    config = tiny_models.config(family)
    made = blank(config, ALL if family != "llama" else Adapter(quantize_base=True), Moe(), 4)
    plain = sum(weight.nbytes for weight in bare(config, DTYPES["bf16"]).parameters())
    assert plain <= merging_bytes(made)


def test_the_terms_by_hand() -> None:
    shape = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 2}
    made = blank(tiny_models.config("qwen3_moe", **shape), ALL, Moe(), 4)
    experts = tiny_models.config("qwen3_moe").num_experts
    needed, gate_up = merge_memory(made.model), experts * 2 * 512 * 256
    attention = needed.decoded - 2 * 2 * experts * 3 * 512 * 256
    assert 0 < attention < gate_up
    assert needed.merging == gate_up * (2 + 4 + 4), "its copy in bf16, and B A in fp32, before and after the scale"
    assert needed.codes == pytest.approx(needed.decoded * 4.5 / 16, rel=0.01)


def test_a_plan_tells_it_where_a_quantised_base_is_merged(planner: Planner) -> None:
    merging = planner.plan(job()).merging_bytes
    assert merging is not None
    assert 61.0 * GB < merging < 68 * GB, "30.5 billion weights in 16 bits, and scratch"
    assert planner.plan(job(save_merged=False)).merging_bytes is None
    assert planner.plan(job(quantize_base=False)).merging_bytes is None
    assert planner.plan(job()).as_json()["merging_bytes"] == merging


@pytest.mark.parametrize(("device", "where"), [("cuda", "of the GPU if it has that much free, else of main memory"),
                                               ("cpu", "of main memory")])  # fmt: skip
def test_the_command_tells_it(planner: Planner, device: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    found: Any = planner.plan(job()).as_json() | {"device": device}
    about = {"recipe": "sft", "model": "m", "trains": "LoRA", "optimizer": "adamw", "batch_size": 1, "max_length": 32,
             "dtype": "bf16", "checkpointing": True}  # fmt: skip
    time = {"seconds": None, "tokens_per_s": None, "basis": "unknown", "steps": None}
    document: Any = {"job": about, "plan": found, "vision": None, "time": time, "changes": [], "notes": []}
    Console(width=200).print(command.shown(document))
    assert f"GB {where}, at the end" in capsys.readouterr().out


def test_a_machine_without_that_much_memory_refuses_the_job_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that this holds off: the job trained to its end, and was killed in the merge."""
    monkeypatch.setattr(strategy, "_machine_bytes", lambda: 32 * GB)
    with pytest.raises(TrainingError, match=r"options\.save_merged: true is not possible here: .* take 6\d\.\d GB; the "
                       r"machine has 32\.0 GB and the GPU has 24\.0 GB\..*moe-train export merge"):  # fmt: skip
        strategy._decide(job(), "cuda", 24 * GB)
    assert strategy._decide(job(save_merged=False), "cuda", 24 * GB).forecast is not None
    on_gpu = strategy._decide(job(), "cuda", 80 * GB).forecast
    monkeypatch.setattr(strategy, "_machine_bytes", lambda: 128 * GB)
    in_memory = strategy._decide(job(), "cuda", 24 * GB).forecast
    for forecast in (on_gpu, in_memory):
        assert forecast is not None
        assert " GB while the base is decoded and merged" in forecast.text
