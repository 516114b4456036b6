"""API documents -> text for users. Unknown figures are left out, never shown as zero."""

import json
from collections.abc import Mapping
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table

from llama_stack_provider_moe.client.documents import (
    Artifacts,
    DataSource,
    Deleted,
    Evaluation,
    Figure,
    Job,
    JobLine,
    JobList,
    Metrics,
    Pulled,
    Status,
    Validated,
    progress_of,
)
from llama_stack_provider_moe.control.cli.screen import table, text
from llama_stack_provider_moe.jobdir.state import JobState

# Names of the metrics of steps and evaluations; the first one found is shown.
_LOSSES = ("validation_loss", "loss")
_ACCURACY = "rewards/accuracies"
_REWARD = "reward"  # of a GRPO job, whose held-out loss is its reward, negated
# By `resumes` in the answer; older servers leave it out.
RESUMES = {
    "from_checkpoint": "; it resumes from its last whole checkpoint",
    "from_completed_steps": "; it keeps the steps that are completed",
    "from_beginning": "; nothing was saved, so it starts from the beginning",
}


def jobs(listed: JobList) -> RenderableType:
    """Render one line per job, newest first."""
    if not listed["data"]:
        return "no jobs"
    heads = ["JOB", "STATUS", "RECIPE", "MODEL", "SUBMITTED", "TOOK"]
    rows = [
        [job["job_uuid"], job["status"], job["recipe"], job["model"], moment(job["scheduled_at"]), took(job)]
        for job in listed["data"]
    ]
    if any(job.get("labels") for job in listed["data"]):
        heads.append("LABELS")
        rows = [[*row, spelled(job.get("labels") or {})] for row, job in zip(rows, listed["data"], strict=True)]
    jobs = table(heads, rows)
    told = [
        text(f"{job['job_uuid']} can't be read in full: {job['unreadable']}")
        for job in listed["data"]
        if job.get("unreadable")
    ]
    if not listed["has_more"]:
        return Group(jobs, *told) if told else jobs
    return Group(jobs, *told, text(f"there are more: moe-train ls --after {rows[-1][0]}"))


def job(detail: Job) -> RenderableType:
    """Render all details of a job, except the spec, which only JSON shows."""
    resources = progress_of(detail)
    facts = [
        ("job", detail["job_uuid"]),
        ("status", standing(detail)),
        ("reason", detail["reason"]),
        ("unreadable", resources.get("unreadable")),
        ("recipe", f"{detail['recipe']} of {detail['model']}"),
        ("labels", spelled(detail.get("labels") or {})),
        ("note", detail.get("note")),
        ("sweep", detail.get("sweep")),
        ("pipeline", detail.get("pipeline")),
        ("exports job", detail.get("parent")),
        ("data", _data_sets(detail)),
        ("submitted", moment(detail["scheduled_at"])),
        ("started", moment(detail["started_at"])),
        ("ended", moment(detail["completed_at"])),
        ("took", f"{took(detail)}{_of_last_start(detail)}"),
        ("held out", held_out(detail)),
        ("safety", safety(detail)),
        ("experts", _experts(detail)),
        ("tried", _tries(detail)),
        ("stopped by", resources.get("stopped_by")),
        ("GPUs", resources.get("devices")),
        ("Ray job", resources.get("run")),
        *(("told", _told(each)) for each in detail.get("notifications") or ()),
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


def artifacts(document: Artifacts) -> RenderableType:
    """Render one line per checkpoint or final artifact."""
    if not document["checkpoints"]:
        return "no artifacts"
    rows = [
        (
            each["identifier"], each["kind"], str(each["epoch"]), str(each["step"]), size(each["bytes"]),
            figure(each["training_metrics"]["validation_loss"]) if each["training_metrics"] else "-", each["path"],
        )
        for each in document["checkpoints"]
    ]  # fmt: skip
    found = table(("ARTIFACT", "KIND", "EPOCH", "STEP", "SIZE", "HELD-OUT LOSS", "PATH"), rows)
    losses = [(each["training_metrics"] or {}).get("validation_loss") for each in document["checkpoints"]]
    if any(isinstance(loss, int | float) and loss < 0 for loss in losses):
        return Group(found, text("a GRPO job's held-out loss is its mean reward, negated"))
    return found


def artifacts_and_report(document: Artifacts) -> RenderableType:
    """Render the artifacts, and how to get the report, which every job has."""
    found = artifacts(document)
    told = text(f"report: moe-train report job {document['job_uuid']} -o report.html")
    return Group(text(found) if isinstance(found, str) else found, told)


def exports(status: Status) -> RenderableType | None:
    """Render one line per step of each export; None if the job has no exports."""
    rows = [
        (export["job_uuid"], step["name"], step["state"], step["reason"] or step["note"] or "")
        for export in progress_of(status).get("exports") or ()
        for step in export["steps"] or [{"name": "-", "state": export["status"], "reason": None, "note": None}]
    ]
    return table(("EXPORT", "STEP", "STATE", ""), rows) if rows else None


def pulled(document: Pulled) -> str:
    """Say how much was downloaded."""
    files = document["files"]
    if not files:
        return "no artifacts"
    total, came = sum(file["bytes"] for file in files), sum(file["fetched"] for file in files)
    return f"{len(files)} files, {size(total)}, of which {size(came)} were downloaded now; every checksum is correct"


def deleted(document: Deleted) -> str:
    """Say that a job was deleted, and which of its files remain."""
    kept = document["kept"]
    exports = document.get("exports") or []  # an older server has none
    told = f"job {document['job_uuid']} is deleted" + (f", with its exports {', '.join(exports)}" if exports else "")
    withdrawn = document.get("withdrawn")
    told += f"; model {withdrawn} is no longer served" if withdrawn else ""
    told += f"; its checkpoints stay in {', '.join(kept)}" if kept else ""
    broken = document.get("broken") or []  # nor these
    return told + ("".join(f"\nbroken: {each}" for each in broken))


def validated(document: Validated) -> RenderableType:
    """Say that a job is valid, what the names in it refer to, and what it would be in full."""
    options = document["spec"].get("options")
    if not isinstance(options, dict) or "validation_split" not in options:
        counted = ", ".join(f"{count} rows of {name}" for name, count in document["rows"].items())
        rows = f"{counted}. " if counted else ""
    else:
        held = document["validation_rows"]
        held_rows = (
            f"{held} held out" if held is not None else f"of which {options['validation_split']:.0%} will be held out"
        )
        rows = f"{document['train_rows']} training rows, {held_rows}. "
    notes = [text(note) for note in document.get("notes", [])]  # an older server has none
    head = text(f"valid; nothing was created. {rows}The job in full:")
    return Group(*notes, head, text(json.dumps(document["spec"], indent=2)))


def ended(status: Status) -> RenderableType:
    """Say how a followed job ended, and list its artifacts."""
    resources = progress_of(status)
    lines = [
        f"{status['job_uuid']}: {status['status']}"
        + (f" after {took(status)}{_of_last_start(status)}" if took(status) else "")
    ]
    lines += [str(resources["reason"])] if resources.get("reason") else []
    lines += [f"it can't be read in full: {resources['unreadable']}"] if resources.get("unreadable") else []
    lines += [f"held out: {held_out(status)}"] if held_out(status) else []
    body: list[RenderableType] = [text(line) for line in lines]
    exported = exports(status)
    body += [exported] if exported is not None else []
    return Group(*body, artifacts(status)) if status["checkpoints"] else Group(*body)


def standing(status: Status) -> str:
    """Render state and progress in one line."""
    resources = progress_of(status)
    state, stage = str(status["status"]), str(resources.get("stage") or "")
    if told := work(status):
        stage = f"{stage}, {told}"
    parts = [state if stage in ("", state) else f"{state} ({stage})"]
    position = resources.get("queue_position")
    if state == JobState.SCHEDULED and position:
        parts.append(f"number {position} in the queue")
    if state == JobState.SCHEDULED and resources.get("waits_for"):
        parts.append(waits(resources["waits_for"]))
    if resources.get("step") is not None:
        parts.append(f"step {resources['step']} of {resources['max_steps']}")
        parts += figures(status)
    return ", ".join(parts)


def waits(jobs: list[str]) -> str:
    """Render what a job waits for."""
    return f"waits for {', '.join(jobs)}"


def work(status: Status) -> str:
    """Render the progress of the current stage, e.g. `120 of 200 tensors`; empty if it is not known."""
    found = progress_of(status).get("work")
    if not isinstance(found, dict) or not (found.get("done") or found.get("total")):
        return ""
    done, total, unit = found.get("done"), found.get("total"), found.get("unit")
    if unit == "bytes" and isinstance(done, int):
        return size(done) + (f" of {size(total)}" if isinstance(total, int) else "")
    return f"{done}{'' if total is None else f' of {total}'} {unit}"


def figures(status: Status) -> list[str]:
    """Return the last step's loss and reward accuracy, and the time left."""
    resources = progress_of(status)
    parts = _scores(resources.get("metrics") or {})
    left = resources.get("eta_s")
    return [*parts, f"ETA {duration(left)}"] if isinstance(left, int | float) else parts


def evaluation(found: Evaluation) -> str:
    """Render figures on the held-out rows."""
    return f"held out at step {found['step']}: {', '.join(_scores(found['metrics'])) or 'no loss'}"


def held_out(status: Status) -> str:
    """Render the held-out figures of the first and of the last evaluation."""
    both = progress_of(status).get("evaluation")
    if not both:
        return ""
    first, last = both["first"]["metrics"], both["last"]["metrics"]
    names = _shown(last)
    changes = [f"{_label(name)} {figure(first.get(name))} -> {figure(last[name])}" for name in names]
    return ", ".join(changes)


def safety(status: Status) -> str:
    """Render what `eval` measured before and after training."""
    found = progress_of(status).get("safety")
    measured = {} if found is None else found["measured"]
    before, after = measured.get("before", {}), measured.get("after", {})
    told = []
    for name, rate in before.items():
        changed = f" -> {figure(after[name]['value'])}" if name in after else ""
        told.append(f"{name} {figure(rate['value'])}{changed} (n={rate['n']:g})")
    return ", ".join(told)


def took(job: Status | JobLine) -> str:
    """Render the time from start to end, or until now."""
    if job["started_at"] is None:
        return ""
    start = datetime.fromisoformat(job["started_at"])
    end = datetime.fromisoformat(job["completed_at"]) if job["completed_at"] else datetime.now(start.tzinfo)
    return duration((end - start).total_seconds())


def moment(time: str | None) -> str:
    """Render a time of the server in this machine's time zone."""
    return f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d %H:%M:%S}" if time else ""


def duration(seconds: float) -> str:
    """Render seconds as `42s`, `3m07s` or `2h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: int) -> str:
    """Render bytes in decimal units."""
    units = ("B", "kB", "MB", "GB", "TB")
    amount, unit = float(count), 0
    while amount >= 999.5 and unit < len(units) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.3g} {units[unit]}"


def figure(value: Figure | None) -> str:
    """Render a number with four digits; `NaN` and the like stay as the server sent them."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _scores(metrics: Metrics) -> list[str]:
    return [f"{_label(name)} {figure(metrics[name])}" for name in _shown(metrics)]


def _shown(metrics: Metrics) -> list[str]:
    loss = next((name for name in _LOSSES if name in metrics), "")
    if loss == "validation_loss" and _REWARD in metrics:
        loss = ""
    return [name for name in (loss, _REWARD, _ACCURACY) if name in metrics]


def _label(name: str) -> str:
    return {_ACCURACY: "reward accuracy", _REWARD: "reward"}.get(name, "loss")


def spelled(labels: Mapping[str, str]) -> str:
    """Render labels on one line."""
    return " ".join(f"{name}={value}" for name, value in labels.items())


def _told(message: Mapping[str, object]) -> str:
    why = f" ({message['told']})" if message.get("told") else ""
    return f"{message.get('event')}: {str(message.get('state')).replace('_', ' ')}{why}"


def _data_sets(detail: Job) -> str:
    data = (detail["spec"] or {}).get("data")
    if not isinstance(data, dict):
        return ""
    names = filter(None, (data.get("dataset_id"), data.get("validation_dataset_id"), *data.get("sets", {}).values()))
    # Of an older server, whose jobs all read the host's data sets.
    sources = detail.get("sources") or {}
    return ", ".join(_source(each) for each in sources.values()) if sources else ", ".join(names)


def _source(source: DataSource) -> str:
    version = source["version"]
    kind = "uploaded" if source["kind"] == "data" else source["kind"]
    return f"{source['id']} ({kind})" if version is None else f"{source['id']}@{version[:12]} ({kind})"


def _tries(detail: Job) -> str:
    lost = progress_of(detail).get("lost")
    return f"{_times(detail['attempts'])}; its process was lost {_times(lost)}" if lost else ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _of_last_start(status: Status) -> str:
    """Say that `took` counts from the last start, if a job has started more than once."""
    return " of its last start" if (progress_of(status).get("attempts") or 0) > 1 and took(status) else ""


def _experts(status: Status) -> str:
    routing = progress_of(status).get("routing")
    if not routing:
        return ""
    return (
        f"{routing['experts']} in each of {routing['layers']} layers, shares {figure(routing['min_share'])} to "
        f"{figure(routing['max_share'])}, {routing['dead_experts']} dead"
    )
