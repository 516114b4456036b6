"""Laws of two processes, for combined methods: probes before training, states of all blocks, helper processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.compute.vision.test_images import pairs_of, rows_of, vlm
from tests.support import tiny_models
from tests.support.alike import assert_alike
from tests.support.chosen import few
from tests.support.family_subject import Subject
from tests.support.together import Office, office
from tests.support.training_support import Run, Workshop, dpo_rows, sft_rows, workshop

__all__ = ["workshop"]

# A fresh breaker's gradient is only rounding, which Adam would scale to full steps.
SGD = {"optimizer_type": "sgd", "lr": 0.2}
ATOL = 1e-4


@pytest.fixture(scope="module")
def desk(workshop: Workshop) -> Iterator[Office]:
    with office(workshop) as made:
        yield made


def job(workshop: Workshop, recipe: str, family: str | Path, processes: int, **more: Any) -> JobFolder:
    """11 rows in micro-batches of 4, two a step; 3 held out, so that one process has more of them."""
    make = dpo_rows if recipe == "dpo" else sft_rows
    training = {"batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    return workshop.job(recipe, family, make(11), make(3, first=100), optimizer=SGD, training=training, **more)


def two(desk: Office, folder: JobFolder) -> Run:
    desk.submit(folder)
    return desk.ended(folder)


@pytest.mark.parametrize("strategy", few(["ep", "fsdp"], 1))
def test_a_breaker_with_all_states_leaves_the_same_as_one_process(
    workshop: Workshop, desk: Office, strategy: str
) -> None:
    """Embeddings, every block and the final norm, of a model whose routers would use random numbers."""
    more = {
        "moe": {"train_router": True, "router_aux_loss_coef": 0.1},
        "circuit_breaker": {"target_layers": "0", "retain_layers": "all",
                            "retain": {"dataset_id": "a", "ratio": 1.5, "validation_dataset_id": "b"}},
    }  # fmt: skip
    one = workshop.again(Run(job(workshop, "circuit_breaker", "phimoe", 1, **more), 0))
    resources = {"gpus": 0, "processes": 2, "strategy": strategy}
    shared = two(desk, job(workshop, "circuit_breaker", "phimoe", 2, resources=resources, **more))
    assert one.exit_code == COMPLETED, one.reason
    assert_alike(shared, one, ATOL)
    assert shared.resolved["circuit_breaker"]["retain_layers"] == ["embeddings", 0, "final norm"]
    assert len(shared.resolved["held_in_evaluation_mode"]) == 2


def test_experts_whose_router_may_choose_none_are_divided(workshop: Workshop, desk: Office) -> None:
    """Zaya: a token that chooses to compute nothing goes to expert 0, with weight 0."""
    folder = workshop.root / "models" / "zaya"
    Subject("zaya").model().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    more: dict[str, Any] = {"moe": {"train_router": True, "router_aux_loss_coef": 0.1}}
    one = workshop.again(Run(job(workshop, "sft", folder, 1, **more), 0))
    resources = {"gpus": 0, "processes": 2, "strategy": "ep"}
    assert one.exit_code == COMPLETED, one.reason
    assert_alike(two(desk, job(workshop, "sft", folder, 2, resources=resources, **more)), one, ATOL)


@pytest.mark.wide
@pytest.mark.parametrize("recipe", few(["dpo", "sft", "circuit_breaker"], 1))
def test_helpers_prepare_the_batches_of_two_processes(workshop: Workshop, desk: Office, recipe: str) -> None:
    """A helper's pipe also carries ballast and the number of rows that count."""
    one = workshop.again(Run(job(workshop, recipe, "granitemoe", 1), 0))
    resources, options = {"gpus": 0, "processes": 2}, {"dataloader_workers": 2}
    shared = two(desk, job(workshop, recipe, "granitemoe", 2, resources=resources, options=options))
    assert one.exit_code == COMPLETED, one.reason
    assert_alike(shared, one, ATOL)
    assert "multi-threaded" not in shared.folder.output.read_text()


@pytest.mark.parametrize("recipe", few(["sft", "dpo"], 1))
def test_probes_leave_a_sharded_model_in_parts(workshop: Workshop, desk: Office, recipe: str) -> None:
    """The probes' last pass leaves FSDP2's root whole; the optimizer must not get weights that FSDP2 frees later."""
    more: dict[str, Any] = {"data": {"packed": True}} if recipe == "sft" else {}
    options = {"precompute_ref_log_probs": False} if recipe == "dpo" else {}
    one = workshop.again(Run(job(workshop, recipe, "mixtral", 1, adapter=None, options=options, **more), 0))
    resources = {"gpus": 0, "processes": 2, "strategy": "fsdp"}
    folder = job(workshop, recipe, "mixtral", 2, adapter=None, options=options, resources=resources, **more)
    assert one.exit_code == COMPLETED, one.reason
    assert_alike(two(desk, folder), one, ATOL)


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_images_of_two_processes(workshop: Workshop, desk: Office, recipe: str) -> None:
    """Rows with two, one and no image, so that a process may have a batch without; 3 of 11 rows in a part of a step."""
    made = []
    for processes in (1, 2):
        folder = JobFolder(workshop.next_folder(recipe))
        rows = (pairs_of if recipe == "dpo" else rows_of)(folder, 11)
        resources = {} if processes == 1 else {"resources": {"gpus": 0, "processes": 2}}
        made.append(workshop.job(
            recipe, vlm(workshop, "qwen3_vl_moe"), rows, rows[:3], optimizer=SGD, options={"max_length": 256},
            training={"batch_size": 4 // processes, "gradient_accumulation_steps": 2}, **resources,
        ))  # fmt: skip
    one = workshop.again(Run(made[0], 0))
    assert one.exit_code == COMPLETED, one.reason
    shared = two(desk, made[1])
    assert_alike(shared, one, ATOL)
    for each in (one, shared):
        assert set(each.events("routing")[0].sets) == {"text", "image"}
