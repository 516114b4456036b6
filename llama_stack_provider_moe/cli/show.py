"""Documents of the API -> what a person reads. Figures that are not known are left out, never shown as zero."""

import json
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from llama_stack_provider_moe.cli.screen import table, text
from llama_stack_provider_moe.jobs.state import JobState

# By the names of the step's and the evaluation's metrics; of those that several hold, the first found is shown.
_LOSSES = ("validation_loss", "loss")
_ACCURACY = "rewards/accuracies"


def jobs(listed: dict[str, Any]) -> RenderableType:
    """A line a job, newest first."""
    if not listed["data"]:
        return "no jobs"
    rows = [
        (job["job_uuid"], job["status"], job["recipe"], job["model"], moment(job["scheduled_at"]), took(job))
        for job in listed["data"]
    ]
    jobs = table(("JOB", "STATUS", "RECIPE", "MODEL", "SUBMITTED", "TOOK"), rows)
    if not listed["has_more"]:
        return jobs
    return Group(jobs, text(f"there are more: moe-train ls --after {rows[-1][0]}"))


def job(detail: dict[str, Any]) -> RenderableType:
    """A job whole, but for the spec, which only JSON shows."""
    data, resources = (detail["spec"] or {}).get("data", {}), _resources(detail)
    facts = [
        ("job", detail["job_uuid"]),
        ("status", standing(detail)),
        ("reason", detail["reason"]),
        ("recipe", f"{detail['recipe']} of {detail['model']}"),
        ("exports job", detail.get("parent")),
        (
            "data",
            ", ".join(
                filter(
                    None, (data.get("dataset_id"), data.get("validation_dataset_id"), *data.get("sets", {}).values())
                )
            ),
        ),
        ("submitted", moment(detail["scheduled_at"])),
        ("started", moment(detail["started_at"])),
        ("ended", moment(detail["completed_at"])),
        ("took", took(detail)),
        ("held out", held_out(detail)),
        ("safety", safety(detail)),
        ("experts", _experts(detail)),
        ("tried", _tries(detail)),
        ("stopped by", resources.get("stopped_by")),
        ("GPUs", resources.get("devices")),
        ("Ray job", resources.get("run")),
        ("folder", detail["folder"]),
        ("on disk", size(resources["disk_bytes"]) if "disk_bytes" in resources else ""),
    ]
    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        if value:
            grid.add_row(name, text(value))
    parts: list[RenderableType] = [grid]
    for part in (exports(detail), artifacts(detail) if detail["checkpoints"] else None):
        parts += ["", part] if part is not None else []
    return Group(*parts)


def artifacts(document: dict[str, Any]) -> RenderableType:
    """A line a checkpoint or final artifact."""
    if not document["checkpoints"]:
        return "no artifacts"
    rows = [
        (
            each["identifier"], each["kind"], str(each["epoch"]), str(each["step"]), size(each["bytes"]),
            figure(each["training_metrics"]["validation_loss"]) if each["training_metrics"] else "-", each["path"],
        )
        for each in document["checkpoints"]
    ]  # fmt: skip
    return table(("ARTIFACT", "KIND", "EPOCH", "STEP", "SIZE", "HELD-OUT LOSS", "PATH"), rows)


def exports(status: dict[str, Any]) -> RenderableType | None:
    """A line a step of each export; None of a job without any."""
    rows = [
        (export["job_uuid"], step["name"], step["state"], step["reason"] or step["note"] or "")
        for export in _resources(status).get("exports") or ()
        for step in export["steps"] or [{"name": "-", "state": export["status"], "reason": None, "note": None}]
    ]
    return table(("EXPORT", "STEP", "STATE", ""), rows) if rows else None


def pulled(document: dict[str, Any]) -> str:
    """How much was fetched."""
    files = document["files"]
    if not files:
        return "no artifacts"
    total, came = sum(file["bytes"] for file in files), sum(file["fetched"] for file in files)
    return f"{len(files)} files, {size(total)}, of which {size(came)} had to come; every checksum is right"


def deleted(document: dict[str, Any]) -> str:
    """That a job is gone, and what of it is not."""
    kept = document["kept"]
    exports = document.get("exports") or []  # a server before exports has none
    told = f"job {document['job_uuid']} is deleted" + (f", with its exports {', '.join(exports)}" if exports else "")
    return told + (f"; its checkpoints stay in {', '.join(kept)}" if kept else "")


def validated(document: dict[str, Any]) -> RenderableType:
    """That a job would be taken, and what it would be in full."""
    if "validation_split" not in document["spec"].get("options", {}):
        counted = ", ".join(f"{count} rows of {name}" for name, count in document["rows"].items())
        head = f"valid; nothing was created. {f'{counted}. ' if counted else ''}The job in full:"
        return Group(text(head), text(json.dumps(document["spec"], indent=2)))
    held = document["validation_rows"]
    split = document["spec"]["options"]["validation_split"]
    held_rows = f"{held} held out" if held is not None else f"of which {split:.0%} will be held out"
    head = f"valid; nothing was created. {document['train_rows']} training rows, {held_rows}. The job in full:"
    return Group(text(head), text(json.dumps(document["spec"], indent=2)))


def ended(status: dict[str, Any]) -> RenderableType:
    """How a followed job ended, and what it leaves."""
    resources = _resources(status)
    lines = [f"{status['job_uuid']}: {status['status']}" + (f" after {took(status)}" if took(status) else "")]
    lines += [str(resources["reason"])] if resources.get("reason") else []
    lines += [f"held out: {held_out(status)}"] if held_out(status) else []
    body: list[RenderableType] = [text(line) for line in lines]
    exported = exports(status)
    body += [exported] if exported is not None else []
    return Group(*body, artifacts(status)) if status["checkpoints"] else Group(*body)


def standing(status: dict[str, Any]) -> str:
    """State and progress in one line."""
    resources = _resources(status)
    state, stage = str(status["status"]), str(resources.get("stage") or "")
    parts = [state if stage in ("", state) else f"{state} ({stage})"]
    position = resources.get("queue_position")
    if state == JobState.SCHEDULED and position:
        parts.append(f"number {position} in the queue")
    if resources.get("step") is not None:
        parts.append(f"step {resources['step']} of {resources['max_steps']}")
        parts += figures(status)
    return ", ".join(parts)


def figures(status: dict[str, Any]) -> list[str]:
    """The last step's loss (and reward accuracy), and the time left."""
    resources = _resources(status)
    parts = _scores(resources.get("metrics") or {})
    left = resources.get("eta_s")
    return [*parts, f"ETA {duration(left)}"] if isinstance(left, int | float) else parts


def evaluation(found: dict[str, Any]) -> str:
    """Figures on the held-out rows."""
    return f"held out at step {found['step']}: {', '.join(_scores(found['metrics'])) or 'no loss'}"


def held_out(status: dict[str, Any]) -> str:
    """Held-out figures, the first evaluation's and the last one's."""
    both = _resources(status).get("evaluation")
    if not both:
        return ""
    first, last = both["first"]["metrics"], both["last"]["metrics"]
    names = [next((name for name in _LOSSES if name in last), ""), _ACCURACY]
    changes = [f"{_label(name)} {figure(first.get(name))} -> {figure(last[name])}" for name in names if name in last]
    return ", ".join(changes)


def safety(status: dict[str, Any]) -> str:
    """What `eval` measured, before and after."""
    measured = (_resources(status).get("safety") or {}).get("measured", {})
    before, after = measured.get("before", {}), measured.get("after", {})
    told = []
    for name, found in before.items():
        changed = f" -> {figure(after[name]['value'])}" if name in after else ""
        told.append(f"{name} {figure(found['value'])}{changed} (n={found['n']:g})")
    return ", ".join(told)


def took(job: dict[str, Any]) -> str:
    """Time from start to end, or until now."""
    if job["started_at"] is None:
        return ""
    start = datetime.fromisoformat(job["started_at"])
    end = datetime.fromisoformat(job["completed_at"]) if job["completed_at"] else datetime.now(start.tzinfo)
    return duration((end - start).total_seconds())


def moment(time: str | None) -> str:
    """A time of the server's in this machine's zone."""
    return f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d %H:%M:%S}" if time else ""


def duration(seconds: float) -> str:
    """`42s`, `3m07s`, `2h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: int) -> str:
    """Bytes in decimal units."""
    units = ("B", "kB", "MB", "GB", "TB")
    amount, unit = float(count), 0
    while amount >= 999.5 and unit < len(units) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.3g} {units[unit]}"


def figure(value: Any) -> str:
    """A number in four digits; the server's words for what is none (`NaN`) as they are."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _scores(metrics: dict[str, Any]) -> list[str]:
    loss = next((name for name in _LOSSES if name in metrics), None)
    names = [name for name in (loss, _ACCURACY) if name is not None and name in metrics]
    return [f"{_label(name)} {figure(metrics[name])}" for name in names]


def _label(name: str) -> str:
    return "reward accuracy" if name == _ACCURACY else "loss"


def _tries(detail: dict[str, Any]) -> str:
    lost = _resources(detail).get("lost")
    return f"{detail['attempts']} times; its process was lost {lost} times" if lost else ""


def _experts(status: dict[str, Any]) -> str:
    routing = _resources(status).get("routing")
    if not routing:
        return ""
    return (
        f"{routing['experts']} in each of {routing['layers']} layers, shares {figure(routing['min_share'])} to "
        f"{figure(routing['max_share'])}, {routing['dead_experts']} dead"
    )


def _resources(status: dict[str, Any]) -> dict[str, Any]:
    return status["resources_allocated"] or {}
