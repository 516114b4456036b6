"""Files and rows of another version of this package: unknown fields are ignored, and unreadable parts do not affect
the readable ones."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors import Exit
from llama_stack_provider_moe.control.supervisor.outcome import outcome
from llama_stack_provider_moe.control.supervisor.processes import PidScope, ProcessName, birth
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.attempt import JOB_VARIABLE
from llama_stack_provider_moe.jobdir.checkpoint_index import CHECKSUMS, STATE, verify, write_checksums
from llama_stack_provider_moe.jobdir.cluster_run import RUN_FILE, ClusterRun, read_run
from llama_stack_provider_moe.jobdir.export_steps import ExportStep, ExportSteps, StepState, read_steps, steps_of
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder, Manifest, write_atomic
from llama_stack_provider_moe.jobdir.mirror import MirrorRecord, read_places
from llama_stack_provider_moe.jobdir.scan import saved_artifacts
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JOB_SPEC, SFTSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import TINY_CHILD, ended, new_job, new_supervisor, submit, wait_for

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NEWS = {"of_a_later_version": {"deep": [1]}}


def artifact(name: str, **more: Any) -> dict[str, Any]:
    """An entry as a later version writes it."""
    return {
        "identifier": f"job/{name}", "kind": "adapter", "path": f"/jobs/job/artifacts/{name}", "epoch": 1, "step": 7,
        "created_at": MOMENT.isoformat(), "bytes": 9, "metrics": None, **NEWS, **more,
    }  # fmt: skip


def in_all(value: Any) -> Any:
    """A JSON document with an unknown field in each of its objects that has a fixed shape."""
    if isinstance(value, dict):
        return {name: in_all(each) for name, each in value.items()} | ({} if _is_map(value) else NEWS)
    return [in_all(each) for each in value] if isinstance(value, list) else value


def _is_map(value: dict[str, Any]) -> bool:
    return not value or any("." in name or name.isupper() for name in value)


# Files.


def test_a_completed_job_stays_completed(store: JobStore, config: ProviderConfig) -> None:
    folder = JobFolder(new_job(store, config, "job"))
    store.claim("me")
    job = store.launched("job", 1, 1.0)
    left = [artifact("adapter"), artifact("poem", kind="poem", metrics={
        "epoch": 1, "train_loss": 1.0, "validation_loss": 1.0, "perplexity": 1.0, **NEWS,
    })]  # fmt: skip
    manifest = {"job_uuid": "job", "artifacts": left, "summary": {"loss": 1.0}, "stopped_by": "the moon", **NEWS}
    folder.manifest.write_text(json.dumps(manifest))
    end = outcome(job, Exit(0), 3)
    assert (end.state, end.reason, end.stopped_by) == (JobState.COMPLETED, None, "the moon")
    assert [(each.identifier, each.kind) for each in end.artifacts] == [
        ("job/adapter", "adapter"),
        ("job/poem", "poem"),
    ]
    store.move("job", end.state, end.reason, end.artifacts, end.stopped_by)
    assert store.get("job", None).artifacts == end.artifacts
    assert store.get("job", None).unreadable is None


SPEC = {
    "recipe": "sft", "model": "a/b", "data": {"dataset_id": "rows"}, "adapter": {"rank": 4, "alpha": 8},
    "eval": {"refuse_dataset_id": "rows"}, "export": {"merged": True},
}  # fmt: skip


def test_a_spec_is_read_as_far_as_it_is_known_and_the_rest_is_told(root: Path) -> None:
    folder = JobFolder(root)
    whole = JOB_SPEC.validate_python(SPEC).model_dump(mode="json")
    folder.spec.write_text(json.dumps(whole))
    known = folder.read_spec()
    assert folder.unknown_settings() == []
    whole["adapter"]["of_a_later_version"] = "job-7"
    whole["of_a_later_version"] = 1
    folder.spec.write_text(json.dumps(whole))
    assert folder.read_spec() == known
    assert isinstance(known, SFTSpec)
    assert folder.unknown_settings() == ["of_a_later_version = 1", 'adapter.of_a_later_version = "job-7"']
    with pytest.raises(ValueError, match="of_a_later_version"):  # at the door they stay errors
        JOB_SPEC.validate_python(whole)


def test_every_other_file_of_a_job_is_read_as_far_as_it_is_known(root: Path) -> None:
    folder = JobFolder(root)
    run = ClusterRun(run="r-1", number=1, environment={"A": "b"}, overrides={"C": "d"})
    (root / RUN_FILE).write_text(json.dumps(in_all(run.model_dump())))
    assert read_run(root) == run
    places = MirrorRecord(urls=["file:///elsewhere/job.1"])
    folder.mirror.write_text(json.dumps(in_all(places.model_dump())))
    assert read_places(folder) == places
    checkpoint = root / "step-1"
    checkpoint.mkdir()
    (checkpoint / STATE).write_text("{}")
    write_checksums(checkpoint, 1)
    sums = json.loads((checkpoint / CHECKSUMS).read_text())
    (checkpoint / CHECKSUMS).write_text(json.dumps(in_all(sums)))
    assert "of_a_later_version" in (checkpoint / CHECKSUMS).read_text()
    assert verify(checkpoint) is None


def test_reports_that_jobs_read_back_are_read_as_far_as_they_are_known() -> None:
    """All of them are read by one function, so that none is forgotten."""
    package = Path(events.__file__).parents[1]
    own = {"Manifest", "Artifact", "Checksums", "MirrorRecord", "ClusterRun", "ExportSteps", "RoutingReport", "_Kept",
           "RunState", "Probe", "ProviderConfig", "JOB_SPEC"}  # fmt: skip
    forgotten = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(f"{name}.model_validate_json(" in line or f"{name}.validate_json(" in line for name in own)
        and 'extra="ignore"' not in line
    ]
    assert forgotten == []


def test_a_supervisor_takes_the_configuration_of_a_newer_server(config: ProviderConfig) -> None:
    text = config.model_copy(update={"supervisor": config.supervisor.model_copy(update={"idle_exit_s": 0})})
    newer = json.loads(text.model_dump_json())
    newer["of_a_later_version"] = newer["supervisor"]["of_a_later_version"] = 1
    done = subprocess.run(
        [sys.executable, "-m", "llama_stack_provider_moe.control.supervisor.supervisor"], input=json.dumps(newer),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "idle for 0 s; leaving" in done.stderr


# Events.


def line(kind: str, **fields: Any) -> bytes:
    return json.dumps({"time": MOMENT.isoformat(), "type": kind, **fields}, separators=(",", ":")).encode() + b"\n"


STEP = {"step": 1, "max_steps": 2, "epoch": 0.5, "metrics": {"loss": 1.0}}


def test_a_process_of_the_version_before_is_adopted_and_settled(store: JobStore, config: ProviderConfig) -> None:
    """Its environment does not name its attempt, and its folder does not say which one counts."""
    folder = new_job(store, config, "job", grandchild=True, steps=3)
    dead = subprocess.Popen(["true"])
    dead.wait()
    store.claim(str(ProcessName(PidScope.here(), dead.pid, 1.0)))
    with (folder / "output.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, TINY_CHILD, folder], stdout=output, stderr=output, start_new_session=True,
            env={"PATH": os.environ["PATH"], JOB_VARIABLE: str(folder)},
        )  # fmt: skip
    born = birth(process.pid)
    assert born is not None
    store.launched("job", process.pid, born)
    supervisor = new_supervisor(store, config)
    assert ended(store, supervisor, "job").state is JobState.COMPLETED
    grandchild = int((folder / "grandchild").read_text())
    wait_for(lambda: birth(grandchild) is None)
    assert process.wait() == 0
    assert not (folder / "attempt.json").exists()


def test_events_of_a_later_version_are_read_as_far_as_they_are_known(store: JobStore, config: ProviderConfig) -> None:
    folder = JobFolder(new_job(store, config, "job"))
    saved = artifact("adapter", path=str(folder.root), kind="poem")
    folder.events.write_bytes(
        line("step", **STEP, **NEWS)
        + line("weather", sky="blue", readiness=float("nan"), **NEWS)
        + line("message", level="alarm", text="look out")
        + line("saved", artifact=saved)
        + line("finished", train_seconds=1.0, stopped_by="the moon")
        + b'{"type":"weather"}\n'
    )
    page = events.read(folder.events)
    assert [each.type for each in page.events] == ["step", "weather", "message", "saved", "finished"]
    assert page.unreadable == 1, "an event has a time"
    assert [each.kind for each in saved_artifacts(folder)] == ["poem"]
    newest = events.latest(folder.events)
    assert newest["weather"].sky == "blue"
    assert newest["finished"].stopped_by == "the moon"
    assert progress(store.get("job", None), folder)["step"] == 1


# Steps of exports.


def test_a_step_that_cannot_be_read_leaves_the_others(root: Path) -> None:
    folder = JobFolder(root)
    steps = ExportSteps(steps=[ExportStep(name="merge", state=StepState.COMPLETED), ExportStep(name="gguf")])
    document = in_all(steps.model_dump(mode="json"))
    folder.exports.write_text(json.dumps(document))
    assert read_steps(folder) == steps.steps
    document["steps"][1]["state"] = "resting"
    document["steps"] += [{"state": "completed"}, 7]
    folder.exports.write_text(json.dumps(document))
    found = steps_of(folder, JobState.COMPLETED, None)
    assert [(each.name, each.state.value) for each in found] == [
        ("merge", "completed"), ("gguf", "unreadable"), ("exports.json", "unreadable"), ("exports.json", "unreadable"),
    ]  # fmt: skip
    assert "entry 3: name: Field required" in str(found[2].reason)
    folder.exports.write_text("{")
    (only,) = read_steps(folder)
    assert (only.state, "it can't be read" in str(only.reason)) == (StepState.UNREADABLE, True)
    folder.exports.unlink()
    assert read_steps(folder) == []


# Rows.


def spoil(store: JobStore, job_id: str, **values: Any) -> None:
    """Write values into a row that the store itself would not write."""
    with store._writing.begin() as connection:
        for name, value in values.items():
            connection.execute(
                text(f"UPDATE moe_jobs SET {name} = :value WHERE id = :id"), {"value": value, "id": job_id}
            )


SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "a state of a later version": ({"state": "paused"}, "state: 'paused' is not known to this version"),
    "artifacts that are none": ({"artifacts": "{damaged"}, "artifacts: JSONDecodeError"),
    "an artifact that is none": ({"artifacts": json.dumps([artifact("adapter"), 5])}, "artifacts: entry 2: "),
    "a time that is none": ({"scheduled_at": "yesterday"}, "scheduled_at: the time can't be read"),
    "a number that is none": ({"attempts": "many"}, "attempts: 'many' can't be read"),
    "a place that is none": ({"pid_birth": "long ago"}, "pid_birth: 'long ago' can't be read"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_row_that_cannot_be_read_is_shown_as_such_and_the_others_stay(store: JobStore, name: str) -> None:
    others = [submit(store, "before"), submit(store, "after")]
    submit(store, "job")
    values, said = SPOILT[name]
    spoil(store, "job", **values)
    shown = {job.id: job for job in store.list("ann")}
    assert [shown[each.id] for each in others] == others
    job = shown["job"]
    assert said in str(job.unreadable)
    assert job.state is (JobState.UNREADABLE if "state" in values else JobState.SCHEDULED)
    assert len(job.artifacts) == (name == "an artifact that is none")
    assert store.get("job", None) == job
    assert sum(store.counts().values()) == 3
    assert sum(group.jobs for group in store.job_counts().groups.values()) == 3


def test_text_that_is_none_spoils_no_list(store: JobStore) -> None:
    submit(store, "job")
    with store._writing.begin() as connection:
        connection.exec_driver_sql("UPDATE moe_jobs SET reason = CAST(x'ff00ff' AS TEXT)")
    assert store.get("job", None).reason is not None


def test_artifacts_of_a_later_version_are_whole(store: JobStore) -> None:
    submit(store, "job")
    spoil(store, "job", artifacts=json.dumps([artifact("adapter"), artifact("poem", kind="poem")]))
    job = store.get("job", None)
    assert job.unreadable is None
    assert [each.kind for each in job.artifacts] == ["adapter", "poem"]


def test_a_job_in_a_state_of_a_later_version_is_left_alone(store: JobStore) -> None:
    submit(store, "job")
    spoil(store, "job", state="paused")
    for refused in (store.request_cancel, store.resume, store.delete):
        with pytest.raises(Conflict, match=r"'job' is (unreadable|paused)"):
            refused("job", "ann")
    for state in (JobState.IN_PROGRESS, JobState.FAILED):
        with pytest.raises(Conflict, match="is unreadable"):
            store.move("job", state)
    assert store.claim("me") is None
    assert not store.has_work()


def test_a_supervisor_runs_the_others(store: JobStore, config: ProviderConfig) -> None:
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    for name in ("paused", "damaged", "sound"):
        new_job(store, config, name)
    spoil(store, "paused", state="paused")
    spoil(store, "damaged", artifacts="{", scheduled_at="yesterday", queued_at="yesterday")
    assert ended(store, supervisor, "sound").state is JobState.COMPLETED
    damaged = store.get("damaged", None)
    assert damaged.state is JobState.COMPLETED
    assert len(damaged.artifacts) == 1, "written anew when it ended"
    assert store.get("paused", None).state is JobState.UNREADABLE


def test_what_is_read_is_what_was_written(store: JobStore) -> None:
    """The tolerant reader loses nothing from a valid row."""
    submit(store, "job", gpus=2)
    store.claim("me", ["0", "1"])
    store.launched("job", 7, 1.5)
    left = (Artifact.model_validate(artifact("adapter"), extra="ignore"),)
    job = store.move("job", JobState.COMPLETED, "why", left, "early_stopping")
    assert isinstance(job, Job)
    assert (job.pid, job.pid_birth, job.gpus, job.devices, job.artifacts) == (7, 1.5, 2, "0,1", left)
    assert (job.reason, job.stopped_by, job.unreadable) == ("why", "early_stopping", None)


def test_a_manifest_of_ours_is_read_whole(root: Path) -> None:
    folder = JobFolder(root)
    manifest = Manifest(job_uuid="job", artifacts=[], summary={"loss": 1.0}, stopped_by="time_budget")
    write_atomic(folder.manifest, manifest)
    assert folder.read_manifest() == manifest
