"""A GRPO job over HTTP: prompts with columns for graders, a killed process, a result; and what is refused."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.scan import scan
from tests.support import tiny_models
from tests.support.host_harness import QUICKSTART, Server, run_config, serving

pytestmark = pytest.mark.e2e

LIMIT_S = 400
# The model has to say the letter that its row names; half of the rows also have an answer, which becomes `gold`.
ROWS = [{"prompt": f"Write a word about {number}.", "letter": "e"} for number in range(32)]
JOB: dict[str, Any] = {
    "recipe": "grpo", "job_uuid": "letters", "data": {"dataset_id": "prompts"},
    "training": {"batch_size": 8, "gradient_accumulation_steps": 1, "n_epochs": 2, "dtype": "fp32"},
    "optimizer": {"lr": 5e-3}, "adapter": {"rank": 4, "alpha": 8},
    "options": {"max_length": 64, "autosave_minutes": 1e-6},
    "rl": {"n_generations": 4, "n_iterations": 2, "max_completion_length": 8, "beta": 0.01},
    "reward": [
        {"grader": {"type": "string_check", "name": "letter", "reference": "{{item.letter}}", "operation": "like"}},
        {"grader": {"type": "json_schema", "name": "json", "json_schema": {"type": "object"}}, "weight": 0.1},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("grpo")
    child_env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    config = run_config(QUICKSTART, folder, provider={"child_env": child_env, "supervisor": {"poll_s": 1}})
    with serving(config, folder / "state") as running:
        tiny_models.build("qwen3_moe", running.state_dir / "models" / "qwen3_moe")
        running.register("prompts", ROWS)
        yield running


def body(server: Server, **changes: Any) -> dict[str, Any]:
    return {**JOB, "model": str(server.state_dir / "models" / "qwen3_moe"), **changes}


def test_a_killed_job_resumes_and_completes(server: Server) -> None:
    with server.http() as http:
        http.headers["Connection"] = "close"
        submitted = http.post("/jobs", json=body(server))
        assert submitted.status_code in (200, 201), submitted.text
        folder = JobFolder(server.state_dir / "jobs" / "letters")
        deadline = time.monotonic() + LIMIT_S
        while sum(event.type == "step" for event in events.read(folder.events).events) < 5:
            assert time.monotonic() < deadline, http.get("/jobs/letters").text
            time.sleep(0.2)
        with closing(JobStore(server.config().url)) as store:
            (job,) = store.running()
        assert job.pid is not None
        os.kill(job.pid, signal.SIGKILL)
        while (ended := http.get("/jobs/letters").json())["status"] in ("scheduled", "in_progress"):
            assert time.monotonic() < deadline, ended
            time.sleep(1)
    assert ended["status"] == "completed", ended
    steps = list(scan(folder.events, events.Step))
    assert list(scan(folder.events, events.Resumed))
    assert steps[-1].step == steps[-1].max_steps
    assert {"rewards/letter/mean", "rewards/json/mean", "reward", "kl", "policy_loss"} <= steps[-2].metrics.keys()
    manifest = folder.read_manifest()
    assert manifest is not None
    assert [artifact.kind for artifact in manifest.artifacts].count("adapter") == 1
    assert len(list(folder.samples.glob("*.jsonl"))) > 4


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
        ({"rl": {"max_completion_length": 64}}, "rl.max_completion_length: 64 is not valid; expected less than"),
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
