"""Documents of the server's API about sweeps, labels, and what runs where; see `documents`."""

from typing import NotRequired, TypedDict

from llama_stack_provider_moe.client.documents import Figure


class JobLabels(TypedDict):
    """The labels and the note of a job after a change."""

    job_uuid: str
    labels: dict[str, str]
    note: str | None


class CreatedSweep(TypedDict):
    """A sweep that was created, and its jobs."""

    sweep_uuid: str
    jobs: list[str]
    notes: list[str]


class SweepLine(TypedDict):
    """A sweep in a list."""

    sweep_uuid: str
    status: str
    created_at: str
    cancel_requested_at: str | None
    max_parallel: int
    metric: str
    direction: str
    jobs: dict[str, int]


class SweepList(TypedDict):
    """Sweeps, newest first."""

    data: list[SweepLine]
    has_more: bool


class SweepJob(TypedDict):
    """A job of a sweep, and its place among the others; `rank` is None without a figure."""

    rank: int | None
    job_uuid: str
    status: str
    chosen: dict[str, object]
    figure: Figure | None
    step: int | None
    evaluations: int
    ended_early: bool
    reason: str | None


class Sweep(SweepLine):
    """A sweep and its jobs, the best first."""

    parameters: dict[str, list[object]]
    best: str | None
    data: list[SweepJob]


class DeletedSweep(TypedDict):
    """A deleted sweep, and what remains of its jobs."""

    sweep_uuid: str
    jobs: list[str]
    kept: list[str]
    broken: list[str]


class DeviceUse(TypedDict):
    """A device, and what runs on it; a figure is None if it can't be measured."""

    device: str
    name: str | None
    job_uuid: str | None
    is_taken: bool
    use: float | None
    memory_bytes: int | None
    total_bytes: int | None


class RunningJob(TypedDict):
    """A job that runs, and what its processes use of the machine; a figure is None if it can't be measured."""

    job_uuid: str
    recipe: str
    model: str
    devices: str | None
    started_at: str | None
    stage: str
    step: int | None
    max_steps: int | None
    processes: int | None
    cpu: float | None
    memory_bytes: int | None


class WaitingJob(TypedDict):
    """A job that waits, and its place in the queue."""

    job_uuid: str
    recipe: str
    model: str
    position: int
    gpus: int | None
    sweep: str | None
    pipeline: NotRequired[str | None]
    waits_for: NotRequired[list[str]]


class Activity(TypedDict):
    """What runs on which device, and what waits."""

    devices: list[DeviceUse]
    running: list[RunningJob]
    waiting: list[WaitingJob]
    more_waiting: int


class GeneratedSample(TypedDict):
    """An answer that a job generated, and its rewards by grader; null: there is none for it."""

    step: int
    group: int
    prompt: str
    completion: str
    tokens: int
    truncated: bool
    rewards: dict[str, float | None]
    failures: dict[str, str]
    reward: float | None
    advantage: float | None


class GeneratedSamples(TypedDict):
    """Answers that a job generated; `steps` are those whose answers it still has."""

    job_uuid: str
    steps: list[int]
    data: list[GeneratedSample]
