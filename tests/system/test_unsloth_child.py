"""Jobs with `loader: unsloth` in Unsloth's own environment, which `make test` does not make.

    MOE_TEST_UNSLOTH_PYTHON=DIR/bin/python .venv/bin/python -m pytest tests/system/test_unsloth_child.py

On a CPU they go through `unsloth_driverless`, which says what it stands in for. Tests marked `gpu` run the training
process as it is; none of them has been run yet.
"""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.models.unsloth.entry import NOTICE
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

PYTHON = os.environ.get("MOE_TEST_UNSLOTH_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None,
    reason="MOE_TEST_UNSLOTH_PYTHON names no interpreter of Unsloth (docs/guides/unsloth.md)",
)
ROOT = Path(__file__).parents[2]
DRIVERLESS, PLAIN = "tests.support.unsloth_driverless", "llama_stack_provider_moe.compute.worker.main"


def by_unsloth(folder: JobFolder, module: str = DRIVERLESS) -> Run:
    """Run the job in Unsloth's environment with this checkout's package."""
    assert PYTHON is not None
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(ROOT),
                   "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    with folder.output.open("ab") as output:
        done = subprocess.run([PYTHON, "-m", module, str(folder.root)], stdout=output, stderr=subprocess.STDOUT,
                              cwd=folder.root, env=environment, timeout=1500, check=False)  # fmt: skip
    return Run(folder, done.returncode)


def told(run: Run) -> str:
    return run.reason + run.folder.output.read_text(encoding="utf-8", errors="replace")[-3000:]


ACCUMULATED = {"training": {"batch_size": 4, "gradient_accumulation_steps": 2, "n_epochs": 2}}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("recipe", "family"), [("sft", "qwen3_moe"), ("dpo", "llama")])
def test_a_job_trains_as_it_does_with_transformers(workshop: Workshop, recipe: str, family: str) -> None:
    """With the same rows, seed and fp32, each step's loss and the adapter equal those of transformers and PEFT."""
    # A reference computed ahead is so before our head is in TRL's place, by TRL 1.15's, which needs a GPU.
    more: dict[str, Any] = {"options": {"precompute_ref_log_probs": False}} if recipe == "dpo" else {}
    run = by_unsloth(workshop.job(recipe, family, loader="unsloth", **ACCUMULATED, **more))
    assert run.exit_code == 0, told(run)
    plain = workshop.run(recipe, family, **ACCUMULATED, **more, moe={"router_aux_loss_coef": 0})
    assert plain.exit_code == 0, plain.reason
    assert run.events("message")[0].text == NOTICE
    assert run.events("started")[0].versions["unsloth"]
    assert run.resolved["adapter"]["trainable_parameters"] == plain.resolved["adapter"]["trainable_parameters"]
    assert run.resolved["adapter"]["targets"] == plain.resolved["adapter"]["targets"]
    close(run.held_out("validation_loss"), plain.held_out("validation_loss"))
    close(run.steps("loss"), plain.steps("loss"))
    here, there = run.adapter(), plain.adapter()
    assert here.keys() == there.keys()
    for name, weight in here.items():
        torch.testing.assert_close(
            weight, there[name], rtol=0, atol=ATOL, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.timeout(3000)
def test_a_circuit_breaker_goes_on_as_it_does_with_transformers(workshop: Workshop) -> None:
    """Compared from the first epoch's end: before it, the gradient is only rounding error, which differs."""
    plain = workshop.run("circuit_breaker", "llama", **ACCUMULATED, moe={"router_aux_loss_coef": 0})
    assert plain.exit_code == 0, plain.reason
    folder = workshop.copied(plain)
    shutil.rmtree(folder.root / "checkpoints" / "epoch-2")
    spec = json.loads(folder.spec.read_text())
    folder.spec.write_text(json.dumps({**spec, "loader": "unsloth"}))
    run = by_unsloth(folder)
    assert run.exit_code == 0, told(run)
    assert [event.checkpoint for event in run.events("resumed")] == ["epoch-1"]
    close(run.held_out("validation_loss")[-1:], plain.held_out("validation_loss")[-1:])
    here, there = run.adapter(), plain.adapter()
    far = max((weight - there[name]).abs().max().item() for name, weight in here.items())
    assert here.keys() == there.keys()
    assert far < ATOL


# Measured, one epoch, fp32 on a CPU: weights 3.5e-7 apart after SFT (qwen3_moe, accumulated), 2.1e-7 after DPO (llama),
# 1.6e-7 after a breaker's second; losses 4e-7. Above that by what another CPU's order of sums may add.
ATOL = 1e-5


def close(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert math.isclose(one, other, abs_tol=ATOL), (ours, theirs)


@pytest.mark.timeout(1500)
def test_a_machine_that_it_can_not_use_is_named_as_the_reason(workshop: Workshop) -> None:
    """Without a GPU and without our stand-ins, loading fails; the job fails, too, and says why."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, which it can use")
    run = by_unsloth(workshop.job("sft", "llama", loader="unsloth"), PLAIN)
    assert run.exit_code == 1
    assert "Unsloth can't load" in run.reason
    assert "NVIDIA" in run.reason, run.reason


def gpu_job(workshop: Workshop, **blocks: Any) -> JobFolder:
    blocks["training"] = {"dtype": "bf16", **blocks.get("training", {})}
    return workshop.job(blocks.pop("recipe", "sft"), blocks.pop("family", "qwen3_moe"), loader="unsloth", **blocks)


@pytest.mark.gpu
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"adapter": {"quantize_base": True}},
        {"recipe": "dpo"},
        {"recipe": "circuit_breaker", "family": "llama"},
        {"efficiency": {"enable_activation_checkpointing": True}},
    ],
)
def test_on_a_gpu_the_loss_falls(workshop: Workshop, blocks: dict[str, Any]) -> None:
    run = by_unsloth(gpu_job(workshop, training={"n_epochs": 6}, **blocks), PLAIN)
    assert run.exit_code == 0, told(run)
    losses = run.steps("loss")
    assert losses[-1] < losses[0]
    if "adapter" in blocks:
        assert run.resolved["quantized"]["bytes_after"] < run.resolved["quantized"]["bytes_before"]
