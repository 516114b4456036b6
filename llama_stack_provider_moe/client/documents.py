"""Documents of the server's API, as far as clients read them.

A server of another version may send more fields, or fewer: `NotRequired` marks those that older servers lack.
"""

from typing import NotRequired, TypedDict

# `NaN` and infinities arrive as text, because JSON has no such numbers.
type Figure = float | str
type Metrics = dict[str, Figure]


class Work(TypedDict):
    """Progress of the current stage."""

    done: int | None
    total: int | None
    unit: str


class Evaluation(TypedDict):
    """Metrics on the held-out rows after a step."""

    step: int
    metrics: Metrics


class Evaluations(TypedDict):
    """The first evaluation and the last one."""

    first: Evaluation
    last: Evaluation


class Measurement(TypedDict):
    """A rate of the safety evaluation, and the number of rows that it was measured on."""

    value: Figure
    n: float


class Safety(TypedDict):
    """Measurements of the safety evaluation, `before` and `after` training."""

    measured: dict[str, dict[str, Measurement]]


class Balance(TypedDict):
    """Balance of the experts in a step, over all layers; entropies in nats.

    `mutual_information` is that of set and expert in nats, in jobs with several sets of rows.
    """

    min_share: Figure
    max_share: Figure
    dead_experts: int
    load_entropy: Figure
    token_entropy: Figure
    mutual_information: NotRequired[Figure]


class Routing(Balance):
    """Balance in the last step; `sets` has the balance of each set of rows, if the job has several."""

    experts: int
    layers: int
    sets: NotRequired[dict[str, Balance]]


class ExportStep(TypedDict):
    """One step of an export."""

    name: str
    state: str
    reason: str | None
    note: str | None
    figures: NotRequired[dict[str, object] | None]


class Export(TypedDict):
    """An export of a job."""

    job_uuid: str
    status: str
    steps: list[ExportStep]
    served_as: NotRequired[str | None]


class Progress(TypedDict, total=False):
    """Progress of a job; a figure is null until there is one."""

    stage: str
    reason: str
    work: Work | None
    step: int | None
    max_steps: int | None
    eta_s: float | None
    metrics: Metrics | None
    evaluation: Evaluations | None
    safety: Safety | None
    routing: Routing | None
    queue_position: int | None
    waits_for: list[str]
    attempts: int
    lost: int | None
    devices: str | None
    stopped_by: str | None
    run: str | None
    unreadable: str
    exports: list[Export]
    disk_bytes: int


class Artifact(TypedDict):
    """A checkpoint or a final artifact of a job."""

    identifier: str
    kind: str
    name: str
    path: str
    epoch: int
    step: int
    bytes: int
    sha256: str | None
    training_metrics: dict[str, Figure | None] | None
    verification: dict[str, object] | None


class Artifacts(TypedDict):
    """Artifacts that a job has saved so far."""

    job_uuid: str
    checkpoints: list[Artifact]
    report: NotRequired[str]


class Status(Artifacts):
    """Status of a job."""

    status: str
    scheduled_at: str | None
    started_at: str | None
    completed_at: str | None
    resources_allocated: Progress | None


class DataSource(TypedDict):
    """The data set that a part of a job's rows came from; `version` is null for the host's."""

    kind: str
    id: str
    version: str | None
    rows: int


class Job(Status):
    """All details of a job."""

    recipe: str
    model: str
    parent: NotRequired[str | None]
    attempts: int
    reason: str | None
    folder: str
    spec: dict[str, object] | None
    resolved: dict[str, object] | None
    sources: NotRequired[dict[str, DataSource] | None]
    labels: NotRequired[dict[str, str]]
    note: NotRequired[str | None]
    sweep: NotRequired[str | None]
    pipeline: NotRequired[str | None]
    waits_for: NotRequired[list[str]]
    notifications: NotRequired[list[dict[str, object]]]


class JobLine(TypedDict):
    """A job in a list of jobs."""

    job_uuid: str
    status: str
    recipe: str
    model: str
    scheduled_at: str
    started_at: str | None
    completed_at: str | None
    labels: NotRequired[dict[str, str]]
    note: NotRequired[str | None]
    sweep: NotRequired[str | None]
    pipeline: NotRequired[str | None]
    waits_for: NotRequired[list[str]]
    owner: NotRequired[str]
    unreadable: NotRequired[str | None]


class JobList(TypedDict):
    """Jobs, newest first."""

    data: list[JobLine]
    has_more: bool


class Scheduled(TypedDict):
    """A job that was created or resumed."""

    job_uuid: str
    notes: NotRequired[list[str]]
    resumes: NotRequired[str]


class Validated(TypedDict):
    """What a valid job would be in full."""

    spec: dict[str, object]
    model: NotRequired[str]
    train_rows: int
    validation_rows: int | None
    rows: dict[str, int]
    notes: NotRequired[list[str]]


class Deleted(TypedDict):
    """A deleted job, and what remains of it."""

    job_uuid: str
    kept: list[str]
    exports: NotRequired[list[str]]
    broken: NotRequired[list[str]]
    withdrawn: NotRequired[str | None]


class LogLines(TypedDict):
    """Lines of a job's output."""

    log_lines: list[str]
    next_offset: int


class EventPage(TypedDict):
    """A page of a job's events, oldest first; `cursor` is where the next page begins."""

    job_uuid: str
    events: list[dict[str, object]]
    cursor: int
    unreadable: int


class EvaluationPoint(Evaluation):
    """Metrics on the held-out rows after a step, and the epochs until then."""

    epoch: Figure


class MetricSeries(TypedDict):
    """The metrics of a job's steps, as columns of equal length; null for a step without that metric."""

    job_uuid: str
    steps: list[int]
    epoch: list[Figure]
    metrics: dict[str, list[Figure | None]]
    evaluations: list[EvaluationPoint]


class RoutingSeries(TypedDict):
    """How the routers of a job used their experts: by layer with a column for each of `steps`, and the shares of one
    layer's experts with a column for each of `share_steps`."""

    job_uuid: str
    steps: list[int]
    layers: list[int]
    experts: int
    cv: list[list[Figure]]
    dead: list[list[int]]
    largest: list[list[Figure]]
    layer: int | None
    share_steps: list[int]
    share: list[list[Figure]]


class RoutingShares(TypedDict):
    """The mean share of every expert over a job's last steps; `share` is by layer and expert."""

    job_uuid: str
    steps: list[int]
    covered: int
    layers: list[int]
    share: list[list[Figure]]


class ExportJob(Export):
    """An export of a job, when it was submitted and why it ended."""

    reason: str | None
    scheduled_at: str
    completed_at: str | None


class ExportList(TypedDict):
    """The exports of a job, newest first."""

    data: list[ExportJob]


class ArtifactFile(TypedDict):
    """One file of an artifact."""

    path: str
    bytes: int
    sha256: str


class ArtifactFiles(TypedDict):
    """Files of an artifact."""

    files: list[ArtifactFile]


class PulledFile(ArtifactFile):
    """A downloaded file; `fetched` counts the bytes that were downloaded now."""

    artifact: str
    fetched: int


class Pulled(TypedDict):
    """Downloaded files of a job."""

    job_uuid: str
    files: list[PulledFile]


class Share(TypedDict):
    """What is used of one limit; `limit` and `left` are None without a limit."""

    used: float
    limit: float | None
    left: float | None
    free_at: NotRequired[str | None]


class Quota(TypedDict):
    """What an owner uses of a server, and what is left."""

    owner: str
    waiting_jobs: Share
    running_jobs: Share
    gpu_hours: Share
    stored_bytes: Share


class QuotaList(TypedDict):
    """The quotas of every owner."""

    data: list[Quota]


class Health(TypedDict):
    """Health of the provider."""

    status: str
    store: str
    supervisor: str
    jobs: dict[str, int]


def progress_of(status: Status) -> Progress:
    """Return the progress of a job; empty if the server sent none."""
    return status["resources_allocated"] or {}
