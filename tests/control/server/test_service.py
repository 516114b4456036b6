"""Tests the service without a server: ownership, traces of failed submissions, and the states of a job."""

import asyncio
import json
import os
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from llama_stack.core.request_headers import RequestProviderDataContext
from llama_stack_api import post_training
from llama_stack_api.common.job_types import JobStatus

from llama_stack_provider_moe.control.server import list_routes, wire
from llama_stack_provider_moe.control.server.callers import ANONYMOUS
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store import parent_jobs
from llama_stack_provider_moe.control.store.intake import STALE_STAGING_S
from llama_stack_provider_moe.control.store.job_filter import EVERY_JOB
from llama_stack_provider_moe.errors import Conflict, InvalidInput, InvalidRows, MoeError, NotFound
from llama_stack_provider_moe.jobdir import row_domains
from llama_stack_provider_moe.jobdir.events import Evaluation, EventLog, Saved, Step
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder, Manifest, Metrics, write_atomic
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import BODY, ROWS, Datasets, caller, serving_in_process, submit


@pytest.fixture
def datasets() -> Datasets:
    return Datasets()


@pytest.fixture
def service(tmp_path: Path, datasets: Datasets) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, datasets) as made:
        yield made


def left(service: PostTrainingService) -> set[str]:
    """Everything in the state folder but the files that are always there."""
    root = service.config.state_dir
    found = {str(path.relative_to(root)) for path in root.rglob("*")}
    always = {"jobs", "models", "staging", "deleted", "jobs/.lock", "store-id"}
    always |= {"datasets", "datasets/.lock", "datasets/incoming"}
    return {name for name in found if not name.startswith("jobs.db")} - always


def test_a_job_is_in_folder_and_store(service: PostTrainingService) -> None:
    job_id = submit(service, training={"n_epochs": 3})
    job = service.store.get(job_id, ANONYMOUS)
    folder = JobFolder(Path(job.folder))
    assert folder.root == service.config.jobs_dir / job_id
    spec = folder.read_spec()
    assert (spec.job_uuid, spec.training.n_epochs, spec.recipe) == (job_id, 3, "sft")
    assert len(folder.train_rows.read_text().splitlines()) == len(ROWS)
    assert not folder.validation_rows.exists()
    assert json.loads(folder.spec.read_text())["optimizer"]["lr"] == 1e-4, "the spec contains the defaults"
    assert not any((service.config.state_dir / "staging").iterdir())


def listed_jobs(service: PostTrainingService, limit: int, after: str | None) -> wire.ListPostTrainingJobsResponse:
    return asyncio.run(service.seen(lambda store, whose: list_routes.page(store, whose, limit, after, EVERY_JOB)))


def test_jobs_belong_to_their_callers(service: PostTrainingService) -> None:
    with caller("alice"):
        job_id = submit(service)
        assert asyncio.run(service.status(job_id)).status == "scheduled"
    with caller("bob"):
        assert listed_jobs(service, 10, None).data == []
        for request in (service.status, service.detail, service.artifacts, service.cancel):
            with pytest.raises(NotFound):
                asyncio.run(request(job_id))
        with pytest.raises(NotFound):
            asyncio.run(service.logs(job_id, 10, None))
        with pytest.raises(NotFound):  # its artifacts can't be trained on either
            submit(service, model=str(service.config.jobs_dir / job_id / "artifacts" / "merged"))
        with pytest.raises(Conflict):  # a name is taken, whoever has it
            submit(service, job_uuid=job_id)
    with pytest.raises(NotFound):
        asyncio.run(service.status(job_id))
    with caller("alice"):
        asyncio.run(service.cancel(job_id))
        assert asyncio.run(service.status(job_id)).status == "cancelled"
    assert "alice" not in service.store.get(job_id, None).owner


def test_a_user_injected_by_a_header_is_anonymous(service: PostTrainingService) -> None:
    # With authentication off, 0.6.1 passes the header's JSON through as the user.
    with RequestProviderDataContext({"__authenticated_user": {"principal": "root"}}):
        job_id = submit(service)
    assert service.store.get(job_id, None).owner == ANONYMOUS


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"dataset_id": "bad"}},
        {"data": {"dataset_id": "gone"}},
        {"data": {"dataset_id": "good", "validation_dataset_id": "bad"}},
        {"data": {"dataset_id": "one"}},
        {"training": {"batch_size": 0}},
        {"model": "/etc"},
        {"checkpoint_dir": "/etc"},
        {"job_uuid": "../x"},
    ],
    ids=str,
)
def test_a_refused_job_leaves_nothing(service: PostTrainingService, changes: dict[str, Any]) -> None:
    with pytest.raises(MoeError) as caught:
        submit(service, **changes)
    assert 400 <= caught.value.status < 500
    assert left(service) == set()
    assert sum(service.store.counts().values()) == 0


def test_a_store_that_fails_leaves_nothing(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(parent_jobs, "as_job", full)  # inside the transaction, after the insert
    with pytest.raises(OSError, match="no space"):
        submit(service, job_uuid="mine")
    monkeypatch.undo()
    assert left(service) == set()
    assert submit(service, job_uuid="mine") == "mine"


def test_an_abandoned_request_leaves_nothing(service: PostTrainingService, datasets: Datasets) -> None:
    async def abandon() -> None:
        task = asyncio.current_task()
        assert task is not None
        datasets.during = task.cancel
        await service.submit(BODY)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(abandon())
    assert left(service) == set()


def test_an_orphan_does_not_block_its_name(service: PostTrainingService) -> None:
    orphan = service.config.jobs_dir / "mine"  # a server died between the rename and the insertion
    (orphan / "data").mkdir(parents=True)
    (orphan / "data" / "train.jsonl").write_text("old\n")
    assert submit(service, job_uuid="mine") == "mine"
    assert "old" not in (orphan / "data" / "train.jsonl").read_text()


def test_one_of_many_gets_the_name(service: PostTrainingService) -> None:
    outcomes: list[object] = []

    def attempt() -> None:
        try:
            outcomes.append(submit(service, job_uuid="mine"))
        except Conflict as conflict:
            outcomes.append(conflict)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("mine") == 1
    assert len(outcomes) == 8
    assert JobFolder(service.config.jobs_dir / "mine").read_spec().job_uuid == "mine"
    assert not any((service.config.state_dir / "staging").iterdir())


def test_stale_staging_is_cleared_and_fresh_is_not(service: PostTrainingService) -> None:
    staging = service.config.state_dir / "staging"
    for name in ("stale", "fresh"):
        (staging / name / "data").mkdir(parents=True)
    long_ago = datetime.now(UTC).timestamp() - STALE_STAGING_S - 60
    os.utime(staging / "stale", (long_ago, long_ago))
    second = PostTrainingService(service.config, {})
    asyncio.run(second.initialize())
    asyncio.run(second.shutdown())
    assert [path.name for path in staging.iterdir()] == ["fresh"]


def test_validation_data_and_splits(service: PostTrainingService) -> None:
    def counts(**data: Any) -> tuple[int, int | None]:
        split = data.pop("split", 0.1)
        body = BODY | {"data": {"dataset_id": "good"} | data, "options": {"validation_split": split}}
        found = asyncio.run(service.validate(body))
        return found.train_rows, found.validation_rows

    assert counts() == (12, None)
    assert counts(split=0) == (12, 0)
    assert counts(validation_dataset_id="one") == (12, 1)
    assert counts(dataset_id="one", split=0) == (1, 0)
    assert counts(dataset_id="one", validation_dataset_id="good") == (1, 12)
    with pytest.raises(InvalidRows):
        counts(dataset_id="bad")
    assert left(service) == set(), "validate creates nothing"


def test_only_a_server_that_the_operator_names_may_generate(tmp_path: Path, datasets: Datasets) -> None:
    engines = {"fast": {"url": "http://127.0.0.1:9", "weights_dir": str(tmp_path / "weights")}}
    body = BODY | {"recipe": "grpo", "reward": [{"grader": {"type": "length", "name": "short", "most": 9}}]}

    def asked(name: str) -> int:
        rl = {"engine": {"type": "vllm_server", "server": name}, "n_generations": 2}
        return asyncio.run(service.validate(body | {"rl": rl, "training": {"batch_size": 4}})).train_rows

    with serving_in_process(tmp_path, datasets, engines=engines) as service:
        with pytest.raises(InvalidInput, match=r"rl\.engine\.server: 'other' is not valid; expected one of fast"):
            asked("other")
        assert asked("fast") == 12


@pytest.mark.parametrize("within", [False, True], ids=["alone", "multi"])
def test_the_schema_of_a_grader_is_checked_at_the_door(service: PostTrainingService, within: bool) -> None:
    grader: dict[str, Any] = {"type": "json_schema", "name": "form", "json_schema": {"$ref": "http://example.com/a"}}
    field = "reward.0.grader.json_schema"
    if within:
        grader = {"type": "multi", "name": "m", "graders": {"form": grader}, "calculate_output": "form"}
        field = "reward.0.grader.graders.form.json_schema"
    body = BODY | {"recipe": "grpo", "training": {"batch_size": 4}, "reward": [{"grader": grader}]}
    with pytest.raises(InvalidInput, match=rf"{re.escape(field)}.*'http://example\.com/a' is not valid"):
        asyncio.run(service.validate(body))


def test_each_domain_is_copied_and_counted(service: PostTrainingService, datasets: Datasets) -> None:
    datasets.rows["questions"] = [{"question": "a", "answer": "b"}] * 4
    columns = {"prompt": "question", "completion": "answer"}
    domains: list[dict[str, Any]] = [
        {"name": "first", "dataset_id": "good", "validation_dataset_id": "one"},
        {"name": "second", "dataset_id": "questions", "columns": columns, "validation_dataset_id": "questions"},
    ]
    job_id = submit(service, data={"domains": domains})
    folder = JobFolder(service.config.jobs_dir / job_id)
    found = {path.stem: len(path.read_text().splitlines()) for path in folder.data.glob("*.jsonl")}
    assert found == {"train-first": 12, "validation-first": 1, "train-second": 4, "validation-second": 4}
    checked = asyncio.run(service.validate(BODY | {"data": {"domains": domains}}))
    assert (checked.train_rows, checked.validation_rows) == (16, 5)
    split = [each for each in domains if each.pop("validation_dataset_id")]
    checked = asyncio.run(service.validate(BODY | {"data": {"domains": split}}))
    assert (checked.train_rows, checked.validation_rows) == (16, None)


def test_a_column_names_the_domain_of_each_row(service: PostTrainingService, datasets: Datasets) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": each} for each in ("law", "code", "law", "code", "law")]
    datasets.rows |= {"labelled": rows, "held": [rows[1], rows[0]], "law alone": [rows[0]]}
    data: dict[str, Any] = {"dataset_id": "labelled", "domain_column": "label"}
    folder = JobFolder(service.config.jobs_dir / submit(service, data=data))
    assert row_domains.read(folder.domains_of_rows("train")) == (("law", "code"), bytes([0, 1, 0, 1, 0]))
    assert sorted(path.name for path in folder.data.iterdir() if path.suffix != ".json") == [
        "train.domains", "train.jsonl"]  # fmt: skip
    ratios = {"domain_ratios": {"code": 1, "law": 2}, "validation_dataset_id": "held"}
    folder = JobFolder(service.config.jobs_dir / submit(service, data=data | ratios))
    assert row_domains.read(folder.domains_of_rows("validation")) == (("code", "law"), bytes([0, 1]))
    notes = asyncio.run(service.validate(BODY | {"data": data})).notes
    assert "data.domain_column: law (3 rows), code (2 rows)" in notes
    assert not [note for note in notes if "not read" in note], "the column was read"
    before = left(service)

    def refused(**changes: Any) -> str:
        with pytest.raises(MoeError) as found:
            submit(service, data=data | changes)
        return str(found.value)

    assert "row 1: nosuch: is missing; data.domain_column needs it" in refused(domain_column="nosuch")
    assert "row 2: label: is 'code'; expected 'law', 'chat'" in refused(domain_ratios={"law": 1, "chat": 1})
    assert "at least 1 held-out row(s) of each domain; 'code' has 0" in refused(validation_dataset_id="law alone")
    assert "data.domain_ratios.code: 1.0 is not valid" in refused(domain_ratios={"law": 0.0001, "code": 1})
    assert left(service) == before, "nothing was created"


def test_mistakes_in_domains_are_named_at_submission(service: PostTrainingService) -> None:
    before = left(service)

    def refused(**second: Any) -> str:
        domains = [{"name": "a", "dataset_id": "good"}, {"name": "b", "dataset_id": "good", **second}]
        with pytest.raises(MoeError) as found:
            submit(service, data={"domains": domains})
        return str(found.value)

    assert "no data set 'nosuch'" in refused(dataset_id="nosuch")
    assert "data.domains.1.dataset_id: 'one'" in refused(dataset_id="one")
    assert "data.domains.1.columns" in refused(columns={"prompt": "nosuch"})
    assert "data.domains.1.ratio: 0 is not valid; expected > 0" in refused(ratio=0)
    assert "of 'a' at most 1,000 times" in refused(ratio=0.0001)
    assert left(service) == before, "nothing was created"


def artifact(folder: JobFolder, name: str, epoch: int) -> Artifact:
    path = folder.root / name
    path.mkdir(parents=True)
    metrics = Metrics(epoch=epoch, train_loss=1.5, validation_loss=1.25, perplexity=3.5)
    return Artifact(
        identifier=f"{folder.root.name}/{name}", kind="checkpoint", path=str(path), epoch=epoch, step=epoch * 5,
        created_at=datetime.now(UTC), bytes=1, metrics=metrics,
    )  # fmt: skip


def test_the_states_of_a_job_in_the_api(service: PostTrainingService) -> None:
    first, second = submit(service), submit(service)

    def status() -> post_training.PostTrainingJobStatusResponse:
        answer = asyncio.run(service.status(first)).model_dump(mode="json")
        return post_training.PostTrainingJobStatusResponse.model_validate(answer)

    waiting = asyncio.run(service.status(second)).resources_allocated
    assert waiting is not None
    assert (waiting["stage"], waiting["queue_position"]) == ("queued", 2)

    assert service.store.claim("me/1/1/1/1") is not None
    folder = JobFolder(service.config.jobs_dir / first)
    events = EventLog(folder.events)
    events.append(Step(step=5, max_steps=10, epoch=1.0, metrics={"loss": 1.5, "aux_loss": float("nan")}, eta_s=2.0))
    events.append(Evaluation(step=5, epoch=1.0, metrics={"eval_loss": 1.25}))
    saved = artifact(folder, "checkpoints/epoch-1", 1)
    events.append(Saved(artifact=saved.model_dump(mode="json")))
    events.close()
    running = status()
    assert running.status is JobStatus.in_progress
    assert running.resources_allocated is not None
    assert (running.resources_allocated["percent"], running.resources_allocated["eta_s"]) == (50.0, 2.0)
    [checkpoint] = running.checkpoints
    assert (checkpoint.identifier, checkpoint.post_training_job_id) == (saved.identifier, first)
    assert checkpoint.training_metrics is not None
    assert checkpoint.training_metrics.perplexity == 3.5

    final = artifact(folder, "artifacts/adapter", 2)
    write_atomic(folder.manifest, Manifest(job_uuid=first, artifacts=[saved, final], summary={"loss": 1.0}))
    write_atomic(folder.resolved, '{"family": "granitemoe"}')
    service.store.move(first, JobState.COMPLETED, artifacts=(saved, final))
    done = status()
    assert (done.status, len(done.checkpoints)) == (JobStatus.completed, 2)
    assert done.completed_at is not None
    whole = asyncio.run(service.detail(first))
    assert (whole.summary, whole.resolved) == ({"loss": 1.0}, {"family": "granitemoe"})
    assert whole.spec is not None
    assert whole.spec["model"] == "owner/name"
    with pytest.raises(Conflict):
        asyncio.run(service.cancel(first))
    listed = listed_jobs(service, 1, None)
    assert ([line.job_uuid for line in listed.data], listed.has_more) == ([second], True)
    assert [line.job_uuid for line in listed_jobs(service, 1, second).data] == [first]


def test_a_failed_job_says_why(service: PostTrainingService) -> None:
    job_id = submit(service)
    service.store.move(job_id, JobState.FAILED, reason="out of memory")
    answer = asyncio.run(service.status(job_id))
    assert answer.resources_allocated is not None
    assert answer.resources_allocated["reason"] == "out of memory"


def test_an_earlier_reason_is_marked_as_such(service: PostTrainingService) -> None:
    job_id = submit(service)
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.requeue(job_id, "killed; it is tried again")
    waiting = asyncio.run(service.detail(job_id))
    assert waiting.reason == "killed; it is tried again"
    service.store.claim("supervisor")
    running = asyncio.run(service.detail(job_id))
    assert running.status is JobState.IN_PROGRESS
    assert running.reason == "last start: killed; it is tried again"
    assert running.resources_allocated is not None
    assert running.resources_allocated["reason"] == running.reason


def test_health_reports_a_store_whose_file_is_gone(service: PostTrainingService) -> None:
    submit(service)
    found = asyncio.run(service.health())
    assert (found.status, found.supervisor, found.jobs[JobState.SCHEDULED]) == ("ok", "none", 1)
    for path in service.config.state_dir.glob("jobs.db*"):
        path.unlink()
    found = asyncio.run(service.health())
    assert (found.status, found.store) == ("error", "replaced")
