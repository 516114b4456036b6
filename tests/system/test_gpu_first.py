"""The first contact with a GPU, without one: kernels interpreted and compiled, and faults of child processes."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_first

pytest.importorskip("triton", reason="triton is published for Linux only")


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu_first", *options, "--out", str(out)])
    code = gpu_first.main()
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return code, found


def test_kernels_alone_are_right_when_they_are_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first, "table", lambda *_: None)  # `test_benchmark_gpu` runs the tables
    code, found = run(monkeypatch, tmp_path / "found.json", "--interpret", "--only", "gradient of", "--minutes", "60")
    assert (code, found["faults"], found["left_out"]) == (0, [], [])
    assert set(found["kernels"]) == {"gradient of rows", "gradient of A", "gradient of B", "gradient of W"}
    for candidates in found["kernels"].values():
        [only] = candidates  # interpreted, there is one
        assert only["right"]
        assert 0 < max(only["twins"]) < 2**-6


CHILD = """
import json, os, sys, time
first = int(sys.argv[sys.argv.index("--from") + 1])
for number in range(first, 5):
    print(json.dumps({"begins": number, "candidate": f"tile {number}"}), flush=True)
    if number == 1: os.abort()
    if number == 2: time.sleep(600)
    if number == 3: sys.exit("an illegal memory access")
    right = number != 4
    print(json.dumps({"ends": number, "candidate": f"tile {number}", "right": right, "worst_errors": [1.0],
                      "twins": [0.1], "ms": 2.0 if right else None, "spills": 0}), flush=True)
"""


def test_a_candidate_that_takes_its_process_down_is_named_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, hung, ended and wrong candidates; a run that is cut off leaves what it had."""
    started = gpu_first.started

    def faulty(command: list[str], arguments: argparse.Namespace) -> Any:
        return started([sys.executable, "-c", CHILD, *command[3:]], arguments)

    monkeypatch.setattr(gpu_first, "started", faulty)
    monkeypatch.setattr(gpu_first, "SILENT_S", 3.0)
    monkeypatch.setattr(gpu_first, "table", lambda *_: None)
    code, found = run(monkeypatch, tmp_path / "found.json", "--interpret", "--only", "gradient of A", "--minutes", "60")
    assert code == 1
    assert [each["right"] for each in found["kernels"]["gradient of A"]] == [True, False, False, False, False]
    expected = ("tile 1: exit code -6", "tile 2: silent for 3 s", "an illegal memory access", "tile 4: wrong by 1")
    for fault, told in zip(found["faults"], expected, strict=True):
        assert fault.startswith("gradient of A, tile")
        assert told in fault
    written = []
    monkeypatch.setattr(gpu_first, "write", lambda result, path: written.append(json.dumps(result)))
    with pytest.raises(FileNotFoundError):
        run(monkeypatch, tmp_path / "other.json", "--interpret", "--only", "gradient of A", "--minutes", "60")
    assert len(written) > 5, "after each finding"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_no_candidate_spills_on_any_architecture(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = run(monkeypatch, tmp_path / "found.json", "--compile", "--arch", arch)
    assert (code, found["faults"]) == (0, [])
    names = {each["candidate"].split(":")[0] for each in found["compiled"]}
    assert {"times, LoRA, gathered", "times, LoRA, turned", "times, bias", "outer", "sum of rows"} <= names
    assert all(each["shared_bytes"] <= 227 * 1024 for each in found["compiled"])
