"""What the DPO job of the demo leaves to serve: merged, F16, Q8_0 and Q4_K_M, each verified (part of `make demo`)."""

from typing import Any

from rich.console import Console

from llama_stack_provider_moe.cli.follow import Follower
from llama_stack_provider_moe.cli.server import Server
from llama_stack_provider_moe.errors import ExportError

TYPES = ("f16", "q8_0", "q4_k_m")
EXPORT = {"merged": True, "gguf": [*TYPES]}


def exported(server: Server, job: str, submitted: list[str], console: Console) -> None:
    """Follow the export that the completion of `job` has started, and tell of each step what was measured.

    Args:
        server: that has the job.
        job: its name; it has completed.
        submitted: the export is added, so that whoever stops the server cancels it too.
        console: to print on.

    Raises:
        ExportError: a step did not complete, or what it made is not among the job's artifacts.
    """
    (found,) = server.status(job)["resources_allocated"]["exports"]
    name = found["job_uuid"]
    submitted.append(name)
    told: set[str] = set()
    for status in Follower(server, name, note=console.print, poll_s=2).statuses():
        for step in status["resources_allocated"]["exports"][0]["steps"]:
            if step["name"] not in told and step["state"] not in ("scheduled", "in_progress"):
                told.add(step["name"])
                _tell(step, console)
    if status["status"] != "completed":
        raise ExportError(f"{name} ended as {status['status']}: {status['resources_allocated'].get('reason')}")
    kept = {each["name"]: each for each in server.artifacts(job)["checkpoints"]}
    for wanted in ("merged", *(f"gguf-{type_}" for type_ in TYPES)):
        if wanted not in kept:
            raise ExportError(f"{wanted} is not among the artifacts of {job}: {', '.join(kept)}")
        each = kept[wanted]
        console.print(
            f"{wanted:<12} {each['bytes'] / 2**20:,.0f} MiB, sha256 {each['sha256'][:16]}..., {each['path']}",
            soft_wrap=True,
        )


def _tell(step: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{step['name']}[/] {step['state']}")
    for line in (step["note"] or step["reason"] or "").splitlines():
        console.print(f"  {line}", markup=False, soft_wrap=True)
