"""What runs on which device, with use and memory, and what waits: `GET activity`, which `moe-train top` shows.

A caller sees their own jobs, and of the others only that a device is taken.
"""

import os
from datetime import datetime

from fastapi import APIRouter
from pydantic import BaseModel, Field

from llama_stack_provider_moe.control.server import views
from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.job_filter import JobFilter
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor import devices, machine_use
from llama_stack_provider_moe.control.supervisor.processes import PidScope, ProcessName
from llama_stack_provider_moe.errors import Forbidden
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig

SHOWN_RUNNING = 64
SHOWN_WAITING = 50
_MEASURED = "null if it can't be measured from the server's machine"


class DeviceUse(BaseModel):
    """A device that jobs may use."""

    device: str = Field(description="Index or UUID, as `supervisor.devices` or the driver names it.")
    name: str | None = Field(description="Name of the device, by the driver.")
    job_uuid: str | None = Field(description="The caller's job that has it.")
    is_taken: bool = Field(description="Whether any job has it.")
    use: float | None = Field(description=f"Share of the last moment in which it computed, 0 to 1; {_MEASURED}.")
    memory_bytes: int | None = Field(description=f"Memory in use; {_MEASURED}.")
    total_bytes: int | None = Field(description=f"Size of its memory; {_MEASURED}.")


class RunningJob(BaseModel):
    """A job of the caller that runs."""

    job_uuid: str
    recipe: str
    model: str
    devices: str | None = Field(description="Its devices; empty: none; null: not decided.")
    started_at: datetime | None
    stage: str = Field(description="What it does now.")
    step: int | None
    max_steps: int | None
    processes: int | None = Field(description=f"Number of its processes; {_MEASURED}.")
    cpu: float | None = Field(description=f"Processor cores in use; {_MEASURED}.")
    memory_bytes: int | None = Field(description=f"The machine's memory in use; {_MEASURED}.")


class WaitingJob(BaseModel):
    """A job of the caller that waits."""

    job_uuid: str
    recipe: str
    model: str
    position: int = Field(description="Place in the queue of all owners: 1 is next; 0 while it waits for other jobs.")
    gpus: int | None = Field(description="GPUs that it asks for; null: one if there is any.")
    sweep: str | None = Field(description="The sweep that it belongs to.")
    pipeline: str | None = Field(description="The pipeline that it belongs to.")
    waits_for: list[str] = Field(description="Jobs that must complete before it starts, and have not yet.")


class Activity(BaseModel):
    """What runs on which device, and what waits."""

    devices: list[DeviceUse]
    running: list[RunningJob]
    waiting: list[WaitingJob] = Field(description="In the order of the queue.")
    more_waiting: int = Field(description="How many more jobs of the caller wait.")


def add_activity(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the route to the router of `impl`."""

    @router.get("/activity", summary="Get what runs on which device, with use and memory, and the queue.")
    async def activity() -> Activity:
        return await impl.seen(lambda store, whose: of_store(store, whose, impl.config))


def of_store(store: JobStore, whose: str | None, config: ProviderConfig) -> Activity:
    """Return what runs and waits.

    Args:
        store: the store.
        whose: the owner whose jobs are shown; None for every owner's.
        config: the server's configuration.
    """
    running = store.list(whose, SHOWN_RUNNING, None, JobFilter(states=(JobState.IN_PROGRESS,)))
    first, waiting = store.first_waiting(whose, SHOWN_WAITING)
    waits = store.waits.of_jobs([job.id for job, _ in first])
    used = machine_use.sessions({job.pid for job in running if job.pid is not None and _runs_here(job)})
    return Activity(
        devices=_devices(store, {job.id for job in running}, config),
        running=[_running(job, used.get(job.pid or 0)) for job in running],
        waiting=[_waiting(job, position, waits.get(job.id, [])) for job, position in first],
        more_waiting=waiting - len(first),
    )


def _devices(store: JobStore, shown: set[str], config: ProviderConfig) -> list[DeviceUse]:
    measured = machine_use.gpus()
    by_name = {name: gpu for gpu in measured for name in (gpu.number, gpu.uuid)}
    names = devices.given_out(config, os.environ) or ()
    holders = {device: job for job in store.running() for device in (job.devices or "").split(",") if device}
    found = []
    for name in dict.fromkeys([*names, *holders]):
        gpu, job = by_name.get(name), holders.get(name)
        found.append(
            DeviceUse(
                device=name,
                name=None if gpu is None else gpu.name,
                job_uuid=job.id if job is not None and job.id in shown else None,
                is_taken=job is not None,
                use=None if gpu is None else gpu.use,
                memory_bytes=None if gpu is None else gpu.memory_bytes,
                total_bytes=None if gpu is None else gpu.total_bytes,
            )
        )
    return found


def _running(job: Job, use: machine_use.SessionUse | None) -> RunningJob:
    try:
        reached = progress(job, views.folder_of(job))
    except Forbidden:  # a file of it is a link; the others are still shown
        reached = None
    return RunningJob(
        job_uuid=job.id,
        recipe=job.recipe,
        model=job.model,
        devices=job.devices,
        started_at=job.started_at,
        stage="unreadable" if reached is None else reached["stage"],
        step=None if reached is None else reached["step"],
        max_steps=None if reached is None else reached["max_steps"],
        processes=None if use is None else use.processes,
        cpu=None if use is None else round(use.cpu, 2),
        memory_bytes=None if use is None else use.memory_bytes,
    )


def _waiting(job: Job, position: int, waits_for: list[str]) -> WaitingJob:
    return WaitingJob(
        job_uuid=job.id, recipe=job.recipe, model=job.model, position=position, gpus=job.gpus, sweep=job.sweep,
        pipeline=job.pipeline, waits_for=waits_for,
    )  # fmt: skip


def _runs_here(job: Job) -> bool:
    """Whether the job's process is one of this machine and container, so that its pid means something here."""
    launcher = None if job.supervisor is None or job.run is not None else ProcessName.parse(job.supervisor)
    return launcher is not None and launcher.place == PidScope.here()
