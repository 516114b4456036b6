"""A GRPO job over HTTP: killed in each part of a step; and what is refused."""

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support.alike import curve
from tests.support.chat_server import Chat, chatting
from tests.support.host_harness import Server
from tests.support.shared_server import JUDGE, Shared
from tests.support.training_support import Run

pytestmark = pytest.mark.e2e

LIMIT_S = 800  # jobs of other modules may be before it
MOMENTS = ("generating", "grading", "learning", "saving a checkpoint")  # in this order, each in another step
STEPS = 24
# The model has to say the letter that its row names; half of the rows also have an answer, which becomes `gold`.
ROWS = [{"prompt": f"Write a word about {number}.", "letter": "e"} for number in range(32)]
JOB: dict[str, Any] = {
    "recipe": "grpo", "job_uuid": "letters", "data": {"dataset_id": "prompts"},
    "training": {"batch_size": 8, "gradient_accumulation_steps": 1, "n_epochs": 2, "max_steps_per_epoch": STEPS // 2,
                 "dtype": "fp32"},
    "optimizer": {"lr": 5e-3}, "adapter": {"rank": 4, "alpha": 8},
    "options": {"max_length": 128, "autosave_minutes": 1e-6},
    "rl": {"n_generations": 4, "n_iterations": 2, "max_completion_length": 24, "beta": 0.01},
    "reward": [
        {"grader": {"type": "string_check", "name": "letter", "reference": "{{item.letter}}", "operation": "like"}},
        {"grader": {"type": "score_model", "name": "judged", "model": JUDGE,
                    "input": [{"role": "user", "content": "{{sample.output_text}}"}]}, "weight": 0.1},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(shared: Shared) -> Server:
    shared.model("qwen3_moe")
    shared.rows("prompts", ROWS)
    return shared.server


@pytest.fixture(scope="module")
def judge(shared: Shared) -> Iterator[Chat]:
    with chatting(shared.judge_port) as chat:
        chat.answer = '{"result": 0.5}'
        yield chat


def body(server: Server, **changes: Any) -> dict[str, Any]:
    return {**JOB, "model": str(server.state_dir / "models" / "qwen3_moe"), **changes}


def stages(folder: JobFolder) -> list[str]:
    """The last stages that the job's processes have reported since its last start, and the steps between them."""
    found: list[str] = []
    # Only the end, because a step is short.
    for line in folder.events.read_bytes()[-60_000:].splitlines()[1:] if folder.events.is_file() else ():
        event = json.loads(line) if line.endswith(b"}") else {}
        if event.get("type") == "started":
            found = []
        elif event.get("type") == "progress":
            found.append(event["stage"])
        elif event.get("type") == "step":
            found.append("step")
    return found


def is_in(moment: str, folder: JobFolder) -> bool:
    """Whether the job is at a moment of a step after this start's first: it learns from answers once it graded them."""
    found = stages(folder)
    if "step" not in found or "evaluating" in found[len(found) - found[::-1].index("step") :]:
        return False
    if moment == "learning":
        last = max((at for at, each in enumerate(found) if each in ("grading", "step")), default=0)
        return found[-1] == "training" and found[last] == "grading"
    return found[-1] == moment


def is_killed(pid: int, moment: str, folder: JobFolder) -> bool:
    """Whether a suspended process is still at a moment, and is killed there; else it goes on."""
    os.kill(pid, signal.SIGSTOP)
    still = is_in(moment, folder)
    os.kill(pid, signal.SIGKILL if still else signal.SIGCONT)
    return still


def starts(folder: JobFolder) -> list[int]:
    """The process of each start of the job."""
    return [event.pid for event in events.read(folder.events).events if event.type == "started"]


def kill_in(moment: str, folder: JobFolder, deadline: float) -> None:
    """SIGKILL to the training process at a moment. It is suspended first, so that it can't have gone on meanwhile."""
    while not (before := starts(folder)):
        assert time.monotonic() < deadline, "no start"
        time.sleep(0.1)
    while not (is_in(moment, folder) and is_killed(before[-1], moment, folder)):
        assert time.monotonic() < deadline, (moment, stages(folder)[-5:])
        assert folder.read_manifest() is None, f"the job ended without {moment}"
        time.sleep(0.001 if "step" in stages(folder) else 0.1)
    while len(starts(folder)) == len(before):
        assert time.monotonic() < deadline, f"no start after {moment}"
        time.sleep(0.1)


def ended(http: Any, job_id: str, deadline: float) -> dict[str, Any]:
    while (found := http.get(f"/jobs/{job_id}").json())["status"] in ("scheduled", "in_progress"):
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    assert found["status"] == "completed", found
    return dict(found)


def test_a_job_killed_in_each_part_of_a_step_ends_as_an_unbroken_one(server: Server, judge: Chat) -> None:
    """Bitwise the same adapter and metrics, and the same answers, each once."""
    deadline, made = time.monotonic() + LIMIT_S, {}
    with server.http() as http:
        http.headers["Connection"] = "close"
        for name in ("unbroken", "letters"):
            submitted = http.post("/jobs", json=body(server, job_uuid=name))
            assert submitted.status_code in (200, 201), submitted.text
            folder = JobFolder(server.state_dir / "jobs" / name)
            for moment in MOMENTS if name == "letters" else ():
                judge.delay_s = 0.1 if moment == "grading" else 0.0
                kill_in(moment, folder, deadline)
            judge.delay_s = 0.0
            made[name] = ended(http, name, deadline), Run(folder, 0)
    (_, unbroken), (job, run) = made["unbroken"], made["letters"]
    assert (job["attempts"], job["resources_allocated"]["lost"]) == (5, 4)
    assert all(event.step > 0 for event in run.events("resumed"))
    assert len(run.events("resumed")) == len(MOMENTS)
    assert curve(run) == curve(unbroken)
    assert {"rewards/letter/mean", "rewards/judged/mean", "reward", "kl", "policy_loss"} <= curve(run)[STEPS - 1].keys()
    theirs = unbroken.adapter()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in run.adapter().items())
    mine, others = ({file.name: file.read_text() for file in each.folder.samples.iterdir()} for each in (run, unbroken))
    assert mine == others
    assert len(mine) == STEPS // 2
    assert sum(text.count("\n") for text in mine.values()) == STEPS // 2 * 8
    assert run.manifest.summary.keys() == unbroken.manifest.summary.keys()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reward": []}, "reward"),
        ({"reward": [{"grader": {"type": "python", "name": "x", "source": "1"}}]}, "runs no code of users"),
        ({"reward": [{"grader": {"type": "refusal", "name": "no", "expect": "refusal"}, "prompts": "refuse"},
                     {"grader": {"type": "refusal", "name": "yes", "expect": "answer"}, "prompts": "help"}]},
         "row 1: class: is missing; expected 'refuse' or 'help' in each row (`grading.class_column`)"),
        ({"reward": [{"grader": {"type": "math", "name": "right", "reference": "{{item.answer}}"}}]},
         "row 1: answer: is missing; grader 'right' reads {{item.answer}}"),
        ({"training": {"batch_size": 256, "gradient_accumulation_steps": 1, "dtype": "fp32"}},
         "at least 71 rows: 64 fill one generation (training.batch_size 256 x gradient_accumulation_steps 1 x"),
        ({"rl": {"n_generations": 3}}, "rl.n_generations: 3 is not valid; expected a divisor of 8"),
        ({"adapter": {"rank": 4, "dropout": 0.1}}, "adapter.dropout"),
        ({"moe": {"moe_load_balancing": "aux_free"}}, "moe.moe_load_balancing"),
        ({"rl": {"max_completion_length": 128}}, "rl.max_completion_length: 128 is not valid; expected less than"),
        ({"reward": [{"grader": {"type": "reward_model", "name": "x", "model": "no-such-job"}}]}, "reward"),
        ({"reward": [{"grader": {"type": "score_model", "name": "x", "model": "nobody",
                                 "input": [{"role": "user", "content": "?"}]}}]}, "nobody"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_at_the_door(server: Server, changes: dict[str, Any], told: str) -> None:
    with server.http() as http:
        answer = http.post("/jobs", json=body(server, job_uuid="refused", **changes))
        assert answer.status_code == 400, answer.text
        assert told in answer.text
        assert http.get("/jobs/refused").status_code == 404
