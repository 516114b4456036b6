"""The Triton kernels without a GPU: interpreted against double precision, and compiled for three generations."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.experts.kernels.groups import Groups

pytest.importorskip("triton", reason="triton is published for Linux only")

# fp32 stores to bf16 are cut off, not rounded, by triton 3.9's interpreter: twice the error, and more of two in a row.
NO_WORSE = {"fp32": 1.5, "fp16": 1.5, "bf16": 3.5}


def run(what: str) -> list[dict[str, Any]]:
    """The cases' answers, from a process of its own."""
    environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"}
    if what != "compile":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_cases", what],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_interpreted_every_case_is_no_worse_than_its_torch_twin() -> None:
    """Output and each gradient against fp64; memory that nobody wrote is NaN; the same again at a second run."""
    cases = run("interpret")
    assert len(cases) == 3 * (12 + 2 * 2)
    for case in cases:
        assert case["same_again"], case["case"]
        expected = {"out", "gradient of rows", "gradient of weight"} if "no token" not in case["case"] else set()
        assert expected <= set(case["errors"]), case["case"]
        for what, (ours, twin) in case["errors"].items():
            assert ours <= NO_WORSE[case["dtype"]] * twin + 1e-7, (case["case"], what, ours, twin)


def test_interpreted_whole_models_are_those_of_torch() -> None:
    cases = run("models")
    assert len(cases) == 4
    for case in cases:
        assert case["compared"] > 10, case
        assert case["worst"] < 1e-5, case


def test_compiled_for_three_generations_without_spills() -> None:
    cases = run("compile")
    assert len(cases) == 3 * 3 * 3
    for case in cases:
        assert case["registers"] <= 255, case
        assert case["local_bytes"] == 0, case
        assert case["shared_bytes"] <= 160 * 1024, case


def test_the_schedule_covers_every_row_once() -> None:
    from llama_stack_provider_moe.experts.kernels.grouped import schedule

    for sizes in ((3, 0, 5), (0, 0, 40), (17, 1, 30), (0, 0, 0)):
        groups = Groups(torch.tensor(sizes).cumsum(0).int())
        owners = [expert for expert, size in enumerate(sizes) for _ in range(size)]
        seen: dict[int, int] = {}
        for expert, first, end in schedule(groups, sum(sizes), 16).tolist():
            for row in range(first, min(first + 16, end)):
                assert row not in seen
                seen[row] = expert
        assert [seen[row] for row in range(sum(sizes))] == owners
