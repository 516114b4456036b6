"""The first contact with a GPU, without one: kernels interpreted and compiled, and faults of child processes."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_first

pytest.importorskip("triton", reason="triton is published for Linux only")
from benchmarks.gpu.kernels_alone import OnlyCompiled


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu_first", *options, "--out", str(out)])
    code = gpu_first.main()
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return code, found


@pytest.mark.wide
def test_kernels_alone_are_right_when_they_are_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first, "table", lambda *_: None)  # `test_benchmark_gpu` runs the tables
    code, found = run(monkeypatch, tmp_path / "found.json", "--interpret", "--only", "gradient of", "--minutes", "60")
    assert (code, found["faults"], found["left_out"]) == (0, [], [])
    assert set(found["kernels"]) == {
        "gradient of rows", "gradient of A", "gradient of B", "gradient of W", "gradient of rows, dropout",
        "gradient of A, dropout",
    }  # fmt: skip
    for candidates in found["kernels"].values():
        [only] = candidates  # interpreted, there is one
        assert only["right"]
        assert 0 < max(only["twins"]) < 2**-6


CHILD = """
import json, os, sys, time
first = int(sys.argv[sys.argv.index("--from") + 1])
for number in range(first, 6):
    print(json.dumps({"begins": number, "candidate": f"tile {number}"}), flush=True)
    if number == 1: os.abort()
    if number == 2: time.sleep(600)
    if number == 3: sys.exit("an illegal memory access")
    if number == 5:
        told = {"ends": 5, "candidate": "tile 5", "right": False, "why": "OutOfResources: shared"}
        print(json.dumps(told), flush=True)
        continue
    right = number != 4
    print(json.dumps({"ends": number, "candidate": f"tile {number}", "right": right, "worst_errors": [1.0],
                      "twins": [0.1], "ms": 2.0 if right else None, "spills": 0}), flush=True)
"""


def test_a_candidate_that_takes_its_process_down_is_named_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, hung, ended and wrong candidates; a run that is cut off leaves what it had."""
    started = gpu_first.started

    def faulty(command: list[str], arguments: argparse.Namespace, *, told: bool = True) -> Any:
        return started([sys.executable, "-c", CHILD, *command[3:]], arguments, told=told)

    monkeypatch.setattr(gpu_first, "started", faulty)
    monkeypatch.setattr(gpu_first, "SILENT_S", 0.3)
    monkeypatch.setattr(gpu_first, "table", lambda *_: None)
    code, found = run(monkeypatch, tmp_path / "found.json", "--interpret", "--only", "gradient of B", "--minutes", "60")
    assert code == 1
    assert [each["right"] for each in found["kernels"]["gradient of B"]] == [True, False, False, False, False, False]
    expected = (
        "tile 1: exit code -6",
        "tile 2: silent for 3 s",
        "an illegal memory access",
        "tile 4: wrong by 1",
        "tile 5: OutOfResources: shared",
    )
    for fault, told in zip(found["faults"], expected, strict=True):
        assert fault.startswith("gradient of B, tile")
        assert told in fault
    written = []
    monkeypatch.setattr(gpu_first, "write", lambda result, path: written.append(json.dumps(result)))
    with pytest.raises(FileNotFoundError):
        run(monkeypatch, tmp_path / "other.json", "--interpret", "--only", "gradient of B", "--minutes", "60")
    assert len(written) > 5, "after each finding"


TABLE = """
import json, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
without, fault = "--without" in sys.argv, {fault!r}
keys = ("layers", "end_to_end", "ceilings", "targets", "end_to_end_ratios")
found = dict.fromkeys(keys, ["ours left out"] if without else ["one"]) | {{"skipped": {{}}, "left_out": []}}
if fault == "loses the device" and not without:
    found["skipped"]["the rest"] = "lost the device in a case"
open(out, "w").write(json.dumps(found))
if fault == "hangs" and not without: time.sleep(600)
if fault == "ends" and not without: sys.exit("an illegal memory access")
"""


@pytest.mark.parametrize(("fault", "told"), [
    ("none", ""), ("loses the device", "layers: lost the device in a case"), ("hangs", "layers: no case in 2 s"),
    ("ends", "layers: exit code 1; an illegal memory access"),
])  # fmt: skip
def test_a_table_that_triton_ends_runs_again_without_it(
    fault: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = gpu_first.started

    def child(command: list[str], arguments: argparse.Namespace, *, told: bool = True) -> Any:
        assert "--loop" in command
        return started([sys.executable, "-c", TABLE.format(fault=fault), *command[3:]], arguments, told=told)

    monkeypatch.setattr(gpu_first, "started", child)
    monkeypatch.setattr(gpu_first, "kernels", lambda *_: None)
    monkeypatch.setattr(gpu_first, "TABLE_SILENT_S", 0.2)
    code, found = run(monkeypatch, tmp_path / "found.json", "--interpret", "--minutes", "60")
    assert found["layers"]["layers"] == ["one"], "what a run had before it ended"
    assert [each.partition("; it")[0] for each in found["faults"]][:1] == ([told] if told else [])
    assert code == bool(told)
    assert ("layers without triton" in found) == bool(told)
    if told:
        assert found["layers without triton"]["layers"] == ["ours left out"]


def test_candidates_are_compiled_ahead_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails or hangs holds up nothing but its time."""
    begun: list[str] = []
    started = gpu_first.started

    def child(command: list[str], arguments: argparse.Namespace, *, told: bool = True) -> Any:
        assert command[-1] == "--ahead"
        begun.append(command[3])
        work = {"gate": "import time; time.sleep(600)", "outer": "raise SystemExit(3)"}.get(command[3], "pass")
        return started([sys.executable, "-c", work], arguments, told=told)

    monkeypatch.setattr(gpu_first, "started", child)
    result: dict[str, Any] = {}
    arguments = argparse.Namespace(only="", interpret=False, out=tmp_path / "found.json")
    began = time.monotonic()
    gpu_first.compile_ahead(result, arguments, began + 20)
    assert set(begun) == set(gpu_first.KERNELS)
    assert result["ahead_s"] >= 20, "the one that hangs was ended"
    assert time.monotonic() - began < 40


def test_ahead_nothing_runs() -> None:
    calls: list[Any] = []

    class Kernel:
        def warmup(self, *arguments: Any, grid: Any, **options: Any) -> None:
            calls.append((arguments, grid, options))

    OnlyCompiled(Kernel())[(7,)](1, 2, BLOCK=3)
    assert calls == [((1, 2), (7,), {"BLOCK": 3})]


@pytest.mark.wide
def test_numbers_that_vary_from_step_to_step_compile_nothing_again() -> None:
    from llama_stack_provider_moe.compute.moe.kernels import pointwise, ragged

    varying = {"total", "tiles_o", "tiles_i"}
    for kernel, names in (
        (ragged.times, varying), (ragged.outer, varying), (pointwise._gated, {"rows"}),
        (pointwise._gated_backward, {"rows"}), (pointwise._weighted_sum, {"all_rows"}),
    ):  # fmt: skip
        free = {each.name for each in kernel.params if each.do_not_specialize}
        assert free == names & {each.name for each in kernel.params}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_no_candidate_spills_on_any_architecture(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = run(monkeypatch, tmp_path / "found.json", "--compile", "--arch", arch)
    assert (code, found["faults"]) == (0, [])
    names = {each["candidate"].split(":")[0] for each in found["compiled"]}
    assert {"times, LoRA, gathered", "times, LoRA, turned", "times, bias", "outer", "sum of rows"} <= names
    assert all(each["shared_bytes"] <= 227 * 1024 for each in found["compiled"])
