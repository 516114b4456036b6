"""Laws for files and rows that belong together when the store fails: nothing is lost or incomplete."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from llama_stack_provider_moe.control.store.intake import accept_job, results_in
from llama_stack_provider_moe.control.store.state_folder import claim_state_folder
from llama_stack_provider_moe.control.store.state_layout import STORE_FILE
from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.control.supervisor.removal import remove, restore
from llama_stack_provider_moe.control.supervisor.supervisor import supervise
from llama_stack_provider_moe.errors import Conflict, InvalidInput, NotFound
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.host_support import ask, folder_of, serving_in_process, submit
from tests.support.jobs_support import new_job, tiny_config


@pytest.fixture
def shared(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


def failing_commits(store: JobStore, monkeypatch: pytest.MonkeyPatch, happens: bool, times: int = 1) -> None:
    """Make the next commits fail, whether or not they have happened."""
    dialect, left = store._writing.dialect, iter(range(times))
    commit = dialect.do_commit

    def fails(connection: Any) -> None:
        if next(left, None) is None:
            commit(connection)
            return
        if happens:
            commit(connection)
        if dialect.name == "sqlite":
            raise sqlite3.OperationalError("disk I/O error")
        connection.driver_connection.close()
        raise dialect.loaded_dbapi.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", fails)


def staged(root: Path) -> tuple[NewJob, Path]:
    """A job that is about to be submitted."""
    folder = root / "staging" / "one"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("rows")
    (root / "jobs").mkdir()
    return NewJob("job", "ann", "sft", "some/model", str(root / "jobs" / "job")), folder


def test_a_commit_whose_answer_is_lost_leaves_a_job_with_its_folder(
    shared: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, folder = staged(root)
    failing_commits(shared, monkeypatch, happens=True)
    assert accept_job(shared, new, folder).id == "job"
    assert shared.get("job", "ann").state is JobState.SCHEDULED
    assert (Path(new.folder) / "data" / "train.jsonl").read_text() == "rows"


def test_a_commit_that_did_not_happen_is_tried_again_where_it_could_not_be_told(
    shared: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, folder = staged(root)
    failing_commits(shared, monkeypatch, happens=False)
    if shared.is_embedded:
        with pytest.raises(OperationalError):
            accept_job(shared, new, folder)
        assert shared.list(None) == []
        assert not Path(new.folder).exists()
    else:
        assert accept_job(shared, new, folder).id == "job"
        assert (Path(new.folder) / "data").is_dir()


def test_a_folder_stays_where_nobody_can_tell_whether_the_store_took_the_job(
    shared: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, folder = staged(root)
    failing_commits(shared, monkeypatch, happens=True, times=9)

    def lost(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("the database is down"))

    monkeypatch.setattr(shared, "get", lost)
    with pytest.raises(OperationalError):
        accept_job(shared, new, folder)
    monkeypatch.undo()
    assert shared.get("job", "ann").folder == new.folder
    assert (Path(new.folder) / "data" / "train.jsonl").read_text() == "rows"


def test_a_job_that_the_store_refuses_leaves_no_folder(shared: JobStore, root: Path) -> None:
    new, folder = staged(root)
    shared.submit("job", "bob", "sft", "some/model", "/elsewhere/job")
    with pytest.raises(Conflict, match="exists already"):
        accept_job(shared, new, folder)
    assert not Path(new.folder).exists()
    assert shared.get("job", None).owner == "bob"


@pytest.mark.parametrize("left", ["events.jsonl", "manifest.json", "artifacts", "checkpoints", "output.log"])
def test_results_that_no_row_tells_of_are_never_deleted(tmp_path: Path, left: str) -> None:
    with serving_in_process(tmp_path) as service:
        folder = folder_of(service, "mine").root
        if "." in left:
            folder.mkdir()
            (folder / left).write_text("a week of training")
        else:
            (folder / left).mkdir(parents=True)
        answer = ask(service, "POST", "/jobs", json={**JOB, "job_uuid": "mine"})
        assert answer.status_code == 409
        told = answer.json()["error"]["message"]
        assert f"{folder} exists and contains {left} of a job that is not in this server's store" in told
        assert results_in(folder) == [left]
        assert list((service.config.state_dir / "staging").iterdir()) == []
        with pytest.raises(NotFound):
            service.store.get("mine", None)


JOB = {"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "good"}}


def test_a_folder_without_results_is_set_aside(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as service:
        folder = folder_of(service, "mine").root
        folder.mkdir()
        (folder / "spec.json").write_text("of a server that died")
        assert submit(service, job_uuid="mine") == "mine"
        (aside,) = (service.config.state_dir / "set-aside").iterdir()
        assert (aside / "spec.json").read_text() == "of a server that died"


# Deletion.


def cancelled(store: JobStore, config: ProviderConfig, job_id: str) -> Path:
    folder = new_job(store, config, job_id)
    (folder / "manifest.json").write_text("a week of training")
    store.request_cancel(job_id, None)
    return folder


@pytest.fixture
def on(url: str, root: Path) -> Iterator[tuple[JobStore, ProviderConfig]]:
    config = tiny_config(root).model_copy(update={"store_url": url})
    store = JobStore(url)
    yield store, config
    store.close()


def test_a_deletion_that_the_store_did_not_take_leaves_the_job_its_files(
    on: tuple[JobStore, ProviderConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = on
    folder = cancelled(store, config, "job")
    with monkeypatch.context() as during:
        failing_commits(store, during, happens=False)
        with pytest.raises(OperationalError):
            remove(store, config, "job", None)
    assert store.get("job", None).state is JobState.CANCELLED
    assert (folder / "manifest.json").read_text() == "a week of training"
    remove(store, config, "job", None)
    assert not folder.exists()


def test_a_deletion_whose_answer_is_lost_is_done(
    on: tuple[JobStore, ProviderConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = on
    folder = cancelled(store, config, "job")
    failing_commits(store, monkeypatch, happens=True)
    assert remove(store, config, "job", None).job.id == "job"
    assert store.list(None) == []
    assert not folder.exists()
    assert list((config.state_dir / "deleted").iterdir()) == []


@pytest.mark.parametrize("by", ["the next deletion", "a start"])
def test_a_power_cut_amid_a_deletion_costs_a_job_that_stays_nothing(store: JobStore, root: Path, by: str) -> None:
    config = tiny_config(root)
    folder, other = cancelled(store, config, "job"), cancelled(store, config, "other")
    (root / "deleted").mkdir()
    folder.rename(root / "deleted" / "job.0123")
    if by == "a start":
        restore(store, config)
        assert other.is_dir()
    else:
        remove(store, config, "other", None)
    assert (folder / "manifest.json").read_text() == "a week of training"
    assert list((root / "deleted").iterdir()) == []


def test_a_second_folder_that_can_not_be_moved_brings_the_first_one_back(
    store: JobStore, config: ProviderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = new_job(store, config, "parent")
    store.move("parent", JobState.IN_PROGRESS)
    store.move("parent", JobState.COMPLETED)
    export = config.jobs_dir / "export"
    export.mkdir()
    store.add(NewJob("export", "ann", "export", "some/model", str(export), 0, "parent"))
    store.request_cancel("export", None)
    rename = Path.rename

    def stuck(path: Path, target: Path) -> Path:
        if path == parent:
            raise OSError("a stale file handle")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stuck)
    with pytest.raises(OSError, match="stale"):
        remove(store, config, "parent", None)
    assert export.is_dir()
    assert {job.id for job in store.list(None)} == {"parent", "export"}


# Whose state folder it is.


def test_a_state_folder_names_its_store(root: Path, new_postgres_url: Callable[[], str]) -> None:
    config = tiny_config(root)
    first = JobStore(config.url)
    claim_state_folder(config, first)  # a folder of a version before: it takes the first store that comes
    claim_state_folder(config, first)
    assert (root / STORE_FILE).read_text().strip() == first.identity()
    url = new_postgres_url()
    elsewhere = config.model_copy(update={"store_url": url})
    second = JobStore(url)
    with pytest.raises(InvalidInput) as refused:
        claim_state_folder(elsewhere, second)
    told = str(refused.value)
    assert told.startswith(f"state_dir: '{root}' is not valid; expected a folder of the store postgresql")
    assert f"has the jobs of another store, {first.identity()}. Set store_url" in told
    assert f"delete {root / STORE_FILE}" in told
    assert supervise(elsewhere) == 1, "a supervisor says the same, without a traceback"
    first.close()
    second.close()


def test_a_server_refuses_another_stores_folder_and_follows_a_store_that_moves(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as service:
        mine = service.config.state_dir
    new = f"sqlite:///{tmp_path}/new.db"
    with (
        pytest.raises(InvalidInput, match="has the jobs of another store"),
        serving_in_process(tmp_path, store_url=new),
    ):
        pass
    shutil.copy(mine / "jobs.db", tmp_path / "moved.db")
    with serving_in_process(tmp_path, store_url=f"sqlite:///{tmp_path}/moved.db") as service:
        assert service.store.list(None) == []
