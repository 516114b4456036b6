"""What must not depend on how a job's rows are cut into micro-batches: each figure, and each step's gradient."""

from typing import Any

import pytest

from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.support.training_support import Run, Workshop, said, workshop

__all__ = ["workshop"]


def pair(prompt: str, chosen: str, rejected: str) -> Any:
    answers = {"chosen": [said("assistant", chosen)], "rejected": [said("assistant", rejected)]}
    return {"prompt": [said("user", prompt)], **answers}


TRAIN = [pair("which colour", "blue as the sky", "red")]
HELD_OUT = [
    pair("which colour is it", "blue as the sky", "red"),
    pair("and then", "red", "blue as the sky"),
    pair(
        "what is the capital of France, tell me in one word please",
        "The capital of France is Paris, which lies on a river.", "blue as the sky",
    ),
]  # fmt: skip
UNEVEN = [
    pair("river stone", "light", "light river"),
    pair("query paper green seven north table river model stone light", "paper green seven north",
         "paper green seven north model"),
    pair("north", "table green", "table green stone"),
    pair("seven light paper", "river model stone light query paper green",
         "river model stone light query paper green light"),
]  # fmt: skip


def ran(workshop: Workshop, family: str, rows: list[Any], held_out: list[Any], **blocks: Any) -> Run:
    run = workshop.run("dpo", family, rows, held_out, **blocks)
    assert run.exit_code == COMPLETED, run.reason
    return run


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_held_out_figures_of_pairs_do_not_depend_on_the_batch_size(workshop: Workshop, family: str) -> None:
    """One pair is trained on, so that all jobs train the same; three are held out, in batches of 1, 2 and 3."""
    found = [
        ran(workshop, family, TRAIN, HELD_OUT, training={"batch_size": size, "n_epochs": 3}, optimizer={"lr": 1e-2})
        for size in (1, 2, 3)
    ]
    last = [run.events("evaluation")[-1].metrics for run in found]
    compared = {name for name in last[0] if name != "aux_loss"}  # the model's own, of each micro-batch
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected", "entropy"} <= compared
    for metrics in last[1:]:
        assert {name: metrics[name] for name in compared} == pytest.approx(
            {name: last[0][name] for name in compared}, rel=1e-4, abs=1e-5
        )
    assert abs(last[0]["rewards/margins"]) > 1e-2


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "together"])
def test_a_step_of_pairs_has_one_gradient_however_it_is_cut(workshop: Workshop, ahead: bool) -> None:
    """Four pairs as 4 x 1, 1 x 4 and 3 x 2 (batch size x accumulation): the fourth pair must not count three times."""
    norms, weights = [], []
    for size, accumulation in ((4, 1), (1, 4), (3, 2)):
        run = ran(
            workshop, "mixtral", UNEVEN, UNEVEN[:1], data={"shuffle": False}, adapter={"rank": 2},
            training={"batch_size": size, "gradient_accumulation_steps": accumulation, "n_epochs": 2},
            optimizer={"lr": 1e-2, "optimizer_type": "sgd"}, moe={"router_aux_loss_coef": 0},
            options={"precompute_ref_log_probs": ahead},
        )  # fmt: skip
        norms.append(run.steps("grad_norm"))
        weights.append(run.adapter())
    assert norms[0][0] > 0
    for other, adapter in zip(norms[1:], weights[1:], strict=True):
        assert other == pytest.approx(norms[0], rel=1e-4)
        for name, tensor in adapter.items():
            assert (tensor - weights[0][name]).abs().max() < 1e-5
