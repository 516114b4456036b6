"""Compare two runs of a job: final weights, and the figures of every step and evaluation."""

import pytest
import torch

from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.support.training_support import Run

TIMED = ("tokens_per_s", "tokens_per_s_per_device", "tflops_per_device", "memory_bytes")


def curve(run: Run) -> dict[int, dict[str, float]]:
    """Each step's metrics as last written, without times and memory."""
    return {
        event.step: {name: value for name, value in event.metrics.items() if name not in TIMED}
        for event in run.events("step")
    }


def assert_alike(run: Run, other: Run, atol: float) -> None:
    """Check that final weights and the figures of every step and evaluation are equal up to rounding."""
    assert run.exit_code == COMPLETED, run.reason or run.folder.output.read_text()
    mine, theirs = run.final(), other.final()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    mine_by_step, theirs_by_step = curve(run), curve(other)
    assert mine_by_step.keys() == theirs_by_step.keys()
    for step, metrics in theirs_by_step.items():
        compare(mine_by_step[step], metrics)
    mine_held_out, theirs_held_out = ({event.step: event.metrics for event in each.events("evaluation")}
                                      for each in (run, other))  # fmt: skip
    assert mine_held_out.keys() == theirs_held_out.keys()
    for step, metrics in theirs_held_out.items():
        compare(mine_held_out[step], metrics)
    mine_routing, theirs_routing = ({event.step: event.layers for event in each.events("routing")}
                                    for each in (run, other))  # fmt: skip
    for step, layers in theirs_routing.items():
        for mine_layer, layer in zip(mine_routing[step], layers, strict=True):
            assert mine_layer.share == pytest.approx(layer.share, abs=1e-6), (
                "what experts got, counted in all processes"
            )


def compare(found: dict[str, float], expected: dict[str, float]) -> None:
    """Compare the figures of a step or an evaluation, except those that rounding decides."""
    left_out: set[str] = set()
    if abs(expected.get("rewards/margins", 1.0)) < 1e-4:
        left_out = {"rewards/accuracies"}  # rounding decides which of two equal numbers is greater
    assert found.keys() | left_out == expected.keys() | left_out
    kept = expected.keys() - left_out
    assert {name: found[name] for name in kept} == pytest.approx(
        {name: expected[name] for name in kept}, rel=2e-3, abs=2e-4
    )
