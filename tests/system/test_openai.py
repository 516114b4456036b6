"""OpenAI's fine-tuning API on a real server: the openai package, sync and async, and the guide's own script."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.contracts.doc_blocks import ROOT, blocks_of
from tests.support.host_harness import QUICKSTART, Server, run_config, serving, tiny_interpreter
from tests.support.jobs_support import wait_for
from tests.support.openai_support import async_client, client, result_file
from tests.support.shared_server import Shared

pytestmark = pytest.mark.e2e

GUIDE = ROOT / "docs" / "guides" / "openai.md"
LIMIT_S = 800
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"Number {n}."}]}
    for n in range(8)
]
PREFERENCES = [
    {
        "input": {"messages": [{"role": "user", "content": f"What is {n}?"}]},
        "preferred_output": [{"role": "assistant", "content": f"Number {n}."}],
        "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
    }
    for n in range(8)
]


def uploaded(server: Server, name: str, rows: list[Any]) -> str:
    """Upload rows as a data set; returns how a job names it."""
    with server.http() as http:
        content = "".join(json.dumps(row) + "\n" for row in rows)
        http.put(f"/datasets/{name}", content=content).raise_for_status()
    return f"data:{name}"


def ended(api: openai.OpenAI, job_id: str) -> FineTuningJob:
    """The job after its end."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        job = api.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.5)
    raise AssertionError(f"{job_id} has not ended")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose jobs train nothing: 2 steps, or 2,000 slow ones."""
    folder = tmp_path_factory.mktemp("quick")
    config = run_config(
        QUICKSTART,
        folder,
        provider={"training_python": tiny_interpreter(folder), "supervisor": {"poll_s": 0.1}},
    )
    with serving(config, folder / "state") as running:
        yield running


def test_pause_resume_and_cancel(quick: Server) -> None:
    file = uploaded(quick, "chats", CHATS)
    with client(quick.url) as api:
        job = api.fine_tuning.jobs.create(model="owner/name", training_file=file, suffix="slow")
        assert job.status in ("queued", "running")
        wait_for(lambda: any(event.type == "metrics" for event in api.fine_tuning.jobs.list_events(job.id)))
        api.fine_tuning.jobs.pause(job.id)
        paused = ended(api, job.id)
        assert (paused.status, paused.error, paused.fine_tuned_model) == ("cancelled", None, None)
        newest = api.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
        assert re.fullmatch(r"The job stopped after step \d+; it can be resumed", newest.message)
        assert [each.fine_tuned_model_checkpoint for each in api.fine_tuning.jobs.checkpoints.list(job.id)]
        assert api.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
        wait_for(lambda: api.fine_tuning.jobs.retrieve(job.id).status == "running")
        with pytest.raises(openai.ConflictError):
            api.fine_tuning.jobs.resume(job.id)
        api.fine_tuning.jobs.cancel(job.id)
        assert ended(api, job.id).status == "cancelled"
        with quick.http() as http:
            assert http.get(f"/jobs/{job.id.removeprefix('ftjob-')}/status").json()["status"] == "cancelled"


def test_the_asynchronous_client(quick: Server) -> None:
    file = uploaded(quick, "pairs", PREFERENCES)

    async def whole_life() -> None:
        async with async_client(quick.url) as api:
            method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}}
            job = await api.fine_tuning.jobs.create(
                model="owner/name", training_file=file, method=method, metadata={"made": "async"}
            )
            while job.status in ("queued", "running"):
                await asyncio.sleep(0.2)
                job = await api.fine_tuning.jobs.retrieve(job.id)
            assert (job.status, job.fine_tuned_model) == ("succeeded", job.id.removeprefix("ftjob-"))
            assert job.method is not None
            assert job.method.dpo is not None
            assert job.method.dpo.hyperparameters is not None
            assert (job.method.dpo.hyperparameters.beta, job.method.dpo.hyperparameters.n_epochs) == (0.2, 1)
            assert [each.id async for each in api.fine_tuning.jobs.list(metadata={"made": "async"})] == [job.id]
            events = [event async for event in api.fine_tuning.jobs.list_events(job.id, limit=2)]
            assert [event.message for event in events if event.type == "metrics"] == [
                "Step 2/2: training loss=0.5",
                "Step 1/2: training loss=1",
            ]
            with pytest.raises(openai.BadRequestError) as refused:
                await api.fine_tuning.jobs.create(model="owner/name", training_file=file)
            assert (refused.value.param, refused.value.code) == ("training_file", "invalid_file")

    asyncio.run(whole_life())


def test_a_registered_data_set_of_the_host(quick: Server) -> None:
    name = quick.register("hosts-own", [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(8)])
    with client(quick.url) as api:
        job = api.fine_tuning.jobs.create(model="owner/name", training_file=name)
        assert ended(api, job.id).status == "succeeded"


@pytest.fixture(scope="module")
def training(shared: Shared) -> Server:
    """A server that trains tiny models."""
    shared.model("granitemoe")
    return shared.server


def test_the_script_of_the_guide_trains_a_model(training: Server, tmp_path: Path) -> None:
    (script,) = (block.text for block in blocks_of(GUIDE) if block.language == "python")
    model = training.state_dir / "models" / "granitemoe"
    address, granite = "http://127.0.0.1:8321", "ibm-granite/granite-3.0-1b-a400m-instruct"
    for written, here in ((address, training.url), (granite, model)):
        assert script.count(written) == 1
        script = script.replace(written, str(here))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Training has finished" in done.stdout
    lines = (tmp_path / "step_metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,epoch,train_loss,valid_loss,")
    steps = [int(line.partition(",")[0]) for line in lines[1:]]
    assert steps == list(range(len(steps)))
    tokens = re.search(r"capitals-\w+: (\d+) tokens", done.stdout)
    assert tokens is not None
    assert int(tokens[1]) > 0


def test_dpo_trains_a_model(training: Server) -> None:
    file = uploaded(training, "number-pairs", PREFERENCES)
    with client(training.url) as api:
        job = api.fine_tuning.jobs.create(
            model=str(training.state_dir / "models" / "granitemoe"), training_file=file, validation_file=file, seed=3,
            method={"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 4, "learning_rate_multiplier": 2}}},
            extra_body={"moe": {"adapter": {"rank": 4}, "options": {"max_length": 64}, "resources": {"gpus": 0}}},
        )  # fmt: skip
        job = ended(api, job.id)
        assert job.status == "succeeded", job.error
        assert (job.hyperparameters.learning_rate_multiplier, job.hyperparameters.batch_size) == (2.0, 4)
        checkpoints = list(api.fine_tuning.jobs.checkpoints.list(job.id))
        assert [each.step_number for each in checkpoints] == [2]
        assert checkpoints[0].metrics.full_valid_loss is not None
        assert "valid_loss" in result_file(api, job.result_files[0]).splitlines()[0]
        assert job.trained_tokens is not None
        assert job.trained_tokens > 0
        # The result is a model of our own API.
        with training.http() as http:
            body: dict[str, Any] = {"recipe": "sft", "model": job.fine_tuned_model, "adapter": {"rank": 4}}
            body["data"] = {"dataset_id": uploaded(training, "number-chats", CHATS)}
            answer = http.post("/jobs/validate", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["spec"]["adapter"]["init_from"].startswith(str(training.state_dir / "jobs"))
