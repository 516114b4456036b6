"""A supervisor runs sweeps: at most so many jobs at once, early ending by Optuna's pruner, kills in between."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from llama_stack_provider_moe.control.server.sweep_views import detail
from llama_stack_provider_moe.control.server.wire_sweeps import Sweep
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.store.sweep_rows import SweepRow
from llama_stack_provider_moe.control.store.trial_rows import Trial, TrialFigure
from llama_stack_provider_moe.control.supervisor import pruner as pruner_module
from llama_stack_provider_moe.control.supervisor import supervisor as supervisor_module
from llama_stack_provider_moe.control.supervisor.pruner import Pruner
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.sweeps import Halving
from tests.support.jobs_support import job_folders, new_supervisor, run_until_idle, tiny_config, wait_for
from tests.support.tiny_sweeps import add_sweep

HALVING = Halving(reduction_factor=2)


@pytest.fixture
def folder() -> Iterator[Path]:
    with job_folders() as folder:
        yield folder


def opened(folder: Path, jobs_at_once: int = 8) -> tuple[JobStore, ProviderConfig]:
    config = tiny_config(folder, max_concurrent_jobs=jobs_at_once)
    return JobStore(config.url), config


def seen(store: JobStore) -> Sweep:
    return detail(store.sweeps.get("sweep", "ann"))


def test_jobs_run_at_most_so_many_at_once_and_are_ranked(folder: Path) -> None:
    store, config = opened(folder)
    names = add_sweep(store, config, [[3.0, 2.5], [3.0, 1.5], [3.0, float("nan")], [3.0, 2.0]], max_parallel=2)
    supervisor, most = new_supervisor(store, config), 0
    while supervisor.step():
        most = max(most, len(store.running()))
        time.sleep(0.005)
    found = seen(store)
    assert most == 2
    assert (found.status, found.jobs) == (JobState.COMPLETED, {JobState.COMPLETED: 4})
    assert [(job.rank, job.job_uuid, job.figure, job.step) for job in found.data[:3]] == [
        (1, names[1], 1.5, 2), (2, names[3], 2.0, 2), (3, names[0], 2.5, 2)
    ]  # fmt: skip
    assert (found.data[3].rank, found.data[3].job_uuid) == (None, names[2])
    assert found.best == names[1]
    assert store.sweeps.unread() == []
    store.close()


def test_jobs_that_do_worse_end_early_with_a_checkpoint(folder: Path) -> None:
    store, config = opened(folder)
    figures = [[float(10 * n + step) for step in range(8)] for n in (1, 2, 3, 4)]
    names = add_sweep(store, config, figures, max_parallel=1, halving=HALVING, step_s=0.1)
    run_until_idle(new_supervisor(store, config))
    found = seen(store)
    assert [job.job_uuid for job in found.data] == names, "the first job is the best, and goes on to its end"
    first, *others = found.data
    assert (first.status, first.evaluations, first.ended_early) == (JobState.COMPLETED, 8, False)
    for job in others:
        assert (job.status, job.ended_early) == (JobState.CANCELLED, True)
        assert job.evaluations < 8
        assert job.reason is not None
        assert "its sweep sweep ended it after evaluation 1, because other jobs did better" in job.reason
        assert "after saving a checkpoint" in job.reason
    assert found.best == names[0]
    assert found.status is JobState.COMPLETED
    store.close()


def test_of_rewards_the_smaller_ones_end_early(folder: Path) -> None:
    store, config = opened(folder)
    figures = [[0.9] * 8, [0.3, *[0.4] * 7]]
    names = add_sweep(
        store, config, figures, max_parallel=1, halving=HALVING, step_s=0.1, metric="reward", direction="maximize"
    )
    run_until_idle(new_supervisor(store, config))
    found = seen(store)
    assert [(job.job_uuid, job.figure, job.ended_early) for job in found.data] == [
        (names[0], 0.9, False), (names[1], 0.3, True)
    ]  # fmt: skip
    assert found.best == names[0]
    store.close()


def test_a_job_that_its_sweep_ended_can_be_resumed_and_is_not_ended_again(folder: Path) -> None:
    store, config = opened(folder)
    figures = [[1.0] * 6, [2.0] * 6]
    first, second = add_sweep(store, config, figures, max_parallel=1, halving=HALVING, step_s=0.1)
    supervisor = new_supervisor(store, config)
    run_until_idle(supervisor)
    assert store.get(second, None).state is JobState.CANCELLED
    store.resume(second, "ann")
    store.request_cancel(second, "ann")
    assert store.get(second, None).reason == "cancelled while it waited to resume"
    store.resume(second, "ann")
    run_until_idle(supervisor)
    assert store.get(second, None).state is JobState.COMPLETED
    found = {job.job_uuid: job for job in seen(store).data}
    assert (found[second].evaluations, found[second].ended_early) == (6, False)
    assert found[first].rank == 1
    store.close()


class Victim:
    """A supervisor process that can be killed at any moment."""

    def __init__(self, config: ProviderConfig) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", supervisor_module.__name__], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None
        self._process.stdin.write(config.model_dump_json().encode())
        self._process.stdin.close()

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def leave(self) -> None:
        self._process.terminate()
        assert self._process.wait(60) == 0


def test_of_eight_jobs_on_two_nothing_is_lost_when_supervisors_are_killed(folder: Path) -> None:
    """Jobs are started once each, whatever happens to the supervisor; the ranking is that of the final figures."""
    store, config = opened(folder, jobs_at_once=2)
    finals = [4.0, 8.0, 1.0, 6.0, 2.0, 7.0, 3.0, 5.0]
    names = add_sweep(store, config, [[9.0, 9.0, final] for final in finals], max_parallel=2, step_s=0.4)
    for ended in (1, 3, 5):
        victim = Victim(config)
        wait_for(lambda ended=ended: sum(job.state.ended for job in store.list(None)) >= ended)  # type: ignore[misc]
        victim.kill()
    last = Victim(config)
    wait_for(lambda: all(job.state.ended for job in store.list(None)) and not store.sweeps.unread())
    last.leave()
    found = seen(store)
    assert [job.job_uuid for job in found.data] == [names[place] for place in (2, 4, 6, 0, 7, 3, 5, 1)]
    assert [job.figure for job in found.data] == sorted(finals)
    assert found.jobs == {JobState.COMPLETED: 8}
    launches = [len((config.jobs_dir / name / "launches").read_text().splitlines()) for name in names]
    assert launches == [1] * 8, "children outlive their supervisor and are adopted"
    store.close()


def test_figures_of_jobs_that_ended_while_nobody_looked_are_read_by_the_next_supervisor(folder: Path) -> None:
    store, config = opened(folder)
    (name,) = add_sweep(store, config, [[3.0, 2.0]])
    supervisor = new_supervisor(store, config)
    supervisor._sweeps.look = lambda: None  # type: ignore[method-assign]  # as if it died before it looked
    run_until_idle(supervisor)
    assert store.get(name, None).state is JobState.COMPLETED
    assert seen(store).data[0].rank is None
    assert store.has_work(), "so a server starts another supervisor"
    run_until_idle(new_supervisor(store, config))
    assert seen(store).data[0].figure == 2.0
    assert not store.has_work()
    store.close()


# The pruner: its decisions are those of Optuna in one study that was never interrupted.


def decisions_of_optuna(values: list[list[float]], order: list[tuple[int, int]], asked: Halving) -> list[bool]:
    """What Optuna decides when the jobs report in this order: (job, evaluation)."""
    pruner: optuna.pruners.BasePruner = optuna.pruners.SuccessiveHalvingPruner(1, asked.reduction_factor)
    if asked.pruner == "hyperband":
        pruner = optuna.pruners.HyperbandPruner(1, len(values[0]), asked.reduction_factor)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name="sweep", pruner=pruner)
    trials = [study.ask() for _ in values]
    found = []
    for job, number in order:
        trials[job].report(values[job][number - 1], number)
        found.append(trials[job].should_prune())
    return found


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
@pytest.mark.parametrize("factor", [2, 3])
def test_decisions_are_those_of_an_uninterrupted_study(pruner: str, factor: int) -> None:
    asked = Halving.model_validate({"pruner": pruner, "reduction_factor": factor})
    values = [[10.0 - ((3 * job + 2) % 7) - 0.1 * number for number in range(1, 10)] for job in range(6)]
    # Two at a time: evaluations of neighbours alternate.
    order = [
        (job, number)
        for pair in itertools.batched(range(6), 2)
        for number in range(1, 9)  # after the last one, nothing is decided
        for job in pair
    ]
    sweep = SweepRow("sweep", "ann", now(), None, 2, {"direction": "minimize"})
    state: dict[int, dict[str, object]] = {job: {} for job in range(6)}
    reported: dict[int, list[TrialFigure]] = {job: [] for job in range(6)}
    ours = []
    for job, number in order:
        reported[job].append(TrialFigure(number, 5 * number, values[job][number - 1]))
        trials = [Trial(f"j{n}", "sweep", n, {}, None, state[n], tuple(reported[n])) for n in range(6)]
        # A new pruner each time, as after a restart.
        ends, state[job] = Pruner(sweep, asked, 9).decide(trials, trials[job])
        ours.append(ends)
    assert ours == decisions_of_optuna(values, order, asked)
    assert any(ours)
    assert not all(ours)


def test_a_deleted_job_does_not_change_the_numbers_of_the_others() -> None:
    sweep = SweepRow("sweep", "ann", now(), None, 2, {"direction": "maximize"})
    kept = Trial("j2", "sweep", 2, {}, None, {}, (TrialFigure(1, 5, 1.0),))
    better = Trial("j1", "sweep", 1, {}, None, {"completed_rung_0": 2.0}, (TrialFigure(1, 5, 2.0),))
    assert Pruner(sweep, HALVING, 9).decide([better, kept], kept) == (True, {"completed_rung_0": 1.0})


def test_without_optuna_jobs_run_to_their_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_stack_provider_moe.control.supervisor import sweep_watch

    monkeypatch.setattr(sweep_watch, "is_installed", lambda: False)
    store, config = opened(folder)
    add_sweep(store, config, [[1.0] * 3, [2.0] * 3], max_parallel=1, halving=HALVING)
    run_until_idle(new_supervisor(store, config))
    assert seen(store).jobs == {JobState.COMPLETED: 2}
    assert pruner_module.is_installed()
    store.close()
