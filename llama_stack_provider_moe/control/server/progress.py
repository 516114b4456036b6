"""A job's progress, from its row in the store and its newest events; reads at most a few MB of the events file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from pydantic import BaseModel

from llama_stack_provider_moe.control.server.evaluation_scan import first_and_last
from llama_stack_provider_moe.control.server.newest_events import newest_events
from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.control.supervisor.processes import PidScope, ProcessName, is_alive
from llama_stack_provider_moe.jobdir.events import Assessed, Evaluation, Failed, Progress, Routing, Step
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.scan import scan
from llama_stack_provider_moe.jobdir.state import JobState

HEAD_BYTES = 4 << 20  # what was measured before training is there

type Figure = float | str | None  # NaN and infinity are text, see `_number`


class Work(TypedDict):
    """Units of work of a stage; `total` is None where it is unknown."""

    done: int
    total: int | None
    unit: str


class EvaluatedStep(TypedDict):
    """Held-out figures at one step."""

    step: int
    epoch: Figure
    metrics: dict[str, Figure]


class Evaluations(TypedDict):
    """Held-out figures before training and now."""

    first: EvaluatedStep
    last: EvaluatedStep


class SafetyFigures(TypedDict):
    """The fields of the event `Assessed`."""

    step: int
    measured: dict[str, dict[str, dict[str, float]]]
    differences: dict[str, dict[str, dict[str, float]]]
    exceeded: list[str]


class JobProgress(TypedDict):
    """A job's progress, ready for JSON; figures are None until there are any.

    Keys:
        stage: the current activity: `queued`, `starting` (no sign of life yet), the stage that its process reports
            (`loading weights`, `tokenising`, `evaluating`, `training`, ...), `analysing` (routing), `exporting`,
            `cancelling`, `ending` (its process has failed or is gone, but the supervisor has not recorded that in the
            store yet, for example because the disk is full), or the state it ended in.
        reason: for `ending`, the known cause; for a job that waits because the disk is full, that; otherwise None.
        work: progress of that stage, {done, total, unit}; total is None where it is unknown. None where the stage does
            not come from the process, and between optimiser steps, which `step` counts.
        step, max_steps, percent, epoch: of the last optimiser step.
        eta_s: estimated seconds left as of that step; None once the job has ended.
        metrics: the metrics of that step, by TRL's names.
        evaluation: {first, last}, each {step, epoch, metrics}: held-out figures before training and now.
        safety: the last measurement of `eval`, {step, measured, differences, exceeded}; None without that block.
        routing: the last step's expert balance over all layers, None on a dense model; see `balance`.
        updated_at: time of the newest event, ISO 8601.
    """

    stage: str
    reason: str | None
    work: Work | None
    step: int | None
    max_steps: int | None
    percent: float | None
    epoch: Figure
    eta_s: Figure
    metrics: dict[str, Figure] | None
    evaluation: Evaluations | None
    safety: SafetyFigures | None
    routing: dict[str, object] | None
    updated_at: str | None


class _Newest:
    """The newest event of each type."""

    def __init__(self, events: Mapping[str, BaseModel]) -> None:
        self._events = events

    def __bool__(self) -> bool:
        return bool(self._events)

    def event[E: BaseModel](self, kind: type[E]) -> E | None:
        """The newest event of that kind."""
        found = self._events.get(kind.model_fields["type"].default)
        return found if isinstance(found, kind) else None

    def last_sign(self) -> str | None:
        """The type of the newest event that says what the process does."""
        return next((kind for kind in self._events if kind in _SIGNS), None)


def progress(job: Job, folder: JobFolder) -> JobProgress:
    """Return a job's progress."""
    events = newest_events(folder.events)
    newest = _Newest(events)
    step = newest.event(Step)
    routing = newest.event(Routing)
    ending = _ending(job, newest)
    ended = job.state.ended or ending is not None
    percent = None
    if step is not None:
        percent = round(100.0 * step.step / max(step.max_steps, 1), 2)
    return {
        "stage": _stage(job, newest) if ending is None else "ending",
        "reason": ending or _why_waiting(job, folder),
        "work": _work(job, newest) if ending is None else None,
        "step": step.step if step else None,
        "max_steps": step.max_steps if step else None,
        "percent": 100.0 if job.state is JobState.COMPLETED else percent,
        "epoch": _number(step.epoch) if step else None,
        "eta_s": _number(step.eta_s) if step and not ended else None,
        "metrics": _numbers(step.metrics) if step else None,
        "evaluation": _evaluations(folder.events, newest.event(Evaluation)),
        "safety": _safety(folder, newest.event(Assessed)),
        "routing": None if routing is None else balance(routing),
        "updated_at": max(event.time for event in events.values()).isoformat() if events else None,
    }


def _ending(job: Job, newest: _Newest) -> str | None:
    """Why a job ended that is still in progress in the store; None where the job runs."""
    if job.state is not JobState.IN_PROGRESS:
        return None
    failed = newest.event(Failed)
    if failed is not None:
        what = f"ended: {failed.reason}"
    elif _is_gone(job):
        what = "ended: its process is gone"
    else:
        return None
    no_room = disk.full(Path(job.folder))
    if no_room is None:
        return f"{what}; the job store does not have this yet"
    return f"{what}; the job store can't record this until there is room: {no_room}"


def _is_gone(job: Job) -> bool:
    """Whether the job's process ended; False for processes on another machine or in another container."""
    launcher = None if job.supervisor is None or job.run is not None else ProcessName.parse(job.supervisor)
    if launcher is None or job.pid is None or job.pid_birth is None or launcher.place != PidScope.here():
        return False
    return not is_alive(job.pid, job.pid_birth)


def _why_waiting(job: Job, folder: JobFolder) -> str | None:
    no_room = disk.full(folder.root) if job.state is JobState.SCHEDULED else None
    return None if no_room is None else f"{no_room}; the job begins once there is room"


def _stage(job: Job, newest: _Newest) -> str:
    if job.state is JobState.SCHEDULED:
        return "queued"
    if job.state.over:
        return job.state.value
    if job.cancel_requested_at is not None:
        return "cancelling"
    sign = newest.last_sign()
    reported = newest.event(Progress)
    if sign == "progress" and reported is not None:
        return reported.stage
    if sign == "finished":
        return "saving"
    if sign == "export":
        return "exporting"
    if sign == "step":
        return _STEPS.get(job.recipe, "training")
    return "loading" if newest else "starting"


# What a job does while it records steps, by recipe; the others train.
_STEPS = {
    "routing_analysis": "analysing", "ablation_measure": "measuring", "probe": "measuring", "ablation": "editing",
    "mix": "mixing", "surgery": "writing",
}  # fmt: skip
# The newest event of these types says what a process does; "started" is always the first.
_SIGNS = frozenset({"started", "progress", "step", "export", "finished"})


def _work(job: Job, newest: _Newest) -> Work | None:
    event = newest.event(Progress)
    if event is None or job.state is not JobState.IN_PROGRESS or newest.last_sign() != "progress":
        return None
    return {"done": event.done, "total": event.total, "unit": event.unit}


def _evaluations(path: Path, last: Evaluation | None) -> Evaluations | None:
    first, earlier = first_and_last(path)
    last = last or earlier
    first = first or last
    if first is None or last is None:
        return None
    return {"first": _evaluation(first), "last": _evaluation(last)}


def _evaluation(event: Evaluation) -> EvaluatedStep:
    return {"step": event.step, "epoch": _number(event.epoch), "metrics": _numbers(event.metrics)}


def _safety(folder: JobFolder, last: Assessed | None) -> SafetyFigures | None:
    if last is None and folder.before.is_file():  # measured long ago, before the steps
        last = next(scan(folder.events, Assessed, limit_bytes=HEAD_BYTES), None)
    if last is None:
        return None
    return {
        "step": last.step,
        "measured": last.measured,
        "differences": last.differences,
        "exceeded": last.exceeded,
    }


def balance(event: Routing) -> dict[str, object] | None:
    """Return `Routing.figures`, with the step and the numbers of layers and experts; None on a dense model."""
    in_step = event.in_step()
    if in_step is None:
        return None
    found: dict[str, object] = {"step": event.step, "layers": len(in_step.layer), "experts": in_step.experts}
    found |= _numbers(event.figures())
    by_set = {name: _numbers(figures) for name, figures in event.figures_by_set().items()}
    return {**found, "sets": by_set} if by_set else found


def _number(value: float | None) -> Figure:
    """`value` for JSON, which has no NaN and infinity: they become text, so that a diverged loss stays visible."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _numbers(metrics: dict[str, float]) -> dict[str, Figure]:
    return {name: _number(value) for name, value in metrics.items()}
