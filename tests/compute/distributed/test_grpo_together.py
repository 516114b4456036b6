"""GRPO and on-policy distillation in two processes: the same as in one for the same answers; graded, kept, stopped and
resumed together."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.samples import GeneratedSample
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.alike import assert_alike, curve
from tests.support.together import Office, office
from tests.support.training_support import Run, Workshop, prompt_rows, workshop

__all__ = ["workshop"]

TWO = {"gpus": 0, "processes": 2}
HAS_E = {"grader": {"type": "regex", "name": "has e", "pattern": "e|a"}}
NO_CALL = {"grader": {"type": "tool_call", "name": "no call"}}


def half_graded() -> list[Any]:
    """Two steps of four prompts. The last prompt of each, which the second process writes to, can't be graded."""
    rows = prompt_rows(8)
    for at, row in enumerate(rows):
        row["item"]["expected_calls"] = "no list" if at % 4 == 3 else []
    return rows


# In two processes the second one fails on half of its 4 answers of a step, all on a quarter of 8.
FAILING: dict[str, Any] = {
    "rows": half_graded(),
    "reward": [HAS_E, NO_CALL],
    "data": {"shuffle": False, "validation_dataset_id": None},
    "options": {"validation_split": 0},
}
# 9 held-out rows, in runs of 8: one process gets nothing of the last.
CASES: dict[str, dict[str, Any]] = {
    # A group of 8 answers is divided between the processes, and a step has two micro-batches.
    "lora": {"training": {"gradient_accumulation_steps": 2}, "rl": {"n_generations": 8, "beta": 0.1},
             "moe": {"train_router": True, "router_z_loss_coef": 0.01, "router_aux_loss_coef": 0.1}},
    "whole": {"adapter": None,
              "rl": {"loss": "gspo", "combine": "normalize", "mask_truncated": True, "n_iterations": 2},
              "reward": [HAS_E, {"grader": {"type": "length", "name": "short", "unit": "tokens", "most": 4}}]},
    "nothing": {"training": {"n_epochs": 2}, "rl": {"no_spread_generations": 2}, "reward": [
        {"grader": {"type": "regex", "name": "never", "pattern": "never in an answer"}}]},
    "replayed": {"adapter": None, "rl": {"n_iterations": 2, "routing_replay": "policy"}},
    "distill": {"recipe": "distill", "rows": prompt_rows(32), "beta": 0.5,
                "training": {"gradient_accumulation_steps": 2},
                "moe": {"train_router": True, "router_z_loss_coef": 0.01, "router_aux_loss_coef": 0.1}},
    "few fail": {**FAILING, "grading": {"max_failed_share": 0.3}},
    "many fail": {**FAILING, "grading": {"max_failed_share": 0.2}},
}  # fmt: skip


def job(workshop: Workshop, case: str, processes: int, **more: Any) -> JobFolder:
    settings = {"rows": prompt_rows(8), **CASES.get(case, {}), **more}
    training = {"batch_size": 8 // processes, **settings.pop("training", {})}
    recipe = settings.pop("recipe", "grpo")
    graders = {"reward": [HAS_E]} if recipe == "grpo" else {}
    settings = {**graders, "optimizer": {"optimizer_type": "sgd", "lr": 0.2}, **settings}
    rows, held_out = settings.pop("rows"), prompt_rows(9, first=100)
    return workshop.job(recipe, "granitemoe", rows, held_out, training=training,
                        resources=TWO if processes == 2 else {}, **settings)  # fmt: skip


def samples(run: Run) -> list[tuple[str, list[GeneratedSample]]]:
    """The answers of each file."""
    return [
        (file.name, [GeneratedSample.model_validate_json(line) for line in file.read_text().splitlines()])
        for file in sorted(run.folder.samples.iterdir())
    ]


@dataclass(frozen=True)
class Ran:
    """Runs with given answers, by case and number of processes."""

    runs: dict[tuple[str, int], Run]


@pytest.fixture(scope="module")
def ran(workshop: Workshop) -> Ran:
    """All runs with given answers, in forks of one process."""
    folders = {(case, processes): job(workshop, case, processes) for case in CASES for processes in (1, 2)}
    arguments = [sys.executable, "-m", "tests.support.given_answers", *(str(each.root) for each in folders.values())]
    subprocess.run(arguments, check=True, timeout=2400)
    return Ran({
        key: Run(folder, int((folder.root / "exit-code").read_text())) for key, folder in folders.items()
    })  # fmt: skip


@pytest.mark.parametrize("case", ["lora", "whole"])
def test_two_processes_leave_the_same_as_one(ran: Ran, case: str) -> None:
    """Rewards, advantages over whole groups, loss, gradients, held-out figures; each answer is graded and kept once."""
    one, two = ran.runs[case, 1], ran.runs[case, 2]
    assert one.exit_code == COMPLETED, one.reason
    assert_alike(two, one, atol=1e-4)  # measured: 1.6e-5, with micro-batches that are made of other answers
    assert max(one.steps("grad_norm")) > 1e-3
    for (name, mine), (theirs_name, theirs) in zip(samples(two), samples(one), strict=True):
        assert name == theirs_name
        for each, other in zip(mine, theirs, strict=True):
            assert each.advantage == pytest.approx(other.advantage, abs=1e-5)
            assert each.model_copy(update={"advantage": 0}) == other.model_copy(update={"advantage": 0})
    assert len({each.reward for _, answers in samples(two) for each in answers}) > 1


def test_two_processes_distil_as_one(ran: Ran) -> None:
    """A teacher's divergence, balance terms, gradients and held-out figures, over answers of unequal lengths."""
    one, two = ran.runs["distill", 1], ran.runs["distill", 2]
    assert one.exit_code == COMPLETED, one.reason
    assert_alike(two, one, atol=1e-4)
    assert max(one.steps("grad_norm")) > 1e-3
    assert samples(two) == samples(one)
    # A process without a row of a run answers another one's, which its routers do not count.
    assert two.held_out("aux_loss") == pytest.approx(one.held_out("aux_loss"), rel=1e-5)  # measured: 2e-6


def test_changed_routes_and_the_balance_loss_over_them_are_those_of_all_processes(ran: Ran) -> None:
    """One process takes the model's own balance loss, two take ours: both count what routers would choose now."""
    one, two = (ran.runs["replayed", processes] for processes in (1, 2))
    changed = one.steps("routing/changed")
    assert two.steps("routing/changed") == pytest.approx(changed, abs=1e-9)
    assert max(changed) > 0
    assert two.steps("aux_loss") == pytest.approx(one.steps("aux_loss"), abs=1e-4)


def test_nothing_to_learn_ends_both_processes(ran: Ran) -> None:
    for processes in (1, 2):
        nothing = ran.runs["nothing", processes]
        assert nothing.manifest.stopped_by == "no_reward_spread", nothing.reason
        assert len(nothing.events("step")) == 2


def test_the_share_of_failed_answers_is_that_of_all_processes(ran: Ran) -> None:
    """By its own share, half of the 8 answers of two steps, the second process would end the first job too."""
    for processes in (1, 2):
        few, many = ran.runs["few fail", processes], ran.runs["many fail", processes]
        assert few.exit_code == COMPLETED, few.reason
        assert [[bool(each.failures) for each in answers] for _, answers in samples(few)] == [
            [False] * 6 + [True] * 2
        ] * 2
        assert many.exit_code == FAILED
        assert "grader 'no call' gave no value for 2 of the last 8 answers" in many.reason
        assert not many.events("step")
    assert_alike(ran.runs["few fail", 2], ran.runs["few fail", 1], atol=1e-4)


@pytest.fixture(scope="module")
def desk(workshop: Workshop) -> Iterator[Office]:
    with office(workshop) as made:
        yield made


@pytest.mark.wide
def test_a_lost_process_is_named_and_the_job_goes_on_bitwise(workshop: Workshop, desk: Office) -> None:
    """Each process writes its own answers; checkpoints among the steps of a generation have those of both."""
    more = {"rl": {"n_iterations": 2}, "training": {"n_epochs": 2}, "options": {"autosave_minutes": 1e-6}}
    unbroken, folder = (job(workshop, "sampled", 2, **more) for _ in range(2))
    desk.submit(unbroken)
    whole = desk.ended(unbroken)
    assert whole.exit_code == COMPLETED, whole.reason
    desk.submit(folder)
    desk.after_steps(folder, 3)
    os.kill(desk.ranks(folder)[1], signal.SIGKILL)
    run = desk.ended(folder)
    known = desk.job(folder)
    assert (known.state, known.attempts) == (JobState.COMPLETED, 2), known.reason
    assert "process 1 of 2 was killed by SIGKILL" in folder.output.read_text()
    assert [event.step > 0 for event in run.events("resumed")] == [True]
    mine, theirs = run.final(), whole.final()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert curve(run) == curve(whole)
    assert samples(run) == samples(whole)
    first = samples(whole)[0][1]
    assert len(first) == 8
    assert len({each.completion for each in first}) > 4, "processes draw different numbers"
