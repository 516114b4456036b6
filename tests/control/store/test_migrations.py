"""Stores of older versions are migrated in place and keep every job; newer ones are left alone."""

import re
from datetime import UTC, datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from llama_stack_provider_moe.control.store.migrations import STEPS
from llama_stack_provider_moe.control.store.opening import identity_of
from llama_stack_provider_moe.control.store.schema import METADATA, SCHEMA_VERSION
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.state import JobState

# What version 1 made, on SQLite; `on_postgresql` says where PostgreSQL differed.
VERSION_1 = """
CREATE TABLE moe_schema (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE moe_jobs (
    seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    id VARCHAR(128) NOT NULL,
    owner VARCHAR(256) NOT NULL,
    recipe VARCHAR(64) NOT NULL,
    model TEXT NOT NULL,
    state VARCHAR(16) NOT NULL,
    scheduled_at DATETIME NOT NULL,
    started_at DATETIME,
    ended_at DATETIME,
    cancel_requested_at DATETIME,
    attempts INTEGER NOT NULL,
    reason TEXT,
    artifacts TEXT NOT NULL,
    supervisor VARCHAR(256),
    pid INTEGER,
    pid_birth DOUBLE,
    folder TEXT NOT NULL,
    UNIQUE (id)
);
CREATE INDEX moe_jobs_state_seq ON moe_jobs (state, seq);
CREATE INDEX moe_jobs_owner_seq ON moe_jobs (owner, seq);
CREATE TABLE moe_supervisor (
    id INTEGER NOT NULL, holder VARCHAR(256), pid INTEGER, beat_at DATETIME, lease_s DOUBLE, PRIMARY KEY (id)
);
INSERT INTO moe_schema (version) VALUES (1);
INSERT INTO moe_supervisor (id) VALUES (1);
"""
ARTIFACT = (
    '[{"identifier":"done/adapter","kind":"adapter","path":"/jobs/done/artifacts/adapter","epoch":1,"step":7,'
    '"created_at":"2026-01-02T03:04:05Z","bytes":9,"metrics":null}]'
)
ROWS = {
    "done": ("completed", "2026-01-02 03:00:00.000000", "2026-01-02 03:01:00.000000", ARTIFACT, None),
    "runs": ("in_progress", "2026-01-02 03:02:00.000000", None, "[]", 4711),
    "waits": ("scheduled", "2026-01-02 03:03:00.000000", None, "[]", None),
    "waits-too": ("scheduled", "2026-01-02 03:04:00.000000", None, "[]", None),
}


def on_postgresql(ddl: str) -> str:
    ddl = ddl.replace("INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "SERIAL NOT NULL PRIMARY KEY")
    return re.sub(r"\bDOUBLE\b", "DOUBLE PRECISION", ddl).replace("DATETIME", "TIMESTAMP WITH TIME ZONE")


@pytest.fixture
def old_url(url: str) -> str:
    """A store of version 1 with jobs in it."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in (VERSION_1 if url.startswith("sqlite") else on_postgresql(VERSION_1)).split(";\n"):
            if statement.strip():
                connection.execute(text(statement))
        for job_id, (state, scheduled_at, ended_at, artifacts, pid) in ROWS.items():
            connection.execute(
                text(
                    "INSERT INTO moe_jobs (id, owner, recipe, model, state, scheduled_at, ended_at, attempts,"
                    " artifacts, pid, pid_birth, folder) VALUES (:id, 'ann', 'sft', 'some/model', :state,"
                    " :scheduled_at, :ended_at, :attempts, :artifacts, :pid, 1.5, :folder)"
                ),
                {"id": job_id, "state": state, "scheduled_at": scheduled_at, "ended_at": ended_at, "pid": pid,
                 "attempts": int(state != "scheduled"), "artifacts": artifacts, "folder": f"/jobs/{job_id}"},
            )  # fmt: skip
    engine.dispose()
    return url


def version(url: str) -> int:
    engine = create_engine(url)
    with engine.begin() as connection:
        found: int = connection.execute(text("SELECT version FROM moe_schema")).scalar_one()
    engine.dispose()
    return found


def test_there_is_a_step_to_every_version() -> None:
    assert sorted(STEPS) == list(range(2, SCHEMA_VERSION + 1))


def test_an_old_store_comes_up_with_every_job(old_url: str) -> None:
    store = JobStore(old_url)
    assert version(old_url) == SCHEMA_VERSION
    jobs = {job.id: job for job in store.list(None)}
    assert list(jobs) == [*ROWS][::-1]
    for job_id, (state, scheduled_at, _, _, pid) in ROWS.items():
        job = jobs[job_id]
        assert (job.state, job.owner, job.pid, job.folder) == (state, "ann", pid, f"/jobs/{job_id}")
        assert job.scheduled_at == job.queued_at == datetime.fromisoformat(scheduled_at).replace(tzinfo=UTC)
        assert (job.lost, job.stopped_by, job.gpus, job.devices) == (0, None, None, None)
    assert [artifact.identifier for artifact in jobs["done"].artifacts] == ["done/adapter"]
    store.close()


def test_an_old_queue_goes_on_in_its_order(old_url: str) -> None:
    store = JobStore(old_url)
    store.submit("new", "ann", "sft", "some/model", "/jobs/new")
    assert [store.queue_position(job_id) for job_id in ("waits", "waits-too", "new")] == [1, 2, 3]
    store.move("runs", JobState.FAILED)
    store.resume("runs", "ann")
    assert [job.id for job in iter(lambda: store.claim("me"), None)] == ["waits", "waits-too", "new", "runs"]
    store.close()


def test_ids_of_deleted_rows_are_never_given_again(old_url: str) -> None:
    """SQLite: AUTOINCREMENT outlives the copy of the table that a migration makes."""
    store = JobStore(old_url)
    for job_id in ("waits", "waits-too"):
        store.request_cancel(job_id, None)
    store.delete("waits-too", None)
    store.submit("new", "ann", "sft", "some/model", "/jobs/new")
    engine = create_engine(old_url)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT seq FROM moe_jobs WHERE id = 'new'")).scalar_one() == len(ROWS) + 1
    engine.dispose()
    store.close()


def test_a_store_of_before_gets_a_name_and_keeps_models_that_later_jobs_were_trained_on(old_url: str) -> None:
    engine = create_engine(old_url)
    with engine.begin() as connection:
        for model, job_id in (("/jobs/done/artifacts/merged", "waits"), ("/jobs/done-too/artifacts/merged", "runs")):
            statement = text("UPDATE moe_jobs SET model = :model WHERE id = :id")
            connection.execute(statement, {"model": model, "id": job_id})
    engine.dispose()
    assert identity_of(old_url) is None, "a look migrates nothing"
    store = JobStore(old_url)
    assert len(store.identity()) == 36
    assert identity_of(old_url) == store.identity()
    assert [job.id for job in store.dependents("done")] == ["waits"], "by whole names of folders"
    assert store.dependents("waits") == []
    again = JobStore(old_url)
    assert again.identity() == store.identity()
    again.close()
    store.close()


def schema_differences(url: str) -> list[object]:
    """What alembic would change in the store to match the code."""
    JobStore(url).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        differences: list[object] = compare_metadata(MigrationContext.configure(connection), METADATA)
        assert inspect(connection).get_unique_constraints("moe_jobs")[0]["column_names"] == ["id"]
    engine.dispose()
    return differences


def test_a_new_store_has_the_schema_that_the_code_writes_down(url: str) -> None:
    assert schema_differences(url) == []


def test_an_old_store_gets_the_schema_of_a_new_one(old_url: str) -> None:
    assert schema_differences(old_url) == []


def test_a_migration_that_fails_leaves_the_old_store(old_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade = STEPS[SCHEMA_VERSION]

    def breaks(operations: object) -> None:
        upgrade(operations)  # type: ignore[arg-type]
        raise OSError("no space left on device")

    monkeypatch.setitem(STEPS, SCHEMA_VERSION, breaks)
    with pytest.raises(OSError, match="no space"):
        JobStore(old_url)
    assert version(old_url) == 1
    monkeypatch.undo()
    test_an_old_store_comes_up_with_every_job(old_url)


def test_a_newer_schema_is_refused_and_left_alone(url: str) -> None:
    JobStore(url).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE moe_schema SET version = {SCHEMA_VERSION + 1}"))
    engine.dispose()
    with pytest.raises(InvalidInput, match=f"version {SCHEMA_VERSION}; this one has version {SCHEMA_VERSION + 1}"):
        JobStore(url)
    assert version(url) == SCHEMA_VERSION + 1
