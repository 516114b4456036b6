"""Laws of deletion: a job is deleted with its folder and nothing else, whatever happens in between."""

from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.removal import Retention, remove
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import new_job, tiny_config


def test_jobs_that_ended_long_ago_go_with_their_folders_and_others_stay(store: JobStore, root: Path) -> None:
    config = tiny_config(root, retention_days=1e-9, idle_exit_s=0)
    elsewhere = root / "checkpoints-elsewhere" / "old"
    elsewhere.mkdir(parents=True)
    for job_id in ("old", "older", "waits"):
        folder = new_job(store, config, job_id)
        (folder / "checkpoints").symlink_to(elsewhere.parent)
    for job_id in ("old", "older"):
        store.request_cancel(job_id, None)
    foreign = root / "foreign"
    foreign.mkdir()
    store.submit("foreign", "ann", "sft", "m", str(foreign))
    store.request_cancel("foreign", None)
    assert Retention(store, config).remove_older() == ["old", "older"]
    assert {job.id for job in store.list(None)} == {"waits", "foreign"}
    assert [path.name for path in config.jobs_dir.iterdir()] == ["waits"]
    assert elsewhere.is_dir()
    assert foreign.is_dir()
    assert [*(root / "deleted").iterdir()] == []
    assert Retention(store, tiny_config(root)).remove_older() == [], "kept for ever unless told otherwise"


def test_a_deletion_that_was_cut_short_is_finished_by_the_next(
    store: JobStore, config: ProviderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job_id in ("first", "second"):
        new_job(store, config, job_id)
        store.request_cancel(job_id, None)

    class PowerCut(BaseException):
        pass

    def cut(*_: object, **__: object) -> None:
        raise PowerCut

    with monkeypatch.context() as during:
        during.setattr("llama_stack_provider_moe.control.supervisor.removal.shutil.rmtree", cut)
        with pytest.raises(PowerCut):
            remove(store, config, "first", "ann")
    with pytest.raises(NotFound):
        store.get("first", None)
    with monkeypatch.context() as during:
        during.setattr(store, "delete", lambda *_, first, force: (first(store.get("second", None)), cut()))
        with pytest.raises(PowerCut):
            remove(store, config, "second", "ann")
    assert store.get("second", None).state is JobState.CANCELLED
    remove(store, config, "second", "ann")
    assert store.list(None) == []
    assert [*config.jobs_dir.iterdir()] == []
    assert [*(config.state_dir / "deleted").iterdir()] == []


def test_a_supervisor_deletes_what_is_old(store: JobStore, root: Path) -> None:
    config = tiny_config(root, retention_days=1e-9, idle_exit_s=0)
    new_job(store, config, "old")
    store.request_cancel("old", None)
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    assert supervisor.run()
    assert store.list(None) == []


def test_a_job_that_was_resumed_since_it_was_looked_at_is_not_deleted_for_its_age(
    store: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens if the supervisor was suspended in between."""
    config = tiny_config(root, retention_days=1e-9)
    folder = new_job(store, config, "job")
    store.request_cancel("job", None)
    ended_before = store.ended_before

    def suspended(*arguments: object, **named: object) -> object:
        found = ended_before(*arguments, **named)  # type: ignore[arg-type]
        if found:
            store.resume("job", None)
            store.request_cancel("job", None)
        return found

    monkeypatch.setattr(store, "ended_before", suspended)
    assert Retention(store, config).remove_older() == []
    assert folder.is_dir()
    monkeypatch.undo()
    assert Retention(store, config).remove_older() == ["job"]


def test_a_folder_that_can_not_be_deleted_keeps_a_supervisor_from_nothing(
    store: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(root, retention_days=1e-9, idle_exit_s=0)
    for job_id in ("stuck", "old"):
        new_job(store, config, job_id)
        store.request_cancel(job_id, None)
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == "stuck":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    retention = Retention(store, config)
    assert retention.remove_older() == ["old"]
    retention.look()
    assert [job.id for job in store.list(None)] == ["stuck"]


def test_what_was_set_aside_with_a_damaged_attempt_stays(store: JobStore, config: ProviderConfig) -> None:
    for job_id in ("first", "second"):
        new_job(store, config, job_id)
        store.request_cancel(job_id, None)
    grave = config.state_dir / "deleted" / "first.0"
    grave.parent.mkdir()
    (config.jobs_dir / "first").rename(grave)
    (grave / "attempt.json").write_text("{")
    remove(store, config, "second", "ann")
    assert grave.is_dir(), "it may be all that the job has"
    remove(store, config, "first", "ann")
    assert [*grave.parent.iterdir()] == []
