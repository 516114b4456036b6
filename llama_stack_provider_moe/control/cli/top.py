"""`moe-train top`: what runs on which GPU, with use and memory, and what waits."""

import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.client.sweep_documents import Activity, DeviceUse, RunningJob
from llama_stack_provider_moe.control.cli.act import Where, answer, run
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.control.cli.show import size


def register(app: typer.Typer) -> None:
    """Add `top` to `moe-train`."""
    app.command()(top)


def top(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until you press Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option("--every", min=1, help="With --watch: seconds between two looks.")] = 5.0,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show what runs on which GPU with use and memory, what else runs, and the queue in its order."""

    def act(server: Client, screen: Screen) -> Exit:
        while True:
            found = server.activity()
            if not watch:
                return answer(screen, found, shown)
            if screen.as_json:
                screen.line(found)
            else:
                screen.say(shown(found))
                screen.say("")
            time.sleep(every_s)

    run(Where(url, key), as_json, act)


def shown(found: Activity) -> RenderableType:
    """Render devices, running jobs and the queue."""
    parts: list[RenderableType] = []
    if found["devices"]:
        rows = [_device(each) for each in found["devices"]]
        parts += [table(("GPU", "NAME", "USE", "MEMORY", "JOB"), rows), ""]
    if found["running"]:
        parts += [table(("RUNNING", "RECIPE", "AT", "GPUS", "CPU", "MEMORY"), map(_running, found["running"])), ""]
    else:
        parts += ["none of your jobs is running", ""]
    if not found["waiting"]:
        return Group(*parts, "none of your jobs is waiting")
    waiting = [
        (str(job["position"] or "-"), job["job_uuid"], job["recipe"], "-" if job["gpus"] is None else str(job["gpus"]),
         job["sweep"] or job.get("pipeline") or "-", ", ".join(job.get("waits_for", [])) or "-")
        for job in found["waiting"]
    ]  # fmt: skip
    parts.append(table(("QUEUE", "JOB", "RECIPE", "GPUS", "SWEEP OR PIPELINE", "WAITS FOR"), waiting))
    if found["more_waiting"]:
        parts.append(text(f"{found['more_waiting']} more wait"))
    return Group(*parts)


def _device(each: DeviceUse) -> tuple[str, ...]:
    job = each["job_uuid"] or ("of another owner" if each["is_taken"] else "-")
    memory = f"{_bytes(each['memory_bytes'])} of {_bytes(each['total_bytes'])}" if each["total_bytes"] else "-"
    return each["device"], each["name"] or "-", _share(each["use"]), memory, job


def _running(job: RunningJob) -> tuple[str, ...]:
    at = job["stage"]
    if job["step"] is not None:
        at += f", step {job['step']} of {job['max_steps']}"
    cpu = "-" if job["cpu"] is None else f"{job['cpu']:.2g} cores"
    return job["job_uuid"], job["recipe"], at, job["devices"] or "-", cpu, _bytes(job["memory_bytes"])


def _share(use: float | None) -> str:
    return "-" if use is None else f"{use:.0%}"


def _bytes(count: int | None) -> str:
    return "-" if count is None else size(count)
