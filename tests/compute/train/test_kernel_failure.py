"""What becomes of a job when Triton's kernels fail: in their trial, and in the middle of training.

There is no GPU: Triton interprets its kernels on the CPU, in processes of their own.
"""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from triton import TritonError

from llama_stack_provider_moe.compute.moe import implementation, kernel_choice
from llama_stack_provider_moe.compute.train.kernel_failure import is_of_a_kernel
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.jobdir.experts_backend import HANDED_OVER, read_override, write_override
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

SHORT: dict[str, Any] = {"training": {"batch_size": 1, "max_steps_per_epoch": 3}}


@pytest.mark.parametrize(("fault", "reason"), [
    ("raises", "the kernel has had enough (exit code 1)"), ("has a wrong tile", "of the norm in a block of"),
])  # fmt: skip
def test_a_job_trains_with_torch_if_triton_fails_its_trial(
    fault: str, reason: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log says why; a job that asks for Triton by name is refused before its first step."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    child = (sys.executable, "-m", "tests.support.faulty_trial", fault)
    monkeypatch.setattr(implementation, "run_trial", partial(kernel_choice.run_trial, command=child))
    run = workshop.run("sft", "mixtral", **SHORT)
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["moe"]["experts_implementation"] == "moe_torch"
    assert any(reason in note for note in run.resolved["moe"]["notes"])
    assert reason in capfd.readouterr().out
    if fault == "raises":
        refused = workshop.run("sft", "mixtral", moe={"experts_backend": "triton"}, **SHORT)
        assert refused.exit_code == FAILED
        assert "moe.experts_backend: 'triton' is not valid here: one layer forward and backward" in refused.reason
        assert reason in refused.reason
        assert not refused.events("step")


def test_a_kernel_that_fails_in_training_hands_over_to_torch(workshop: Workshop) -> None:
    """From the last step, which is saved; the job ends as one that torch trained from the start."""
    folder = workshop.job("sft", "mixtral", moe={"experts_backend": "triton"}, **SHORT)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.faulty_training", "2", str(folder.root)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    run = Run(folder, done.returncode)
    assert done.returncode == HANDED_OVER, done.stdout + done.stderr
    assert len(run.events("step")) == 2
    assert not run.events("failed")
    assert run.resolved["moe"]["experts_implementation"] == "moe_triton"
    [warning] = [each.text for each in run.events("message") if each.level == "warning"]
    assert warning == (
        "a kernel failed after step 2: AcceleratorError: CUDA error: an illegal memory access was encountered; it "
        "resumes after step 2; the job goes on with moe.experts_backend torch, in a new process"
    )
    assert warning in done.stderr
    override = read_override(folder)
    assert override is not None
    assert override.experts_backend == "torch"
    assert override.reason in warning

    run = workshop.again(run)
    assert run.exit_code == COMPLETED, run.reason
    assert [each.step for each in run.events("resumed")] == [2]
    assert run.resolved["moe"]["experts_implementation"] == "moe_torch"
    assert any(note.startswith("moe.experts_backend is torch, not triton: a kernel failed after step 2")
               for note in run.resolved["moe"]["notes"])  # fmt: skip
    whole = workshop.run("sft", "mixtral", moe={"experts_backend": "torch"}, **SHORT)
    for name, tensor in whole.adapter().items():
        torch.testing.assert_close(run.adapter()[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_backend_that_a_resumption_asks_for_is_used(workshop: Workshop) -> None:
    folder = workshop.job("sft", "mixtral", moe={"experts_backend": "torch"}, **SHORT)
    write_override(folder, "peft", "asked for when the job was resumed")
    run = workshop.again(Run(folder, 0))
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["moe"]["experts_implementation"] == "grouped_mm"
    assert "moe.experts_backend is peft, not torch: asked for when the job was resumed" in run.resolved["moe"]["notes"]


@pytest.mark.parametrize(("error", "is_one"), [
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
    (TritonError("out of resources"), True), (RuntimeError("Triton Error [CUDA]: an illegal memory access"), True),
    (RuntimeError("CUDA error: unspecified launch failure"), True), (subprocess.CalledProcessError(1, "gcc"), True),
    (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    (torch.OutOfMemoryError("CUDA out of memory"), False), (ValueError("CUDA error"), False),
    (RuntimeError("NCCL communicator was aborted; CUDA error"), False),
])  # fmt: skip
def test_which_errors_can_be_a_kernels(error: Exception, is_one: bool) -> None:
    assert is_of_a_kernel(error) is is_one
