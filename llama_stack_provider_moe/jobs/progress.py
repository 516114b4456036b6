"""How far a job is, from the store's row and the newest of its events; never from more of the file than a few MB."""

import math
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.jobs.events import Assessed, Evaluation, Routing, latest
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.jobs.scan import scan
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job

# Evaluations are rare: the first stands near the file's beginning unless the untouched model was not evaluated, the
# last within the last epoch's events. Beyond these windows they are not looked for.
HEAD_BYTES = 4 << 20
TAIL_BYTES = 16 << 20


def progress(job: Job, folder: JobFolder) -> dict[str, Any]:
    """A job's progress, ready for JSON; figures are None until there are any.

    Keys:
        stage: `queued`, `starting` (no sign of life yet), `loading` (model and data), `training` (`analysing`, where
            routing is), `saving`, `exporting`, `cancelling`, or the state it ended in.
        step, max_steps, percent, epoch: of the last optimiser step.
        eta_s: seconds left as of that step; None once the job has ended.
        metrics: that step's, by TRL's names.
        evaluation: {first, last}, each {step, epoch, metrics}: held-out figures before and now.
        safety: what `eval` measured last, {step, measured, differences, exceeded}; None without that block.
        routing: the last step's expert balance over all layers, None on a dense model; see `balance`.
        updated_at: time of the newest event, ISO 8601.
    """
    newest = latest(folder.events)
    step = newest.get("step")
    ended = job.state.ended
    percent = None
    if step is not None:
        percent = round(100.0 * step.step / max(step.max_steps, 1), 2)
    return {
        "stage": _stage(job, newest),
        "step": step.step if step else None,
        "max_steps": step.max_steps if step else None,
        "percent": 100.0 if job.state is JobState.COMPLETED else percent,
        "epoch": _number(step.epoch) if step else None,
        "eta_s": _number(step.eta_s) if step and not ended else None,
        "metrics": _numbers(step.metrics) if step else None,
        "evaluation": _evaluations(folder.events, newest.get("evaluation")),
        "safety": _safety(folder, newest.get("assessed")),
        "routing": balance(newest["routing"]) if "routing" in newest else None,
        "updated_at": max(event.time for event in newest.values()).isoformat() if newest else None,
    }


def _stage(job: Job, newest: dict[str, Any]) -> str:
    if job.state is JobState.SCHEDULED:
        return "queued"
    if job.state.ended:
        return job.state.value
    if job.cancel_requested_at is not None:
        return "cancelling"
    if "finished" in newest:
        return "saving"
    if "export" in newest:
        return "exporting"
    if "step" in newest:
        return "analysing" if job.recipe == "routing_analysis" else "training"
    return "loading" if newest else "starting"


def _evaluations(path: Path, last: Evaluation | None) -> dict[str, Any] | None:
    first = next(scan(path, Evaluation, limit_bytes=HEAD_BYTES), None)
    if last is None and path.exists():
        start = max(0, path.stat().st_size - TAIL_BYTES)
        for event in scan(path, Evaluation, start=start, limit_bytes=TAIL_BYTES):
            last = event
    first, last = first or last, last or first
    if first is None or last is None:
        return None
    return {"first": _evaluation(first), "last": _evaluation(last)}


def _evaluation(event: Evaluation) -> dict[str, Any]:
    return {"step": event.step, "epoch": _number(event.epoch), "metrics": _numbers(event.metrics)}


def _safety(folder: JobFolder, last: Assessed | None) -> dict[str, Any] | None:
    if last is None and folder.before.is_file():  # told long ago, before the steps
        last = next(scan(folder.events, Assessed, limit_bytes=HEAD_BYTES), None)
    return None if last is None else last.model_dump(exclude={"time", "type"})


def balance(event: Routing) -> dict[str, Any] | None:
    """`Routing.figures`, and of what."""
    layers = event.layers
    if not layers:
        return None
    told = {"step": event.step, "layers": len(layers), "experts": len(layers[0].share), **_numbers(event.figures())}
    by_set = {name: _numbers(figures) for name, figures in event.figures_by_set().items()}
    return {**told, "sets": by_set} if by_set else told


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity, and a diverged loss must not become "not known": they are given as text."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _numbers(metrics: dict[str, float]) -> dict[str, float | str | None]:
    return {name: _number(value) for name, value in metrics.items()}
