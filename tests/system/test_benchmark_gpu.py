"""The GPU benchmark on a machine without a GPU: all parts that a CPU can run, and what it reports about the others."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import experts_gpu
from benchmarks.gpu import models, report
from benchmarks.gpu.cases import PASSES, Bench, Case, Found, in_order, tiny
from benchmarks.gpu.layers import VARIANTS, Layer, draw, replaced, why_not
from benchmarks.gpu.shapes import BANDWIDTH, DENSE_FLOPS, SHAPES, TINY
from benchmarks.gpu.timing import LEAST, Clock, DeviceLost, Times

CPU = torch.device("cpu")


def smoke(out: Path, *options: str, blocked: tuple[str, ...] = (), **environment: str) -> dict[str, Any]:
    """The result of `--smoke` in a separate process where the packages `blocked` can't be imported."""
    code = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.argv = ['experts_gpu', '--smoke', '--repetitions', '3', '--out', {str(out)!r}, *{options!r}]\n"
        "runpy.run_module('benchmarks.experts_gpu', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=experts_gpu.NOTES.parents[1],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert "left out: 0 case(s)" in done.stdout
    return found


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return smoke(tmp_path_factory.mktemp("smoke") / "found.json")


@pytest.mark.wide
def test_every_case_runs_and_agrees_with_the_truth(result: dict[str, Any]) -> None:
    assert [case["case"] for case in result["layers"]] == [case.name for case in tiny(TINY)]
    for case in result["layers"]:
        ran = {name for name, one in case["variants"].items() if one["status"] == "ok"}
        skipped = {name: one["why"] for name, one in case["variants"].items() if one["status"] == "skipped"}
        assert ran | set(skipped) == set(VARIANTS), case["case"]
        assert {"torch", replaced(_shape(case), case["mode"])} <= ran, case["case"]
        assert all(skipped.values()), case["case"]
        for name in ran:
            one = case["variants"][name]
            assert {"out", "tokens", "routing"} < set(one["relative_errors"]), case["case"]
            assert max(one["relative_errors"].values()) < 1e-5, (case["case"], name)
            assert set(one["ms"]) == set(PASSES)
            assert all(0 < each["p10"] <= each["median"] <= each["p90"] for each in one["ms"].values())


@pytest.mark.wide
def test_what_did_not_run_is_named(result: dict[str, Any]) -> None:
    assert {"unsloth", "axolotl"} <= set(result["skipped"])
    assert all("not installed" in why or "its own" in why for why in result["skipped"].values())
    assert result["targets"]["apply_here"] is False
    assert {result["targets"][name]["is"] for name in report.TARGETS} == {"not measured"}
    triton = [case["variants"]["triton"] for case in result["layers"]]
    assert {(one["status"], one["why"]) for one in triton} == {
        ("skipped", "no CUDA device; TRITON_INTERPRET=1 interprets it")
    }


@pytest.mark.wide
def test_end_to_end_by_recipe_and_by_loop(result: dict[str, Any]) -> None:
    assert {run.way for run in models.tiny_runs()} == {"loop", "recipe"}
    for run in result["end_to_end"]:
        if run["backend"] == "triton":
            assert run["status"] == "skipped", run
            continue
        assert run["status"] == "ok", run
        assert run["adapted_by"] == ("add_lora" if run["way"] == "loop" else "the recipe")
        assert run["tokens_per_s"] == pytest.approx(1e3 * run["tokens_a_step"] / run["step_ms"]["median"], rel=1e-2)
    (pairs,) = result["end_to_end_ratios"].values()
    peft, torch_ = (next(run for run in result["end_to_end"] if run["backend"] == name) for name in ("peft", "torch"))
    assert pairs == {"torch to peft": {"tokens_per_s": round(torch_["tokens_per_s"] / peft["tokens_per_s"], 3)}}


@pytest.mark.wide
def test_interpreted_triton_on_a_bare_machine(tmp_path: Path) -> None:
    """Only torch, triton, transformers, peft and their dependencies are installed."""
    blocked = ("pydantic", "bitsandbytes", "trl", "datasets", "sqlalchemy", "fastapi", "matplotlib")
    only = ("--only", "tiny G")
    found = smoke(tmp_path / "found.json", *only, blocked=blocked, TRITON_INTERPRET="1")
    shape = "tiny Granite-3.0-1b-a400m"
    *cases, coded = found["layers"]
    assert [case["shape"] for case in found["layers"]] == [shape] * 3
    assert {one["why"] for one in coded["variants"].values()} == {"bitsandbytes is not installed"}
    for case in cases:
        assert case["variants"]["triton"]["status"] == "ok", case["variants"]["triton"]
        assert case["ratios"]["times_as_fast_as"]["torch"]["forward"] > 0
    assert [run["status"] for run in found["end_to_end"]] == ["ok"] * 4
    assert {run["way"] for run in found["end_to_end"]} == {"loop"}
    assert all("pydantic is not installed" in run["adapted_by"] for run in found["end_to_end"])
    assert found["skipped"]["chart"] == "matplotlib is not installed"


@pytest.mark.wide
def test_the_loops_losses_are_one_whoever_adapts_and_computes() -> None:
    """Fresh LoRA adds nothing, so SFT's loss is the model's and DPO's is log 2; a gradient reaches every expert's B."""
    ids = torch.randint(3, 384, (4, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for backend in ("torch", "peft"):
        torch.manual_seed(0)
        model, _ = models.adapted(models.AutoModelForCausalLM.from_config(models.TINY.config), backend)
        losses.append(models.sft_loss(model, ids))
        preferred = models.dpo_loss(model, ids)
        assert preferred.item() == pytest.approx(0.6931472, abs=1e-5)
        preferred.backward()
        touched = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
        assert any("experts" in name and "lora_B" in name for name in touched)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.model_type)
def test_the_truth_is_transformers_own_arithmetic(shape: Any) -> None:
    inputs = draw(shape, 9, "Zipf", CPU, torch.float32)
    truth = Layer(shape, "full", 0, None, CPU, torch.float32).learnt(inputs.copied(torch.float32))
    eager = Layer(shape, "full", 0, "eager", CPU, torch.float32).learnt(inputs.copied(torch.float32))
    torch.testing.assert_close(truth, eager)


def test_a_variant_that_is_wrong_fails_and_gives_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(TINY[:1])[0]
    right = Layer.__call__

    def wrong(layer: Layer, inputs: Any) -> torch.Tensor:
        out = right(layer, inputs)
        return out * 1.01 if layer.model.config._experts_implementation == "moe_torch" else out

    monkeypatch.setattr(Layer, "__call__", wrong)
    found = Bench(Clock(CPU, LEAST, 0.01), torch.float32, variants=("grouped_mm", "torch")).run(case)
    assert found["variants"]["grouped_mm"]["status"] == "ok"
    assert found["variants"]["torch"]["status"] == "failed"
    assert "errors: out 0.01 (there" in found["variants"]["torch"]["why"]
    assert report.ms(found, "torch") is None


def test_a_variant_that_breaks_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: Layer, implementation: str) -> None:
        raise torch.OutOfMemoryError(f"no room for {implementation}")

    monkeypatch.setattr(Layer, "_take_ours", broken)
    case = tiny(TINY[:1])[0]
    found = Bench(Clock(CPU, LEAST, 0.01), torch.float32, variants=("torch", "eager", "grouped_mm")).run(case)
    assert found["variants"]["torch"] == {
        "status": "failed", "why": "OutOfMemoryError: no room for moe_torch", "first_call_s": 0.0, "ms": {},
        "peak_mib": None, "relative_errors": {},
    }  # fmt: skip
    assert {found["variants"][name]["status"] for name in ("eager", "grouped_mm")} == {"ok"}


def command(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    """The result of `--smoke` in this process."""
    monkeypatch.setattr(sys, "argv", ["experts_gpu", "--smoke", "--out", str(out), *options])
    experts_gpu.main()
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_what_there_was_no_time_for_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = command(monkeypatch, tmp_path / "found.json", "--minutes", "1e-9")
    assert found["layers"] == []
    names = [case.name for case in tiny(TINY)]
    assert found["left_out"][0] == "ceilings"
    assert set(names) < set(found["left_out"])


@pytest.mark.parametrize("error", [DeviceLost("gone"), RuntimeError("illegal memory access")])
def test_a_lost_device_ends_it_with_what_there_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def lost(bench: Bench, case: Case) -> dict[str, Any]:
        if "Mixtral" in case.name:
            raise error
        return {"case": case.name, "mode": case.mode, "routing": case.routing, "variants": {}}

    monkeypatch.setattr(Bench, "run", lost)
    found = command(monkeypatch, tmp_path / "found.json", "--only", "LoRA r=4")
    names = [case.name for case in tiny(TINY) if "LoRA r=4" in case.name]
    assert [case["case"] for case in found["layers"]] == names[:1]
    assert found["left_out"] == names[1:]
    assert str(error) in found["skipped"]["the rest"]


def test_no_memory_for_a_truth_ends_that_case_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(bench: Bench, case: Case) -> dict[str, Any]:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Bench, "run", full)
    found = command(monkeypatch, tmp_path / "found.json", "--only", "LoRA r=4")
    assert found["left_out"] == []
    assert {case.name for case in tiny(TINY) if "LoRA r=4" in case.name} < set(found["skipped"])


def test_targets_are_computed_from_the_figures() -> None:
    figures = {"triton": (1.0, 2.0, 400), "grouped_mm": (3.0, 4.2, 1000), "torch": (1.5, 2.6, 500),
               "eager": (30.0, 60.0, 900)}  # fmt: skip
    case = _figures(Case(SHAPES[0]), figures, share=0.6)
    other = _figures(Case(SHAPES[2]), {"triton": (1.0, 2.0, 1), "torch": (0.9, 1.8, 1)}, share=0.5)
    found = report.targets([case, other], "NVIDIA H200")
    assert found["apply_here"] is True
    said = {name: (found[name]["found"], found[name]["is"]) for name in report.TARGETS}
    assert said == {
        "share of the dense rate, forward": (0.6, "hit"),
        "share of the dense rate, forward+backward": (0.6, "hit"),
        "times as fast as PEFT on grouped_mm": (2.1, "hit"),
        "times as fast as torch split LoRA": (1.3, "missed"),
        "times as fast as eager": (30.0, "hit"),
        "peak memory of PEFT's on grouped_mm": (0.4, "hit"),
        "times as fast as the best baseline, at the worst case": (0.9, "missed"),
    }
    worst = "times as fast as the best baseline, at the worst case"
    assert "Granite" in found[worst]["note"]
    other["variants"]["triton"] = Found("failed", "wrong").as_json()
    other["ratios"] = report.ratios(other)
    again = report.targets([case, other], "NVIDIA H100")
    assert (again[worst]["found"], again[worst]["is"], again["apply_here"]) == (0.0, "missed", False)


def test_arithmetic_by_hand() -> None:
    """Qwen3-30B-A3B, 8,192 tokens: 65,536 rows through 3 x 2048 x 768 numbers, and r=16 beside them."""
    qwen = SHAPES[0]
    base = 2 * 65536 * 3 * 2048 * 768
    thin = 2 * 65536 * 16 * (2048 + 2 * 768 + 768 + 2048)
    assert qwen.flops(8192, "LoRA", 16, "forward") == base + thin
    assert qwen.flops(8192, "4-bit LoRA", 16, "forward+backward") == 2 * base + 3 * thin
    assert qwen.flops(8192, "full", 0, "forward+backward") == 3 * base
    weights = 128 * 3 * 2048 * 768
    moved = 2 * (2 * 8192 * 2048 + 65536 * (2 * 768 + 2 * 768)) + 2 * weights
    assert qwen.bytes_moved(8192, "full", 0, "forward") == moved
    assert qwen.floor_ms(8192, "full", 0, "forward") == pytest.approx(1e3 * base / DENSE_FLOPS)
    few = replace(qwen, top_k=1)
    assert few.floor_ms(64, "full", 0, "forward") == pytest.approx(
        1e3 * few.bytes_moved(64, "full", 0, "forward") / BANDWIDTH
    )


def test_the_notes_hold_the_tables_of_the_formulas() -> None:
    text = experts_gpu.NOTES.read_text(encoding="utf-8")
    assert experts_gpu.with_tables(text) == text, "run `python -m benchmarks.experts_gpu --arithmetic`"
    with pytest.raises(ValueError, match="has no"):
        experts_gpu.with_tables("nothing")


def test_the_order_begins_with_the_targets_and_leaves_nothing_out() -> None:
    names = [case.name for case in in_order()]
    assert names[0] == report.TARGET_CASE
    assert names[: experts_gpu.FIRST] == [Case(shape).name for shape in SHAPES]
    assert len(names) == len(set(names)) == 5 * 3 * 3 * 5


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.model_type)
def test_routings(shape: Any) -> None:
    """Each token has experts of its own, all different; balanced ones are so to a row, one-hot ones to none."""
    for routing, busiest in (("balanced", 64 * shape.top_k // 4), ("Zipf", None), ("one-hot", 64)):
        index = draw(shape, 64, routing, CPU, torch.float32).index
        assert all(len(set(row)) == shape.top_k for row in index.tolist())
        counts = torch.bincount(index.flatten(), minlength=shape.experts)
        assert busiest is None or counts.max() == busiest
        assert counts.max() >= counts.sum() / shape.experts
    assert draw(shape, 64, "Zipf", CPU, torch.float32).index.equal(draw(shape, 64, "Zipf", CPU, torch.float32).index)


def test_liger_is_for_full_training_of_plain_experts() -> None:
    cuda = torch.device("cuda")
    assert why_not("liger", SHAPES[0], "LoRA", cuda, False) == "it has no LoRA"
    assert why_not("liger", SHAPES[3], "full", cuda, False) == "it takes plain experts with silu"


def test_the_clock_repeats_slow_work_less_often() -> None:
    calls = []
    times = Clock(CPU, 30, 0.0).times(lambda: None, lambda: calls.append(1))
    assert (times.repetitions, len(calls)) == (LEAST, LEAST + 1)
    assert Clock(CPU, 30, 10.0).times(lambda: None, lambda: None).repetitions == 30


def _shape(case: dict[str, Any]) -> Any:
    return next(shape for shape in TINY if shape.name == case["shape"])


def _figures(case: Case, found: dict[str, tuple[float, float, int]], share: float) -> dict[str, Any]:
    """A case's entry in a result, of (forward ms, both ms, peak MiB) by variant."""
    variants = {}
    for name, (forward, both, mib) in found.items():
        one = Found("ok", times={what: Times(ms, ms, ms, 30) for what, ms in zip(PASSES, (forward, both), strict=True)})
        one.peak_bytes = mib * 2**20
        variants[name] = one.as_json() | {"share_of_dense": dict.fromkeys(PASSES, share)}
    entry: dict[str, Any] = {"case": case.name, "variants": variants}
    return entry | {"ratios": report.ratios(entry)}
