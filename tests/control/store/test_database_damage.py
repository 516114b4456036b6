"""A store whose file is damaged, or was replaced while a process has it open: a one-line error, and no loss."""

import logging
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor, supervise
from llama_stack_provider_moe.control.supervisor.supervisor_keeper import SupervisorKeeper
from llama_stack_provider_moe.errors import InvalidInput, StoreReplaced
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.host_support import BODY, ask, serving_in_process
from tests.support.host_support import submit as taken_in
from tests.support.jobs_support import submit, wait_for


def path_of(config: ProviderConfig) -> Path:
    return config.state_dir / "jobs.db"


def sql(*statements: str) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        with closing(sqlite3.connect(path)) as database, database:
            for statement in statements:
                database.execute(statement)

    return run


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def broken_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "version 0": (sql("UPDATE moe_schema SET version = 0"), "should hold one version and holds 0"),
    "an empty version table": (sql("DELETE FROM moe_schema"), "should hold one version and holds none"),
    "two versions": (sql("INSERT INTO moe_schema VALUES (99)"), "should hold one version and holds "),
    "a version that is none": (
        sql("DROP TABLE moe_schema", "CREATE TABLE moe_schema (version TEXT)", "INSERT INTO moe_schema VALUES ('x')"),
        "should hold one version and holds 'x'",
    ),
    "no table of jobs": (sql("DROP TABLE moe_jobs"), "it has no table moe_jobs"),
    "no database": (garbage, "file is not a database"),
    "broken pages": (broken_pages, "malformed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_one_line_that_says_what_to_do(
    config: ProviderConfig, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    JobStore(config.url).close()
    spoil, said = DAMAGES[damage]
    for name in ("jobs.db-wal", "jobs.db-shm"):
        (config.state_dir / name).unlink(missing_ok=True)
    spoil(path_of(config))
    with pytest.raises(InvalidInput) as raised:
        JobStore(config.url)
    told = str(raised.value)
    assert told.startswith("store_url: ")
    assert said in told
    assert "put a backup in its place, or move it away" in told
    assert "\n" not in told
    caplog.set_level(logging.INFO)
    assert supervise(config) == 1, "a supervisor says the same, without a traceback"
    assert told in caplog.text
    assert "Traceback" not in caplog.text


def test_a_lease_without_its_row_is_free(config: ProviderConfig) -> None:
    JobStore(config.url).close()
    sql("DELETE FROM moe_supervisor")(path_of(config))
    store = JobStore(config.url)
    assert store.acquire_lease("me", 1, 30)
    store.close()


def deleted(config: ProviderConfig) -> None:
    for path in config.state_dir.glob("jobs.db*"):
        path.unlink()


def replaced(config: ProviderConfig) -> None:
    """Replace the file by a backup, as `cp` and `mv` do."""
    other = config.state_dir / "backup" / "jobs.db"
    JobStore(f"sqlite:///{other}").close()
    deleted(config)  # with its -wal, which SQLite would otherwise take for the new file's
    other.replace(path_of(config))


GONE = pytest.mark.parametrize(
    ("vanish", "said"), [(deleted, "was deleted"), (replaced, "was replaced by another file")],
    ids=["deleted", "replaced"],
)  # fmt: skip


@GONE
def test_nothing_is_written_into_a_file_that_is_gone(
    config: ProviderConfig, vanish: Callable[[ProviderConfig], None], said: str
) -> None:
    store = JobStore(config.url)
    submit(store, "job")
    assert store.answers()
    vanish(config)
    for act in (lambda: submit(store, "lost"), lambda: store.get("job", None), store.answers, store.has_work):
        with pytest.raises(StoreReplaced, match=said):
            act()
    store.close()
    again = JobStore(config.url)
    assert again.list(None) == [], "a restarted server has the file that is there"
    again.close()


@GONE
def test_a_supervisor_ends(
    config: ProviderConfig, vanish: Callable[[ProviderConfig], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = JobStore(config.url)
    supervisor = Supervisor(store, config.model_copy(update={
        "supervisor": config.supervisor.model_copy(update={"lease_s": 2.0, "idle_exit_s": 3600.0})
    }))  # fmt: skip
    assert supervisor.acquire()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(supervisor.run()))
    thread.start()
    vanish(config)
    thread.join(120)
    assert found == [False]
    # A connection that opens right after the deletion makes an empty file, which is another one.
    assert said in caplog.text or "was replaced by another file" in caplog.text
    store.close()


@GONE
def test_the_server_says_so(tmp_path: Path, vanish: Callable[[ProviderConfig], None], said: str) -> None:
    with serving_in_process(tmp_path) as service:
        assert ask(service, "GET", "/health").json()["status"] == "ok"
        job_id = taken_in(service)
        vanish(service.config)
        answer = ask(service, "GET", "/health")
        assert answer.status_code == 503
        told = answer.json()
        assert (told["status"], told["store"]) == ("error", "replaced")
        assert said in told["reason"]
        assert "restart the server" in told["reason"]
        for _ in range(2):  # before and after one has found it
            for method, path, more in (
                ("POST", "/jobs", {"json": BODY}), ("GET", "/jobs", {}), ("GET", f"/jobs/{job_id}/status", {}),
                ("GET", f"/jobs/{job_id}", {}), ("GET", f"/jobs/{job_id}/logs", {}),
                ("POST", f"/jobs/{job_id}/cancel", {}), ("DELETE", f"/jobs/{job_id}", {}),
            ):  # fmt: skip
                refused = ask(service, method, path, **more)
                assert refused.status_code == 503
                assert refused.json()["error"]["message"] == told["reason"], path
        assert path_of(service.config).exists() == (vanish is replaced), "no file is made in its place"


def test_the_supervisor_keeper_goes_on_looking(config: ProviderConfig, caplog: pytest.LogCaptureFixture) -> None:
    """The error must not end its thread: the server reports the problem until it is restarted."""
    store = JobStore(config.url)
    keeper = SupervisorKeeper(config.model_copy(update={
        "supervisor": config.supervisor.model_copy(update={"lease_s": 0.05})
    }), store)  # fmt: skip
    keeper.start()
    deleted(config)
    wait_for(lambda: caplog.text.count("was deleted") >= 2)
    keeper.ensure_alive()
    keeper.close()
    store.close()
