"""Laws of sweeps in the store: all jobs or none, at most so many at once, cancelled together, gone together."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llama_stack_provider_moe.control.store.outbox import Delivery
from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.control.store.sweep_rows import NewSweep
from llama_stack_provider_moe.errors import Conflict, LeaseLost, NotFound, OverLimit
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig
from tests.support.jobs_support import submit

NO_LIMITS = LimitsConfig()
PLAN = {"metric": "validation_loss", "direction": "minimize", "halving": None, "evaluations": 4}


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


def new_sweep(jobs: int = 4, max_parallel: int = 2, name: str = "sweep", owner: str = "ann", **more: Any) -> NewSweep:
    children = [
        (NewJob(f"{name}-{n}", owner, "sft", "some/model", f"/jobs/{name}-{n}", sweep=name, **more), {"lr": n})
        for n in range(jobs)
    ]
    return NewSweep(name, owner, max_parallel, PLAN, children)


def claimed(store: JobStore) -> list[str]:
    return [job.id for job in iter(lambda: store.claim("me"), None)]


def test_a_sweep_has_its_jobs_in_their_order(store: JobStore) -> None:
    jobs = store.sweeps.add(new_sweep(), NO_LIMITS)
    assert [job.id for job in jobs] == [f"sweep-{n}" for n in range(4)]
    found = store.sweeps.get("sweep", "ann")
    assert [(trial.job, trial.chosen) for trial in found.trials] == [(f"sweep-{n}", {"lr": n}) for n in range(4)]
    assert found.found.state is JobState.SCHEDULED
    assert found.found.counts == {JobState.SCHEDULED: 4}


def test_at_most_so_many_of_its_jobs_run_and_others_pass(store: JobStore) -> None:
    store.sweeps.add(new_sweep(max_parallel=2), NO_LIMITS)
    submit(store, "other")
    submit(store, "of-bob", "bob")
    assert claimed(store) == ["sweep-0", "of-bob", "sweep-1", "other"]
    store.move("sweep-1", JobState.FAILED)
    assert claimed(store) == ["sweep-2"]
    store.requeue("sweep-0", "killed")
    assert claimed(store) == ["sweep-0"], "a lost job comes first, and counts again"


def test_a_sweep_that_is_full_does_not_hold_gpus_back(store: JobStore) -> None:
    store.sweeps.add(new_sweep(max_parallel=1, gpus=1), NO_LIMITS)
    submit(store, "large", gpus=2)
    first = store.claim("me", ["0", "1"])
    assert first is not None
    assert first.id == "sweep-0"
    assert store.claim("me", ["0", "1"]) is None
    store.move("sweep-0", JobState.COMPLETED)
    second = store.claim("me", ["0", "1"])
    assert second is not None
    assert second.id == "large", "it waited with both GPUs kept, and the sweep's next job waits for it"


def test_a_sweep_is_inserted_as_a_whole_or_not_at_all(store: JobStore) -> None:
    submit(store, "sweep-2")
    with pytest.raises(Conflict, match="sweep 'sweep', or a job with its name and a number, exists already"):
        store.sweeps.add(new_sweep(), NO_LIMITS)
    with pytest.raises(OverLimit, match=r"you have 1 jobs that wait, .* allows 4 .*, so 3 are left, and 4 are needed"):
        store.sweeps.add(new_sweep(name="other"), LimitsConfig(waiting_jobs=4))
    assert [job.id for job in store.list(None)] == ["sweep-2"]
    assert store.sweeps.list(None, 10) == []
    assert len(store.sweeps.add(new_sweep(name="other"), LimitsConfig(waiting_jobs=5))) == 4


def test_each_owner_sees_their_own_in_exact_pages(store: JobStore) -> None:
    for number in range(5):
        store.sweeps.add(new_sweep(1, name=f"s{number}", owner="ann" if number % 2 else "bob"), NO_LIMITS)
    assert [each.sweep.id for each in store.sweeps.list("bob", 2)] == ["s4", "s2"]
    assert [each.sweep.id for each in store.sweeps.list("bob", 2, "s2")] == ["s0"]
    assert len(store.sweeps.list(None, 9)) == 5
    for look in (store.sweeps.get, store.sweeps.request_cancel):
        with pytest.raises(NotFound, match="sweep 's0' does not exist"):
            look("s0", "ann")
    with pytest.raises(NotFound, match="does not exist"):
        store.sweeps.list("ann", 2, "s0")


def test_cancelling_ends_what_waits_and_asks_what_runs(store: JobStore) -> None:
    notify = '{"url":"https://a.example/","events":["fine_tuning.job.cancelled"]}'
    store.sweeps.add(new_sweep(notify=notify), NO_LIMITS)
    assert claimed(store) == ["sweep-0", "sweep-1"]
    store.move("sweep-1", JobState.COMPLETED)
    found = store.sweeps.request_cancel("sweep", "ann")
    assert found.found.state is JobState.IN_PROGRESS
    states = {name: (job.state.value, job.cancel_requested_at is not None) for name, job in found.jobs.items()}
    assert states == {
        "sweep-0": ("in_progress", True), "sweep-1": ("completed", False),
        "sweep-2": ("cancelled", True), "sweep-3": ("cancelled", True),
    }  # fmt: skip
    assert claimed(store) == []
    assert [store.outbox.of(name)[0].state for name in ("sweep-2", "sweep-3")] == [Delivery.WAITING] * 2
    store.move("sweep-0", JobState.CANCELLED)
    again = store.sweeps.request_cancel("sweep", "ann")
    assert again.found.state is JobState.CANCELLED
    assert [len(store.outbox.of(f"sweep-{n}")) for n in range(4)] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("ends", "state"),
    [
        ((JobState.COMPLETED, JobState.FAILED), JobState.COMPLETED),
        ((JobState.FAILED, JobState.FAILED), JobState.FAILED),
        ((JobState.FAILED, JobState.CANCELLED), JobState.FAILED),
        ((JobState.CANCELLED, JobState.CANCELLED), JobState.CANCELLED),
    ],
)
def test_the_state_follows_from_the_jobs(store: JobStore, ends: tuple[JobState, ...], state: JobState) -> None:
    store.sweeps.add(new_sweep(2), NO_LIMITS)
    assert len(claimed(store)) == 2
    store.move("sweep-0", ends[0])
    assert store.sweeps.get("sweep", None).found.state is JobState.IN_PROGRESS
    store.move("sweep-1", ends[1])
    assert store.sweeps.get("sweep", None).found.state is state


def test_a_sweep_goes_with_its_last_job(store: JobStore) -> None:
    store.sweeps.add(new_sweep(2), NO_LIMITS)
    store.sweeps.request_cancel("sweep", None)
    store.delete("sweep-0", "ann")
    assert [trial.job for trial in store.sweeps.get("sweep", "ann").trials] == ["sweep-1"]
    store.delete("sweep-1", "ann")
    with pytest.raises(NotFound):
        store.sweeps.get("sweep", "ann")
    store.sweeps.add(new_sweep(2), NO_LIMITS)


# Figures.


def figures(store: JobStore, job_id: str) -> list[tuple[int, int, float | None]]:
    (trial,) = [each for each in store.sweeps.get("sweep", None).trials if each.job == job_id]
    return [(each.number, each.step, each.value) for each in trial.figures]


@pytest.fixture
def running(store: JobStore) -> JobStore:
    """A store with a supervisor `me` and a sweep of two jobs that run."""
    assert store.acquire_lease("me", 1, 60)
    store.sweeps.add(new_sweep(2), NO_LIMITS)
    assert len(claimed(store)) == 2
    return store


def test_figures_are_numbered_and_a_step_counts_once(running: JobStore) -> None:
    job = running.get("sweep-0", None)
    running.sweeps.record("me", job, [(5, 2.0), (10, None)], False, None)
    running.sweeps.record("me", job, [(5, 9.0), (10, 9.0), (15, 1.0)], False, None)
    assert figures(running, "sweep-0") == [(1, 5, 2.0), (2, 10, None), (3, 15, 1.0)]
    with pytest.raises(LeaseLost):
        running.sweeps.record("another", job, [(20, 1.0)], False, None)


def test_work_is_left_until_the_figures_of_an_ended_job_are_read(running: JobStore) -> None:
    for name in ("sweep-0", "sweep-1"):
        running.move(name, JobState.COMPLETED)
    assert [job.id for job, _ in running.sweeps.unread()] == ["sweep-0", "sweep-1"]
    assert running.has_work(), "or a supervisor that died here would leave the sweep without its last figures"
    assert not running.release_lease("me", only_if_idle=True)
    for name in ("sweep-0", "sweep-1"):
        running.sweeps.record("me", running.get(name, None), [(5, 1.0)], True, None)
    assert running.sweeps.unread() == []
    assert running.release_lease("me", only_if_idle=True)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_one_message_tells_of_the_end_of_a_whole_sweep(store: JobStore, direction: str) -> None:
    """After the last job that ended, whichever that is, with the best of those that completed."""
    assert store.acquire_lease("me", 1, 60)
    plan = PLAN | {"notify": {"url": "https://hooks.example.com/moe"}, "direction": direction}
    store.sweeps.add(new_sweep(4, max_parallel=4)._replace(plan=plan), NO_LIMITS)
    names = claimed(store)
    ends = (JobState.COMPLETED, JobState.FAILED, JobState.COMPLETED, JobState.CANCELLED)
    found = (1.5, 0.1, 1.25, 9.0)
    for at in (3, 1, 0, 2):
        assert [message for name in names for message in store.outbox.of(name)] == []
        store.move(names[at], ends[at])
        assert store.sweeps.record("me", store.get(names[at], None), [(5, found[at])], True, None) is None
    (message,) = store.outbox.of(names[2])
    assert (message.url, message.event, message.state) == (
        "https://hooks.example.com/moe", "moe.sweep.ended", Delivery.WAITING,
    )  # fmt: skip
    best = 2 if direction == "minimize" else 0
    assert json.loads(message.body)["data"] == {
        "sweep_uuid": "sweep", "status": "completed", "metric": "validation_loss",
        "jobs": {"completed": 2, "failed": 1, "cancelled": 1},
        "best": {"job_uuid": names[best], "chosen": {"lr": best}, "figure": found[best]},
    }  # fmt: skip
    assert store.has_work(), "the supervisor stays until it is delivered"


def test_a_sweep_that_is_cancelled_before_it_began_is_told_of_too(store: JobStore) -> None:
    assert store.acquire_lease("me", 1, 60)
    plan = PLAN | {"notify": {"url": "https://hooks.example.com/moe"}}
    store.sweeps.add(new_sweep(2)._replace(plan=plan), NO_LIMITS)
    store.sweeps.request_cancel("sweep", None)
    for job, _ in store.sweeps.unread():
        store.sweeps.record("me", job, [], True, None)
    (message,) = store.outbox.of("sweep-1")
    told = json.loads(message.body)["data"]
    assert (told["status"], told["best"], told["jobs"]) == ("cancelled", None, {"cancelled": 2})


def test_a_resumed_job_is_read_again(running: JobStore) -> None:
    running.move("sweep-0", JobState.FAILED)
    running.sweeps.record("me", running.get("sweep-0", None), [], True, None)
    assert [job.id for job, _ in running.sweeps.unread()] == ["sweep-1"]
    running.resume("sweep-0", None)
    assert claimed(running) == ["sweep-0"]
    assert [job.id for job, _ in running.sweeps.unread()] == ["sweep-0", "sweep-1"]


def test_a_job_that_is_ended_early_is_asked_once_and_says_why(running: JobStore) -> None:
    job = running.get("sweep-0", None)

    def ends(trials: list[Any], mine: Any) -> tuple[bool, dict[str, Any]]:
        assert [trial.job for trial in trials] == ["sweep-0", "sweep-1"]
        return mine.figures[-1].number == 2, {"seen": mine.figures[-1].number}

    assert running.sweeps.record("me", job, [(5, 2.0), (10, 3.0), (15, 4.0)], False, ends) == 2
    assert figures(running, "sweep-0") == [(1, 5, 2.0), (2, 10, 3.0), (3, 15, 4.0)]
    assert running.get("sweep-0", None).cancel_requested_at is not None
    assert running.sweeps.record("me", job, [(20, 4.0)], False, ends) is None, "it has been asked"
    (trial, _) = running.sweeps.get("sweep", None).trials
    assert (trial.pruned_at, trial.pruner_state) == (2, {"seen": 2})
    end = running.move("sweep-0", JobState.CANCELLED, "cancelled at step 16, after saving a checkpoint")
    assert end.reason == (
        "its sweep sweep ended it after evaluation 2, because other jobs did better; cancelled at step 16, after "
        "saving a checkpoint"
    )
