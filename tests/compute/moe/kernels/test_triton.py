"""The Triton kernels without a GPU: interpreted against double precision, and compiled for three generations."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.moe.kernels.groups import Groups

pytest.importorskip("triton", reason="triton is published for Linux only")

ROOT = Path(__file__).parents[4]
# fp32 stores to bf16 are cut off, not rounded, by triton 3.9's interpreter: twice the error, and more of two in a row.
NO_WORSE = {"fp32": 1.5, "fp16": 1.5, "bf16": 3.5}
# Cut-off numbers err in one direction, so that a dot product of few of them does too: three in a row, 2^-8 each.
CUT_OFF = {"fp32": 1e-7, "fp16": 1e-7, "bf16": 3 * 2**-8}


def run(what: str) -> list[dict[str, Any]]:
    """The cases' answers, from a process of its own."""
    environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"}
    if what != "compile":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_cases", what],
        env=environment, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def no_worse(cases: list[dict[str, Any]], floor: dict[str, float]) -> None:
    for case in cases:
        assert case["same"], case["case"]
        expected = {"out", "gradient of"} if "no token" not in case["case"] else set()
        assert all(any(what.startswith(each) for what in case["errors"]) for each in expected), case["case"]
        for what, (ours, twin) in case["errors"].items():
            assert ours <= NO_WORSE[case["dtype"]] * twin + floor[case["dtype"]], (case["case"], what, ours, twin)


def test_interpreted_every_case_is_no_worse_than_its_torch_twin() -> None:
    """Output and each gradient against fp64, also with dropout, whose masks are those of the formula bit by bit; memory
    that nobody wrote is NaN; the same again at a second run (of two shapes), and without tensor descriptors."""
    cases = run("interpret")
    masks = [case for case in cases if case["case"].startswith("mask")]
    cases = [case for case in cases if case not in masks]
    assert len(cases) == 2 * (12 + 2 * 2 + 5) + 3 + 2 + 3  # fp32 and bf16 whole, fp16 in part
    no_worse(cases, dict.fromkeys(CUT_OFF, 1e-7))
    assert len(masks) == 4
    for case in masks:
        assert case["same"], case
        assert abs(case["dropped"] - float(case["case"].split()[1])) < 0.01, case


@pytest.mark.wide
def test_interpreted_layers_are_no_worse_than_their_torch_twins() -> None:
    """Gates, their backward, sums of rows and gathers, in a whole layer with LoRA and biases."""
    cases = run("layers")
    assert len(cases) == 5 + 2 + 1 + 3 + 1 + 1  # fp32 whole, bf16 and fp16 where there are most tokens
    no_worse(cases, CUT_OFF)
    assert all(len(case["errors"]) == 11 for case in cases)


@pytest.mark.wide
def test_interpreted_whole_models_equal_torch() -> None:
    cases = run("models")
    assert len(cases) == 4
    for case in cases:
        assert case["compared"] > 10, case
        assert case["worst"] < 2e-5, case  # measured: 1.04e-5 with AVX-512


def test_compiled_for_three_generations_without_spills() -> None:
    """Hopper's own ways are in what was compiled for it: wgmma, and TMA where it is asked for."""
    cases = run("compile")
    assert len(cases) == 3 * 3 * 9 + 2 * 2 * 3 + 3 * 6
    for case in cases:
        kind, arch, dtype = case["case"].rsplit(", ", 2)
        assert case["registers"] <= 255, case
        # ptxas counts spills in the stack's bytes; the gates' 8 are a call of fp32's division (`ptxas -v`: no spills).
        assert case["stack_bytes"] <= (8 if kind.startswith("gate") else 0), case
        assert case["local_bytes"] == 0, case
        assert case["shared_bytes"] <= 160 * 1024, case
        assert (case["tma"] > 0) is kind.endswith("TMA"), case
        # wgmma takes 64 rows at least, and the rank of A's gradient is 16.
        large = kind.startswith(("times", "outer")) and kind != "outer, dropout"
        assert (case["wgmma"] > 0) is (arch == "sm_90" and dtype != "fp32" and large), case


LISTED = """
import json
from benchmarks.gpu.compiled import ARCHITECTURES, candidates
from benchmarks.gpu.kernels_alone import KERNELS
every = [[f"sm_{arch}", each[0]] for arch in ARCHITECTURES for each in candidates(arch, "bf16")]
print(json.dumps([every, list(KERNELS)]))
"""


def newest(what: str) -> Any:
    found = json.loads(max((ROOT / "benchmarks" / "results").glob(f"gpu_first_{what}_*.json")).read_bytes())
    assert (found["faults"], found["left_out"]) == ([], [])
    return found


def test_every_candidate_was_compiled_for_three_generations_without_spills() -> None:
    """The committed results of `make gpu-first MODE=--compile` and `MODE=--interpret` are of today's candidates."""
    done = subprocess.run(
        [sys.executable, "-c", LISTED], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT
    )
    every, kernels = json.loads(done.stdout)
    compiled = newest("compile")["compiled"]
    assert [[case["arch"], case["candidate"]] for case in compiled] == every
    assert {case["stack_bytes"] for case in compiled} == {0}
    interpreted = newest("interpret")
    assert list(interpreted["kernels"]) == kernels
    assert all(case["right"] for cases in interpreted["kernels"].values() for case in cases)
    assert interpreted["layers"]["layers"]
    assert interpreted["end_to_end"]["end_to_end"]


def test_a_choice_of_tiles_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_stack_provider_moe.compute.moe.kernels.tiles import Measured, Tiles, cached

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    candidates = (Tiles(16, 16, 16), Tiles(32, 16, 16), Tiles(64, 16, 16), Tiles(128, 16, 16))
    found = {
        16: Measured(3.0), 32: Measured(1.0), 64: Measured(None, "is off by 1"), 128: Measured(0.5, spills=8)
    }  # fmt: skip
    asked: list[int] = []

    def measure(tiles: Tiles) -> Measured:
        asked.append(tiles.rows)
        return found[tiles.rows]

    assert cached("some GPU", "times", (1, 2), candidates, measure).rows == 32, "the fastest of those without spills"
    assert cached("some GPU", "times", (1, 2), candidates, measure).rows == 32
    assert asked == [16, 32, 64, 128], "the second answer comes from the disk"
    for different in (("other GPU", (1, 2)), ("some GPU", (1, 3))):
        asked.clear()
        cached(different[0], "times", different[1], candidates, measure)
        assert asked == [16, 32, 64, 128], different
    for path in tmp_path.rglob("tiles.json"):
        path.write_text(path.read_text()[:9])
    asked.clear()
    assert cached("some GPU", "times", (1, 2), candidates, measure).rows == 32
    assert asked == [16, 32, 64, 128], "a file that is cut short is as none"
    assert cached("some GPU", "times", (1, 2), candidates[2:], measure).rows == 128, "spills are better than nothing"
    with pytest.raises(RuntimeError, match=r"\(1, 2\): none of 1 tile sizes is correct on some GPU: is off by 1"):
        cached("some GPU", "times", (1, 2), candidates[2:3], measure)


def test_a_tile_is_timed_only_if_its_results_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that it does not write, wrong numbers and errors rule it out; rows of no expert are nobody's."""
    from llama_stack_provider_moe.compute.moe.kernels import tiles

    timed: list[int] = []
    monkeypatch.setattr(tiles, "do_bench", lambda run, **_: timed.append(1) or 2.5)
    out, expected = torch.zeros(40, 20), torch.ones(40, 20)
    expected[30:] = 0

    def writing(rows: int, value: float, problem: Exception | None = None) -> Any:
        def run(_: tiles.Tiles) -> None:
            out[:rows] = value
            if problem is not None:
                raise problem

        return tiles.Call(run, (out,), lambda: (expected,), lambda: 30).measured(tiles.Tiles(16, 16, 16), (expected,))

    assert writing(30, 1.0) == tiles.Measured(2.5)
    assert timed == [1]
    assert "is off by nan of the norm" in writing(29, 1.0).reason, "a row that was not written"
    assert "is off by 1 of the norm" in writing(30, 2.0).reason
    assert writing(30, 1.0, RuntimeError("an illegal memory access")).reason == "does not run (RuntimeError)"
    assert timed == [1]


def test_the_schedule_covers_every_row_once() -> None:
    from llama_stack_provider_moe.compute.moe.kernels.grouped import schedule

    for sizes in ((3, 0, 5), (0, 0, 40), (17, 1, 30), (0, 0, 0)):
        groups = Groups(torch.tensor(sizes).cumsum(0).int())
        owners = [expert for expert, size in enumerate(sizes) for _ in range(size)]
        seen: dict[int, int] = {}
        for expert, first, end in schedule(groups, sum(sizes), 16).tolist():
            for row in range(first, min(first + 16, end)):
                assert row not in seen
                seen[row] = expert
        assert [seen[row] for row in range(sum(sizes))] == owners
