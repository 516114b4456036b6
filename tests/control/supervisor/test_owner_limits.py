"""The supervisor respects what each owner may use."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from llama_stack_provider_moe.control.store.schema import gpu_use_table
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import new_job, wait_for


def supervisor_of(store: JobStore, config: ProviderConfig, limits: LimitsConfig, **settings: Any) -> Supervisor:
    several = config.supervisor.model_copy(update={"max_concurrent_jobs": 3, **settings})
    made = Supervisor(store, config.model_copy(update={"limits": limits, "supervisor": several}))
    assert made.acquire()
    return made


def test_more_jobs_than_an_owner_may_run_wait(store: JobStore, config: ProviderConfig) -> None:
    supervisor = supervisor_of(store, config, LimitsConfig(running_jobs=1))
    for job_id in ("first", "second"):
        new_job(store, config, job_id, steps=1000, step_s=0.05)
    supervisor.step()
    supervisor.step()
    assert [job.id for job in store.running()] == ["first"]
    store.request_cancel("first", None)

    def second_runs() -> bool:
        supervisor.step()
        return [job.id for job in store.running()] == ["second"]

    wait_for(second_runs)
    store.request_cancel("second", None)
    wait_for(lambda: not supervisor.step())


def test_a_job_starts_once_gpu_hours_are_free_although_nobody_writes_to_the_store(
    store: JobStore, config: ProviderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle supervisor looks at a store again only when something was written to it."""
    supervisor = supervisor_of(store, config, LimitsConfig(gpu_hours_per_day=1), devices=["0"])
    new_job(store, config, "before", gpus=1, steps=1)
    wait_for(lambda: supervisor.step() or store.get("before", None).state is JobState.COMPLETED)
    wait_for(lambda: not supervisor.step())
    used_until = store.use_of("ann").at
    with store._writing.begin() as connection:
        connection.execute(
            update(gpu_use_table).values(started_at=used_until - timedelta(hours=2), ended_at=used_until)
        )
    new_job(store, config, "waits", gpus=1, steps=1)
    for _ in range(3):
        assert not supervisor.step()
    assert store.get("waits", None).state is JobState.SCHEDULED
    monkeypatch.setattr(store, "has_changed", lambda: False)
    monkeypatch.setattr("llama_stack_provider_moe.control.store.limits.DAY", timedelta(0))
    supervisor.step()
    assert store.get("waits", None).state is not JobState.SCHEDULED
    wait_for(lambda: not supervisor.step())
