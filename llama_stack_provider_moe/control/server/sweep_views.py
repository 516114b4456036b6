"""Builds the API's answers about sweeps from what the store has of them; no file is read."""

import math

from llama_stack_provider_moe.control.server.wire import JsonObject
from llama_stack_provider_moe.control.server.wire_sweeps import ListSweepsResponse, Sweep, SweepJob, SweepLine
from llama_stack_provider_moe.control.store import sweep_ranking
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.store.sweep_rows import SweepDetail, SweepState
from llama_stack_provider_moe.control.store.trial_rows import Trial
from llama_stack_provider_moe.jobdir.state import JobState


def page(store: JobStore, whose: str | None, limit: int, after: str | None) -> ListSweepsResponse:
    """Return a page of sweeps, newest first.

    Args:
        store: the store.
        whose: the owner of the sweeps; None for all owners.
        limit: largest number of sweeps.
        after: the last sweep of the previous page.
    """
    found = store.sweeps.list(whose, limit + 1, after)
    return ListSweepsResponse(data=[line(each) for each in found[:limit]], has_more=len(found) > limit)


def line(found: SweepState) -> SweepLine:
    """Return a sweep as an entry of a list."""
    return SweepLine.model_validate(_line(found))


def detail(found: SweepDetail) -> Sweep:
    """Return a sweep with its jobs, ranked."""
    plan = found.found.sweep.plan
    jobs = ranked(found)
    best = next((each for each in jobs if each.rank is not None and each.status is JobState.COMPLETED), None)
    return Sweep.model_validate(
        _line(found.found)
        | {name: plan[name] for name in ("parameters", "random", "seed", "halving")}
        | {"data": jobs, "best": None if best is None else best.job_uuid}
    )


def _line(found: SweepState) -> JsonObject:
    sweep = found.sweep
    return {
        "sweep_uuid": sweep.id,
        "status": found.state,
        "owner": sweep.owner,
        "created_at": sweep.created_at,
        "cancel_requested_at": sweep.cancel_requested_at,
        "max_parallel": sweep.max_parallel,
        "metric": sweep.plan["metric"],
        "direction": sweep.plan["direction"],
        "jobs": found.counts,
    }


def ranked(found: SweepDetail) -> list[SweepJob]:
    """Return the jobs of a sweep, the best first; see `sweep_ranking.in_order`."""
    states = {job_id: job.state for job_id, job in found.jobs.items()}
    trials = sweep_ranking.in_order(found.trials, states, found.found.sweep.plan["direction"])
    return [_job(trial, found.jobs[trial.job], rank) for rank, trial in enumerate(trials, 1)]


def _job(trial: Trial, job: Job, rank: int) -> SweepJob:
    last = sweep_ranking.ranking(trial, job.state is JobState.COMPLETED)
    return SweepJob(
        rank=None if last is None or last.value is None else rank,
        job_uuid=job.id,
        status=job.state,
        chosen=trial.chosen,
        figure=None if last is None else (math.nan if last.value is None else last.value),
        step=None if last is None else last.step,
        evaluations=len(trial.figures),
        ended_early=bool(trial.pruned_at) and job.state is not JobState.COMPLETED,
        reason=job.reason,
    )
