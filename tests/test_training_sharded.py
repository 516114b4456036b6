"""Laws of jobs whose two processes share the model out (FSDP2): they leave what one process leaves.

SFT and DPO of all weights, and circuit breakers; a base below SFT's and DPO's LoRA is in `test_training_together`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.training.loader import _require_mixed
from llama_stack_provider_moe.training.main import COMPLETED, FAILED, STOPPED
from tests import tiny_models
from tests.alike import assert_alike, curve
from tests.together import Office, office
from tests.training_support import Run, Workshop, dpo_rows, sft_rows, workshop

__all__ = ["workshop"]

TWO = {"gpus": 0, "processes": 2, "strategy": "fsdp"}
# Greatest difference of a final weight, measured: 2.8e-6 (dpo), 4e-7 (sft). Weights move by some 5e-3.
ATOL = 2e-5
BATCH = 8  # rows of a step, of all processes
CASES: dict[str, dict[str, Any]] = {
    # A head that is tied, routers that train by our balance terms, layers run again in backward.
    "sft": {"recipe": "sft", "family": "granitemoe", "changes": {"tie_word_embeddings": True}, "rows": sft_rows(17),
            "efficiency": {"enable_activation_checkpointing": True},
            "moe": {"train_router": True, "router_z_loss_coef": 0.01, "router_aux_loss_coef": 0.1}},
    # A reference that is shared out too; micro-batches whose gradients add up.
    "dpo": {"recipe": "dpo", "family": "mixtral", "rows": dpo_rows(17), "options": {"precompute_ref_log_probs": False},
            "training": {"gradient_accumulation_steps": 2}},
    # A head that FSDP2 gathers apart from the final norm, and for its own forward alone.
    "head-apart": {"recipe": "sft", "family": "lfm2_moe", "rows": sft_rows(9), "training": {"n_epochs": 1}},
    # Two passes, no further than block 0 but for its balance: above, routers alone have a part in the loss. Of held-out
    # rows one process has two to break, the other two to retain; a pass is both's.
    "circuit-breaker": {"recipe": "circuit_breaker", "family": "qwen3_moe", "rows": sft_rows(9), "batch": 4,
                        "validation": sft_rows(2, first=100),
                        "adapter": {"rank": 4}, "optimizer": {"optimizer_type": "sgd", "lr": 0.2},
                        "efficiency": {"enable_activation_checkpointing": True},
                        "moe": {"train_router": True, "router_aux_loss_coef": 0.1},
                        "circuit_breaker": {"target_layers": "0",
                                            "retain": {"dataset_id": "a", "ratio": 1.5, "validation_dataset_id": "b"},
                                            "safe": {"dataset_id": "c", "validation_dataset_id": "d"}}},
}  # fmt: skip
RESUMED = ["sft", "dpo"]


def job(workshop: Workshop, case: str, processes: int, **more: Any) -> JobFolder:
    """The folder of a job of two epochs, that trains all weights where its case does not say otherwise."""
    settings = {"adapter": None, "optimizer": {"lr": 1e-3}, **CASES[case], **more}
    training = {"n_epochs": 2, **settings.pop("training", {})}
    batch = settings.pop("batch", BATCH) // processes // training.get("gradient_accumulation_steps", 1)
    model = workshop.model(settings.pop("family"), **settings.pop("changes", {}))
    settings |= {"training": {"batch_size": batch, **training}, "resources": TWO if processes == 2 else {}}
    return workshop.job(settings.pop("recipe"), model, **settings)


def after_an_epoch(workshop: Workshop, run: Run, processes: int) -> JobFolder:
    """A job that stands where `run` stood after its first epoch, to go on in so many processes."""
    folder = workshop.copied(run)
    shutil.rmtree(folder.root / "checkpoints" / "epoch-2")
    spec = json.loads(folder.spec.read_text())
    batch = spec["training"]["batch_size"] * (spec["resources"]["processes"] or 1)
    spec["resources"] = TWO if processes == 2 else {}
    if processes == 1:
        spec["options"]["checkpoint_form"] = "whole"
    spec["training"]["batch_size"] = batch // processes
    folder.spec.write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module")
def desk(workshop: Workshop) -> Iterator[Office]:
    """Runs the jobs of two processes."""
    with office(workshop) as made:
        yield made


@pytest.fixture(scope="module")
def one(workshop: Workshop) -> dict[str, Run]:
    """Each case in one process."""
    return {case: workshop.again(Run(job(workshop, case, 1), 0)) for case in CASES}


@pytest.fixture(scope="module")
def two(workshop: Workshop, desk: Office) -> dict[str, Run]:
    """Each case in two processes that share the weights out."""
    return {case: run(desk, job(workshop, case, 2)) for case in CASES}


def run(desk: Office, folder: JobFolder) -> Run:
    """The run of a job, from its submission to its end."""
    desk.submit(folder)
    return desk.ended(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_shared_model_leaves_what_a_whole_one_leaves(one: dict[str, Run], two: dict[str, Run], case: str) -> None:
    what = "base   " if "adapter" in CASES[case] else "weights"
    assert f"{what}   shared out among 2 processes (FSDP2)\n" in two[case].folder.output.read_text()
    assert_alike(two[case], one[case], ATOL)


def test_a_checkpoint_in_parts_is_gone_on_from_by_all_and_by_one(
    workshop: Workshop, desk: Office, two: dict[str, Run], one: dict[str, Run]
) -> None:
    """Bit by bit by as many processes; and one reads all parts."""
    in_parts = {"options": {**CASES["dpo"]["options"], "checkpoint_form": "sharded"}}
    unbroken = run(desk, job(workshop, "dpo", 2, **in_parts))
    assert_alike(unbroken, two["dpo"], atol=0)
    folder = unbroken.folder.root / "checkpoints" / "epoch-1"
    assert not list(folder.glob("*.safetensors"))
    assert len(list((folder / "shards").glob("*.distcp"))) == 2
    resumed = run(desk, after_an_epoch(workshop, unbroken, 2))
    assert [event.checkpoint for event in resumed.events("resumed")] == ["epoch-1"]
    assert_alike(resumed, unbroken, atol=0)
    assert_alike(workshop.again(Run(after_an_epoch(workshop, unbroken, 1), 0)), one["dpo"], ATOL)


@pytest.mark.parametrize("case", RESUMED)
def test_one_process_goes_on_from_them_and_they_from_one(
    workshop: Workshop, desk: Office, one: dict[str, Run], two: dict[str, Run], case: str
) -> None:
    """Checkpoints are whole, with the optimiser's state, whoever wrote them."""
    assert_alike(workshop.again(Run(after_an_epoch(workshop, two[case], 1), 0)), one[case], ATOL)
    assert_alike(run(desk, after_an_epoch(workshop, one[case], 2)), one[case], ATOL)


def test_a_cancelled_job_goes_on_bit_by_bit(workshop: Workshop, desk: Office, two: dict[str, Run]) -> None:
    folder = job(workshop, "sft", 2)
    desk.submit(folder)
    desk.after_steps(folder, 2)
    desk.cancel(folder)
    assert desk.ended(folder).exit_code == STOPPED
    desk.resume(folder)
    resumed = desk.ended(folder)
    assert resumed.exit_code == COMPLETED, resumed.reason
    (step,) = [event.step for event in resumed.events("resumed")]
    assert step > 0
    mine, theirs = resumed.final(), two["sft"].final()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert curve(resumed) == curve(two["sft"])


def test_small_steps_are_not_rounded_away_in_bf16(workshop: Workshop, desk: Office) -> None:
    """Weights lie in fp32 and are saved so in checkpoints; what the job leaves is in bf16, as it was computed with."""
    # A step of 1e-5 is less than half of what bf16 tells apart at any weight above 2e-3.
    small = {"training": {"n_epochs": 1, "dtype": "bf16"}, "optimizer": {"lr": 1e-5}}
    found = run(desk, job(workshop, "dpo", 2, **small))
    assert found.exit_code == COMPLETED, found.reason
    log = found.folder.output.read_text()
    assert "shared out among 2 processes (FSDP2); they and their optimiser's state are fp32, products bf16" in log
    assert "rounded away" not in log
    exact = workshop.again(Run(job(workshop, "dpo", 1, training={"n_epochs": 1}, optimizer={"lr": 1e-5}), 0))
    base = load_file(Path(found.resolved["model"]) / "model.safetensors")
    saved, expected = (load_file(each.folder.root / "checkpoints/epoch-1/model.safetensors") for each in (found, exact))
    moved, wanted = (torch.cat([(run[name] - base[name]).flatten() for name in base]) for run in (saved, expected))
    # Measured: 0.998, and lengths alike to 5e-4; activations and gradients on their way are in bf16.
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.98
    assert float(moved.abs().mean()) == pytest.approx(float(wanted.abs().mean()), rel=0.02)
    left = found.final()
    assert all(torch.equal(left[name], tensor.bfloat16()) for name, tensor in saved.items())
    config = json.loads((found.folder.model / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "distributed_config" not in config


def test_biases_that_are_parameters_are_not_moved_in_parts(workshop: Workshop, desk: Office) -> None:
    folder = workshop.job("sft", "ernie4_5_moe", moe={"moe_load_balancing": "aux_free"}, resources=TWO)
    assert run(desk, folder).exit_code == FAILED
    assert str(desk.job(folder).reason).startswith("moe.moe_load_balancing: 'aux_free' is not valid with")


def test_what_can_not_be_in_parts_or_in_bf16_is_refused(workshop: Workshop) -> None:
    """An adapter, which is whole anyway; and a family that wants some weights in fp32 beside bf16."""
    for processes, blocks in ((2, {"adapter": {"rank": 4}}), (1, {})):
        with pytest.raises(ValidationError, match=r"options\.checkpoint_form: 'sharded' is not valid here"):
            job(workshop, "sft", processes, options={"checkpoint_form": "sharded"}, **blocks)
    with pytest.raises(ModelError, match=r"keeps .* of them in fp32 \(.*gate.*expected 'fp32'"):
        _require_mixed(tiny_models.model("ernie4_5_moe"))
