"""OpenAI's fine-tuning API without a host: objects, events, pages, errors and owners."""

import csv
import io
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_stack_provider_moe.control.server.callers import ANONYMOUS
from llama_stack_provider_moe.control.server.openai import events as openai_events
from llama_stack_provider_moe.control.server.openai import jobs
from llama_stack_provider_moe.control.server.openai.events import backwards
from llama_stack_provider_moe.control.server.openai.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.events import (
    Evaluation,
    EventLog,
    Failed,
    Finished,
    Message,
    Progress,
    Resumed,
    Saved,
    Started,
    Step,
    now,
)
from llama_stack_provider_moe.jobdir.folder import Artifact, Metrics
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import ask, caller, folder_of, over_http, serving_in_process, submit
from tests.support.openai_support import client, result_file

JOBS = f"http://test{PREFIX}/jobs"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


@pytest.fixture
def api(service: PostTrainingService) -> Iterator[openai.OpenAI]:
    with over_http(service) as url, client(url) as made:
        yield made


def test_the_package_raises_its_own_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.fine_tuning.jobs.create(model="owner/name", training_file="good", extra_body={"moe": {"adaptor": {}}})
    assert (refused.value.param, refused.value.code, refused.value.type) == (
        "moe.adaptor", "invalid_value", "invalid_request_error"
    )  # fmt: skip
    with pytest.raises(openai.NotFoundError):
        api.fine_tuning.jobs.retrieve("ftjob-none")


def test_a_new_job(api: openai.OpenAI, service: PostTrainingService) -> None:
    job = api.fine_tuning.jobs.create(
        model="owner/name", training_file="good", suffix="mine", metadata={"team": "a"}, seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        integrations=[{"type": "wandb", "wandb": {"project": "p"}}],
    )  # fmt: skip
    assert (job.status, job.seed, job.metadata, job.training_file) == ("queued", 7, {"team": "a"}, "good")
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert job.hyperparameters.learning_rate_multiplier == 1.0
    assert (job.fine_tuned_model, job.finished_at, job.error, job.result_files) == (None, None, None, [])
    assert job.integrations is not None
    assert job.integrations[0].wandb.project == "p"
    name = job.id.removeprefix("ftjob-")
    assert name.startswith("mine-")
    assert service.store.get(name, ANONYMOUS).state is JobState.SCHEDULED
    assert [event.message for event in api.fine_tuning.jobs.list_events(job.id)] == [
        f"Created fine-tuning job: {job.id}"
    ]
    assert api.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert api.fine_tuning.jobs.resume(job.id).status == "queued"
    assert api.fine_tuning.jobs.pause(job.id).status == "cancelled"


GRADER: Any = {"type": "string_check", "name": "right", "input": "{{sample.output_text}}", "operation": "ilike",
               "reference": "4"}  # fmt: skip


def test_a_job_of_reinforcement(api: openai.OpenAI, service: PostTrainingService) -> None:
    job = api.fine_tuning.jobs.create(
        model="owner/name", training_file="good", suffix="rl",
        method={"type": "reinforcement", "reinforcement": {
            "grader": GRADER, "hyperparameters": {"batch_size": 2, "compute_multiplier": 2.0, "n_epochs": 2}}},
    )  # fmt: skip
    assert job.method is not None
    assert job.method.type == "reinforcement"
    found = job.method.reinforcement
    assert found is not None
    assert found.grader.model_dump(exclude_none=True) == GRADER
    assert found.hyperparameters is not None
    assert found.hyperparameters.model_dump(exclude_none=True) == {
        "batch_size": 2, "compute_multiplier": 2.0, "learning_rate_multiplier": 1.0, "n_epochs": 2,
    }  # fmt: skip
    name = job.id.removeprefix("ftjob-")
    figures = {"reward": 0.5, "rewards/right/mean": 0.25, "loss": 0.1}
    told(service, name, Step(step=1, max_steps=9, epoch=0.1, metrics=figures, eta_s=1.0))
    held = {"reward": 0.75, "rewards/right/mean": 0.5, "validation_loss": -0.75}
    with closing(EventLog(folder_of(service, name).events)) as log:
        log.append(Evaluation(step=1, epoch=0.1, metrics=held))
    evaluated, step, _ = api.fine_tuning.jobs.list_events(job.id).data
    assert step.message == "Step 1/9, train mean reward=0.5"
    assert isinstance(step.data, dict)
    assert isinstance(evaluated.data, dict)
    assert step.data["train_reward_mean"] == step.data["train_mean_reward"] == 0.5
    assert step.data["scores"]["graders"] == [{"name": "right", "train_reward_mean": 0.25}]
    assert evaluated.data["valid_reward_mean"] == evaluated.data["full_valid_mean_reward"] == 0.75
    assert evaluated.data["scores"]["graders"] == [{"name": "right", "valid_reward_mean": 0.5}]
    claim(service, name)
    service.store.move(name, JobState.COMPLETED)
    (file,) = api.fine_tuning.jobs.retrieve(job.id).result_files
    (row,) = csv.DictReader(io.StringIO(result_file(api, file)))
    assert (row["train_reward_mean"], row["valid_reward_mean"]) == ("0.5", "0.75")


def test_rewards_that_are_not_one_grader_have_no_method(api: openai.OpenAI, service: PostTrainingService) -> None:
    short = {"type": "length", "name": "short", "most": 9}
    submit(service, recipe="grpo", job_uuid="two", reward=[{"grader": GRADER}, {"grader": short, "weight": 0.5}])
    parts = {"batch_size": 4}
    submit(service, recipe="grpo", job_uuid="parts", reward=[{"grader": GRADER}], training=parts,
           rl={"n_generations": 8, "steps_per_generation": 2})  # fmt: skip
    assert api.fine_tuning.jobs.retrieve("ftjob-two").method is None
    job = api.fine_tuning.jobs.retrieve("ftjob-parts")
    assert job.hyperparameters.batch_size is None, "answers to one prompt are divided among steps"


def test_jobs_of_our_own_api_are_seen(api: openai.OpenAI, service: PostTrainingService) -> None:
    submit(service, job_uuid="ours", optimizer={"lr": 3e-4}, training={"gradient_accumulation_steps": 2})
    job = api.fine_tuning.jobs.retrieve("ftjob-ours")
    assert job.hyperparameters.learning_rate_multiplier == 3.0
    assert job.hyperparameters.batch_size == 8
    assert (job.method is not None and job.method.type, job.metadata) == ("supervised", None)


def test_a_job_that_trains_nothing_is_not_a_fine_tuning_job(service: PostTrainingService, api: openai.OpenAI) -> None:
    service.store.submit("looks", ANONYMOUS, "routing_analysis", "owner/name", str(service.config.jobs_dir / "looks"))
    for request in (api.fine_tuning.jobs.retrieve, api.fine_tuning.jobs.cancel, api.fine_tuning.jobs.resume):
        with pytest.raises(openai.NotFoundError, match="is not a fine-tuning job"):
            request("ftjob-looks")
    assert list(api.fine_tuning.jobs.list()) == []
    assert service.store.get("looks", None).state is JobState.SCHEDULED


def test_pages_of_jobs(api: openai.OpenAI, service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PAGE_JOBS", 2)
    names = [
        submit(service, job_uuid=f"job-{number}", metadata={"kind": str(number % 2)} if number < 4 else {})
        for number in range(5)
    ]
    newest = [f"ftjob-{name}" for name in reversed(names)]
    assert [job.id for job in api.fine_tuning.jobs.list(limit=2)] == newest, "the package asks for page after page"
    page = api.fine_tuning.jobs.list(limit=2, after=newest[1])
    assert ([job.id for job in page.data], page.has_more) == (newest[2:4], True)
    assert [job.id for job in api.fine_tuning.jobs.list(metadata={"kind": "1"})] == [newest[1], newest[3]]
    assert [job.id for job in api.fine_tuning.jobs.list(metadata={"kind": "0"}, limit=1)] == [newest[2], newest[4]]
    assert [job.id for job in api.fine_tuning.jobs.list(metadata={"kind": "9"})] == []
    assert [job.id for job in api.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [newest[0]]


def finished_job(service: PostTrainingService) -> str:
    """A completed job with 25 steps, of which steps 2 and 3 were repeated, and 3 checkpoints."""
    job_id = submit(service, job_uuid="full")
    folder = folder_of(service, job_id)
    metrics = Metrics(epoch=1, train_loss=1.5, validation_loss=1.25, perplexity=3.5)
    log = EventLog(folder.events)
    log.append(Started(pid=1, versions={}))
    log.append(Progress(stage="loading weights", done=0))
    log.append(Progress(stage="loading weights", done=9))
    log.append(Evaluation(step=0, epoch=0, metrics={"validation_loss": 2.0}))
    saved = []
    for step in (1, 2, 3, "again", *range(2, 26)):
        if step == "again":
            log.append(Resumed(step=1, checkpoint="step-1"))
            continue
        assert isinstance(step, int)
        log.append(Step(step=step, max_steps=25, epoch=step / 25, metrics={"loss": 2 / step, "tokens": 100.0}, eta_s=9))
        if step % 10 == 5:
            path = folder.root / "checkpoints" / f"step-{step}"
            path.mkdir(parents=True)
            saved.append(
                Artifact(identifier=f"{job_id}/{path.name}", kind="checkpoint", path=str(path), epoch=0, step=step,
                         created_at=now(), bytes=1, metrics=metrics if step == 15 else None)
            )  # fmt: skip
            log.append(Saved(artifact=saved[-1].model_dump(mode="json")))
    log.append(Message(level="warning", text="rows were cut"))
    log.append(Evaluation(step=25, epoch=1, metrics={"validation_loss": 1.0, "perplexity": 2.0}))
    log.append(Finished(train_seconds=1.0))
    log.close()
    claim(service, job_id)
    service.store.move(job_id, JobState.COMPLETED, artifacts=tuple(saved))
    return job_id


def told(service: PostTrainingService, job_id: str, event: Step | Failed) -> None:
    """Write an event of a job, as its training process does."""
    with closing(EventLog(folder_of(service, job_id).events)) as log:
        log.append(event)


def claim(service: PostTrainingService, job_id: str) -> None:
    """Make a job one in progress, as a supervisor does."""
    claimed = service.store.claim("test")
    assert claimed is not None
    assert claimed.id == job_id


def test_a_finished_job(api: openai.OpenAI, service: PostTrainingService) -> None:
    job = api.fine_tuning.jobs.retrieve(f"ftjob-{finished_job(service)}")
    assert (job.status, job.fine_tuned_model, job.estimated_finish) == ("succeeded", "full", None)
    assert job.trained_tokens == 2500, "steps that a resumption has undone do not count"
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    for change in (api.fine_tuning.jobs.cancel, api.fine_tuning.jobs.pause, api.fine_tuning.jobs.resume):
        with pytest.raises(openai.ConflictError):
            change(job.id)


def test_the_result_file(api: openai.OpenAI, service: PostTrainingService) -> None:
    (file,) = api.fine_tuning.jobs.retrieve(f"ftjob-{finished_job(service)}").result_files
    rows = list(csv.DictReader(io.StringIO(result_file(api, file))))
    assert [int(row["step"]) for row in rows] == list(range(26))
    assert (rows[0]["valid_loss"], rows[0]["train_loss"]) == ("2.0", "")
    assert (rows[2]["valid_loss"], rows[2]["train_loss"], rows[2]["tokens"]) == ("", "1.0", "100.0")
    assert (rows[25]["valid_loss"], rows[25]["valid_perplexity"]) == ("1.0", "2.0")


def test_a_job_without_a_result_file(api: openai.OpenAI, service: PostTrainingService) -> None:
    submit(service, job_uuid="new")
    with pytest.raises(openai.NotFoundError, match="has its result file once it has succeeded"):
        result_file(api, "file-result-new")


def test_checkpoints(api: openai.OpenAI, service: PostTrainingService) -> None:
    job_id = f"ftjob-{finished_job(service)}"
    found = list(api.fine_tuning.jobs.checkpoints.list(job_id, limit=1))
    assert [each.step_number for each in found] == [25, 15, 5]
    assert [each.fine_tuned_model_checkpoint for each in found] == ["full/step-25", "full/step-15", "full/step-5"]
    assert (found[1].metrics.full_valid_loss, found[1].metrics.train_loss) == (1.25, 1.5)
    assert found[0].metrics.full_valid_loss is None


def test_events_are_newest_first_and_complete(api: openai.OpenAI, service: PostTrainingService) -> None:
    job_id = f"ftjob-{finished_job(service)}"
    found = list(api.fine_tuning.jobs.list_events(job_id, limit=7))
    assert found == list(api.fine_tuning.jobs.list_events(job_id, limit=1000))
    messages = [event.message for event in found]
    assert messages[:3] == [
        "Training has finished",
        "Held out after step 25: perplexity=2, validation_loss=1",
        "rows were cut",
    ]
    assert messages[-4:] == [
        "Held out after step 0: validation_loss=2",
        "Stage: loading weights",
        "The training process has started",
        f"Created fine-tuning job: {job_id}",
    ]
    assert found[2].level == "warn"
    steps = [event.data for event in found if event.type == "metrics" and "Step" in event.message]
    assert len(steps) == 27
    assert steps[0] == {"step": 25, "total_steps": 25, "train_loss": 0.08, "loss": 0.08, "tokens": 100.0}
    assert len({event.id for event in found}) == len(found)


def test_a_running_job(api: openai.OpenAI, service: PostTrainingService) -> None:
    job_id = submit(service, job_uuid="runs")
    claim(service, job_id)
    assert api.fine_tuning.jobs.retrieve("ftjob-runs").estimated_finish is None
    step = Step(step=1, max_steps=9, epoch=0.1, metrics={"loss": 1.0}, eta_s=100.0)
    told(service, job_id, step)
    job = api.fine_tuning.jobs.retrieve("ftjob-runs")
    assert (job.status, job.estimated_finish) == ("running", int(step.time.timestamp() + 100))
    assert (job.trained_tokens, job.result_files) == (None, [])
    assert api.fine_tuning.jobs.cancel("ftjob-runs").status == "running", "until it has saved a checkpoint"
    told(service, job_id, Step(step=2, max_steps=9, epoch=0.2, metrics={"loss": math.inf}, eta_s=math.inf))
    job = api.fine_tuning.jobs.retrieve("ftjob-runs")
    assert job.estimated_finish is None
    newest = api.fine_tuning.jobs.list_events("ftjob-runs", limit=1).data[0]
    assert newest.data == {"step": 2, "total_steps": 9, "train_loss": "Infinity", "loss": "Infinity"}


@pytest.mark.parametrize(
    ("error", "code", "param"),
    [
        ("DataError", "data_error", "training_file"),
        ("LayoutError", "layout_error", "model"),
        (None, "job_failed", None),
    ],
)
def test_a_failed_job(
    api: openai.OpenAI, service: PostTrainingService, error: str | None, code: str, param: str | None
) -> None:
    job_id = submit(service, job_uuid="failed")
    claim(service, job_id)
    if error is not None:
        told(service, job_id, Failed(reason="too strange", error=error))
    service.store.move(job_id, JobState.FAILED, reason="too strange")
    job = api.fine_tuning.jobs.retrieve("ftjob-failed")
    assert job.error is not None
    assert (job.status, job.error.code, job.error.param) == ("failed", code, param)
    assert job.error.message == "too strange"
    assert job.fine_tuned_model is None


@pytest.mark.parametrize("damage", ["{", None, "link"])
def test_a_job_with_a_damaged_folder_breaks_no_list(
    api: openai.OpenAI, service: PostTrainingService, damage: str | None
) -> None:
    submit(service, job_uuid="good")
    spec = folder_of(service, submit(service, job_uuid="broken")).spec
    spec.unlink()
    if damage == "link":
        spec.symlink_to("/etc/hostname")
    elif damage is not None:
        spec.write_text(damage)
    broken, good = api.fine_tuning.jobs.list().data
    assert good.error is None
    assert broken.error is not None
    assert (broken.id, broken.error.code, broken.training_file) == ("ftjob-broken", "unreadable", "unreadable")
    assert [job.id for job in api.fine_tuning.jobs.list(metadata={"a": "b"})] == []


def test_a_circuit_breaker_job_has_no_method(api: openai.OpenAI, service: PostTrainingService) -> None:
    submit(service, job_uuid="breaker", recipe="circuit_breaker", circuit_breaker={"retain": {"dataset_id": "good"}})
    assert api.fine_tuning.jobs.retrieve("ftjob-breaker").method is None


def test_nothing_reaches_the_job_of_another_owner(service: PostTrainingService) -> None:
    with caller("alice"):
        job_id = finished_job(service)
        assert ask(service, "GET", JOBS).json()["data"][0]["id"] == f"ftjob-{job_id}"
    with caller("bob"):
        assert ask(service, "GET", JOBS).json()["data"] == []
        about = f"{JOBS}/ftjob-"
        for verb, path in [
            ("GET", f"{about}%s"), ("GET", f"{about}%s/events"), ("GET", f"{about}%s/checkpoints"),
            ("POST", f"{about}%s/cancel"), ("POST", f"{about}%s/pause"), ("POST", f"{about}%s/resume"),
            ("GET", f"{JOBS}?after=ftjob-%s"), ("GET", f"http://test{PREFIX}/files/file-result-%s"),
            ("GET", f"http://test{PREFIX}/files/file-result-%s/content"),
        ]:  # fmt: skip
            hers, nothing = ask(service, verb, path % job_id), ask(service, verb, path % "none")
            assert (hers.status_code, hers.text) == (404, nothing.text.replace("none", job_id)), path


# The file of events.


def test_a_gap_in_the_file_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(
        b"not an event\n" + b'{"time":"2026-01-01T00:00:00Z","type":"started","pid":1,"versions":{}}\n{"ti'
    )
    found = [openai_events._event(line) for line in backwards(path)]
    assert [event and event.message for event in found] == ["The training process has started", None]


@given(st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.binary(max_size=9))
def test_backwards_reads_what_forwards_does(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], rest: bytes
) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    content = b"".join(line + b"\n" for line in lines) + rest.replace(b"\n", b"")
    path.write_bytes(content)
    offsets, at = [], 0
    for line in lines:
        offsets.append((at, line + b"\n"))
        at += len(line) + 1
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 7, 1 << 16):
            patch.setattr(openai_events, "BLOCK_BYTES", size)
            assert [tuple(line) for line in backwards(path)] == offsets[::-1]
            for place, (offset, _) in enumerate(offsets):
                assert [tuple(line) for line in backwards(path, offset)] == offsets[:place][::-1]


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert list(backwards(tmp_path / "none")) == []
