"""Every request of the API, except for streams and files: its route, and the kind of document that it answers with.

The synchronous and the asynchronous client send these calls; neither knows a route itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, TypedDict
from urllib.parse import quote

from llama_stack_provider_moe.client.dataset_documents import Dataset, DatasetList, DatasetProfile, DeletedDataset
from llama_stack_provider_moe.client.documents import (
    ArtifactFiles,
    Artifacts,
    Deleted,
    EventPage,
    ExportList,
    Health,
    Job,
    JobList,
    LogLines,
    MetricSeries,
    Quota,
    QuotaList,
    RoutingSeries,
    RoutingShares,
    Scheduled,
    Status,
    Validated,
)
from llama_stack_provider_moe.client.playground_documents import Playground, PromptAnswer, SentPrompt, StoppedPrompt
from llama_stack_provider_moe.client.sweep_documents import (
    Activity,
    CreatedSweep,
    DeletedSweep,
    GeneratedSamples,
    JobLabels,
    Sweep,
    SweepLine,
    SweepList,
)
from llama_stack_provider_moe.errors import InvalidInput

API = "/v1alpha/post-training"
Recipe = Literal["sft", "dpo", "circuit_breaker", "grpo", "kto", "reward", "distill"]
type Query = Mapping[str, int | str | Sequence[str] | None]


class JobFilters(TypedDict, total=False):
    """Which jobs a list shows; all conditions must hold.

    Keys:
        state: states of the jobs: one of these.
        recipe: their recipe.
        model: their model, as the list shows it.
        label: labels that they all have, each `KEY=VALUE`, or `KEY` with any value.
        owner: their owner, as the list shows it; for administrators.
        sweep: the sweep that they belong to.
        pipeline: the pipeline that they belong to.
        text: a part of name, model, note or a label's value.
    """

    state: Sequence[str]
    recipe: str
    model: str
    label: Sequence[str]
    owner: str
    sweep: str
    pipeline: str
    text: str


NO_PROVIDER = "no Llama Stack server with provider inline::moe answers there"


class Call[Kind](NamedTuple):
    """One request.

    Attributes:
        kind: the kind of document that the server answers with.
        method: HTTP method.
        path: path below the API's prefix.
        query: parameters; those that are None are left out.
        body: what is sent as JSON; None: nothing.
        no_route: what it means if the server does not have this route, to follow its answer and a colon.
    """

    kind: type[Kind]
    method: str
    path: str
    query: Query = MappingProxyType({})
    body: Mapping[str, object] | None = None
    no_route: str = NO_PROVIDER


def health() -> Call[Health]:
    """Ask whether the server can accept and run jobs."""
    return Call(Health, "GET", "/health")


def submit(body: Mapping[str, object]) -> Call[Scheduled]:
    """Create a job."""
    return Call(Scheduled, "POST", "/jobs", body=body)


def validate(body: Mapping[str, object]) -> Call[Validated]:
    """Check a job without creating it."""
    return Call(Validated, "POST", "/jobs/validate", body=body)


def jobs(limit: int, after: str | None, filters: JobFilters) -> Call[JobList]:
    """List jobs, newest first."""
    chosen: dict[str, str | Sequence[str]] = {**filters}  # type: ignore[dict-item]  # no value of it is another object
    return Call(JobList, "GET", "/jobs", {"limit": limit, "after": after, **chosen})


def label(job_id: str, labels: Mapping[str, str | None], note: str | None) -> Call[JobLabels]:
    """Change labels of a job, and its note unless that is None."""
    body: dict[str, object] = {"labels": dict(labels)} | ({} if note is None else {"note": note or None})
    return Call(JobLabels, "PATCH", job_path(job_id), body=body)


def create_sweep(body: Mapping[str, object]) -> Call[CreatedSweep]:
    """Create a sweep."""
    return Call(CreatedSweep, "POST", "/sweeps", body=body)


def sweeps(limit: int, after: str | None) -> Call[SweepList]:
    """List sweeps, newest first."""
    return Call(SweepList, "GET", "/sweeps", {"limit": limit, "after": after})


def sweep(sweep_id: str) -> Call[Sweep]:
    """Ask for a sweep and its jobs."""
    return Call(Sweep, "GET", sweep_path(sweep_id))


def cancel_sweep(sweep_id: str) -> Call[SweepLine]:
    """Cancel a sweep."""
    return Call(SweepLine, "POST", sweep_path(sweep_id, "/cancel"))


def delete_sweep(sweep_id: str, force: bool) -> Call[DeletedSweep]:
    """Delete a sweep and its jobs."""
    return Call(DeletedSweep, "DELETE", sweep_path(sweep_id), {"force": "true" if force else None})


def activity() -> Call[Activity]:
    """Ask what runs on which device, and what waits."""
    return Call(Activity, "GET", "/activity")


def job(job_id: str) -> Call[Job]:
    """Ask for all details of a job."""
    return Call(Job, "GET", job_path(job_id))


def status(job_id: str) -> Call[Status]:
    """Ask for the status of a job."""
    return Call(Status, "GET", job_path(job_id, "/status"))


def artifacts(job_id: str) -> Call[Artifacts]:
    """List the artifacts of a job."""
    return Call(Artifacts, "GET", job_path(job_id, "/artifacts"))


def artifact_files(job_id: str, name: str) -> Call[ArtifactFiles]:
    """List the files of an artifact."""
    return Call(ArtifactFiles, "GET", job_path(job_id, f"/artifacts/{quote(name, safe='')}"))


def logs(job_id: str, tail: int | None, offset: int | None) -> Call[LogLines]:
    """Ask for lines of a job's output."""
    return Call(LogLines, "GET", job_path(job_id, "/logs"), {"tail": tail, "offset": offset})


def events(job_id: str, cursor: int, limit: int) -> Call[EventPage]:
    """Ask for a page of a job's events."""
    return Call(EventPage, "GET", job_path(job_id, "/events"), {"cursor": cursor, "limit": limit})


def metrics(job_id: str, names: Iterable[str] | None, since_step: int | None, limit: int) -> Call[MetricSeries]:
    """Ask for the metrics of a job's steps."""
    chosen = None if names is None else ",".join(names)
    query: Query = {"names": chosen, "since_step": since_step, "limit": limit}
    return Call(MetricSeries, "GET", job_path(job_id, "/metrics"), query)


def routing(job_id: str, layer: int | None, limit: int) -> Call[RoutingSeries]:
    """Ask how a job's routers used their experts."""
    return Call(RoutingSeries, "GET", job_path(job_id, "/routing"), {"layer": layer, "limit": limit})


def routing_shares(job_id: str) -> Call[RoutingShares]:
    """Ask for the share of every expert over a job's last steps."""
    return Call(RoutingShares, "GET", job_path(job_id, "/routing/shares"))


def samples(job_id: str, step: int | None, limit: int) -> Call[GeneratedSamples]:
    """Ask for answers that a job generated."""
    return Call(GeneratedSamples, "GET", job_path(job_id, "/samples"), {"step": step, "limit": limit})


def cancel(job_id: str) -> Call[object]:
    """Cancel a job."""
    return Call(object, "POST", job_path(job_id, "/cancel"))


def resume(job_id: str, experts_backend: str | None) -> Call[Scheduled]:
    """Resume a job."""
    body = None if experts_backend is None else {"moe": {"experts_backend": experts_backend}}
    return Call(Scheduled, "POST", job_path(job_id, "/resume"), body=body)


def delete(job_id: str, force: bool) -> Call[Deleted]:
    """Delete a job."""
    return Call(Deleted, "DELETE", job_path(job_id), {"force": "true" if force else None})


def export(job_id: str, body: Mapping[str, object]) -> Call[Scheduled]:
    """Export the model of a completed job."""
    return Call(Scheduled, "POST", job_path(job_id, "/exports"), body=body)


def exports(job_id: str) -> Call[ExportList]:
    """List the exports of a job."""
    return Call(ExportList, "GET", job_path(job_id, "/exports"))


def datasets(limit: int, after: str | None) -> Call[DatasetList]:
    """List uploaded data sets."""
    return Call(DatasetList, "GET", "/datasets", {"limit": limit, "after": after})


def dataset(name: str) -> Call[Dataset]:
    """Ask for the versions of a data set."""
    return Call(Dataset, "GET", dataset_path(name))


def delete_dataset(name: str, version: str | None) -> Call[DeletedDataset]:
    """Delete a data set, or one version of it."""
    return Call(DeletedDataset, "DELETE", dataset_path(name), {"version": version})


def profile(
    name: str,
    model: str | None,
    recipe: Recipe,
    max_length: int | None,
    version: str | None,
    max_completion_length: int | None,
) -> Call[DatasetProfile]:
    """Ask what a job would make of a data set.

    Args:
        name: the data set.
        model: as in a job; None: no token is counted.
        recipe: of the job.
        max_length: `options.max_length` of the job.
        version: beginning of the SHA-256 of a version; None: the current one.
        max_completion_length: of a job of recipe grpo or distill; None: the default.
    """
    query: Query = {
        "model": model, "recipe": recipe, "max_length": max_length, "version": version,
        "max_completion_length": max_completion_length,
    }  # fmt: skip
    return Call(DatasetProfile, "GET", dataset_path(name) + "/profile", query)


def playground(job_id: str) -> Call[Playground]:
    """Ask for a playground and its prompts."""
    return Call(Playground, "GET", job_path(job_id, "/prompts"))


def send_prompt(job_id: str, body: Mapping[str, object]) -> Call[SentPrompt]:
    """Send a prompt to a playground."""
    return Call(SentPrompt, "POST", job_path(job_id, "/prompts"), body=body)


def prompt_answer(job_id: str, number: int) -> Call[PromptAnswer]:
    """Ask for a prompt and its answer so far."""
    return Call(PromptAnswer, "GET", prompt_path(job_id, number))


def stop_prompt(job_id: str, number: int) -> Call[StoppedPrompt]:
    """Stop the answer to a prompt."""
    return Call(StoppedPrompt, "DELETE", prompt_path(job_id, number))


def quota() -> Call[Quota]:
    """Ask what the caller uses of the server."""
    return Call(Quota, "GET", "/quota")


def quotas() -> Call[QuotaList]:
    """Ask what every owner uses."""
    return Call(QuotaList, "GET", "/quotas")


def job_path(job_id: str, view: str = "") -> str:
    """Return the path of a job's route."""
    if not job_id or "/" in job_id or job_id.startswith("."):  # would lead to another route
        raise InvalidInput("ID", job_id, "a job's name; `moe-train ls` lists them")
    return f"/jobs/{quote(job_id, safe='')}{view}"


def prompt_path(job_id: str, number: int) -> str:
    """Return the path of the route of a playground's prompt."""
    return job_path(job_id, f"/prompts/{number}")


def sweep_path(sweep_id: str, view: str = "") -> str:
    """Return the path of a sweep's route."""
    if not sweep_id or "/" in sweep_id or sweep_id.startswith("."):  # would lead to another route
        raise InvalidInput("SWEEP", sweep_id, "a sweep's name; `moe-train sweeps` lists them")
    return f"/sweeps/{quote(sweep_id, safe='')}{view}"


def file_path(job_id: str, name: str, path: str) -> str:
    """Return the path of the route of one file of an artifact."""
    return job_path(job_id, f"/artifacts/{quote(name, safe='')}/{quote(path)}")


def dataset_path(name: str) -> str:
    """Return the path of a data set's route."""
    if not name or "/" in name or name.startswith("."):  # would lead to another route
        raise InvalidInput("NAME", name, "a data set's name; `moe-train data ls` lists them")
    return f"/datasets/{quote(name, safe='')}"
