"""Laws of deletion: a job goes with its folder and nothing else, whatever happens in between."""

from pathlib import Path

import pytest

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.jobs.removal import remove, remove_older
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import JobStore
from llama_stack_provider_moe.jobs.supervisor import Supervisor
from tests.jobs_support import new_job, tiny_config


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
    assert remove_older(store, config) == ["old", "older"]
    assert {job.id for job in store.list(None)} == {"waits", "foreign"}
    assert [path.name for path in config.jobs_dir.iterdir()] == ["waits"]
    assert elsewhere.is_dir()
    assert foreign.is_dir()
    assert [*(root / "deleted").iterdir()] == []
    assert remove_older(store, tiny_config(root)) == [], "kept for ever unless told otherwise"


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
        during.setattr("llama_stack_provider_moe.jobs.removal.shutil.rmtree", cut)
        with pytest.raises(PowerCut):
            remove(store, config, "first", "ann")
    with pytest.raises(NotFound):
        store.get("first", None)
    with monkeypatch.context() as during:
        during.setattr(store, "delete", lambda *_, first: (first(store.get("second", None)), cut()))
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
