"""`moe-train pipeline` and `moe-train pipelines`: jobs of which later ones take what earlier ones leave."""

import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.client.pipeline_documents import (
    DeletedPipeline,
    Part,
    Pipeline,
    PipelineLine,
    PipelineList,
    ResumedPipeline,
    ValidatedPipeline,
)
from llama_stack_provider_moe.control.cli import packaged, show
from llama_stack_provider_moe.control.cli.act import Where, answer, hint, run, typed
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import OUTCOMES, Exit
from llama_stack_provider_moe.control.cli.follow import Patience
from llama_stack_provider_moe.control.cli.job_file import read_job_file
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.control.cli.template import apply_changes
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.state import JobState

POLL_S = 1.0
PipelineFile = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="Pipeline file in YAML or JSON; - for standard input, @NAME for a template of `moe-train templates`.",
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PART.FIELD=VALUE",
        help="Change of a part's job: its name, and a field of the job, as math.optimizer.lr=1e-4. Repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands about pipelines to `moe-train`."""
    app.command()(pipeline)
    app.command()(pipelines)


def pipeline(
    file: PipelineFile,
    changes: Changes = None,
    name: Annotated[str | None, typer.Option(metavar="ID", help="Name of the pipeline; default: the file's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all parts, and create nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until the pipeline has ended.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Run the jobs of a pipeline file, each as soon as those that it names have completed.

    With --follow, the exit code is the pipeline's outcome.
    """

    def act(server: Client, screen: Screen) -> Exit:
        body, _ = read_job_file(file, packaged.pipeline_template)
        change(body, changes or [])
        if name is not None:
            body["pipeline_uuid"] = name
        if dry_run:
            return answer(screen, server.validate_pipeline(body), validated)
        with hint(f"to see whether the pipeline was created: {typed(server, 'pipelines')}"):
            created = server.create_pipeline(body)
        pipeline_id = created["pipeline_uuid"]
        if screen.as_json:
            (screen.line if follow else screen.document)(created)
        else:
            screen.say(
                f"pipeline {pipeline_id} has {len(created['jobs'])} parts: {', '.join(created['jobs'].values())}"
            )
            for note in created["notes"]:
                screen.note(note)
        if follow:
            return followed(server, screen, pipeline_id)
        if not screen.as_json:
            screen.note(f"to see its parts: {typed(server, 'pipelines', pipeline_id)}")
        return Exit.OK

    run(Where(url, key), as_json, act)


def pipelines(
    pipeline_id: Annotated[
        str | None,
        typer.Argument(metavar="PIPELINE", help="Name of a pipeline to show with its parts; default: list all."),
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel all jobs of the pipeline.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the jobs that failed or were cancelled; completed ones stay.")
    ] = False,
    rm: Annotated[bool, typer.Option("--rm", help="Delete the pipeline, which has ended, with its jobs.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --rm: delete jobs even if other jobs need their files.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until the pipeline has ended.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Number of pipelines to list at most.")] = 50,
    after: Annotated[str | None, typer.Option(metavar="PIPELINE", help="Pipeline after which the list starts.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List pipelines, newest first; or show one with its parts; or cancel, resume or delete one.

    The exit code of a pipeline that is shown is its outcome, as that of a job.
    """

    def act(server: Client, screen: Screen) -> Exit:
        if pipeline_id is None:
            if cancel or rm or resume or follow:
                raise InvalidInput("PIPELINE", None, "the name of the pipeline")
            return answer(screen, server.pipelines(limit, after), listed)
        if cancel + rm + resume > 1:
            raise InvalidInput("--cancel, --resume, --rm", cancel + rm + resume, "one of them")
        if rm:
            return answer(screen, server.delete_pipeline(pipeline_id, force), deleted)
        if cancel:
            answer(screen, server.cancel_pipeline(pipeline_id), cancelled)
        if resume:
            answer(screen, server.resume_pipeline(pipeline_id), resumed)
        if follow:
            return followed(server, screen, pipeline_id)
        if cancel or resume:
            return Exit.OK
        found = server.pipeline(pipeline_id)
        answer(screen, found, shown)
        if not screen.as_json:
            for job_id in _with_logs(found["parts"]):
                screen.note(f"to see why: {typed(server, 'logs', job_id)}")
        return OUTCOMES[JobState(found["status"])]

    run(Where(url, key), as_json, act)


def change(body: dict[str, object], changes: list[str]) -> None:
    """Apply each `part.field=value` to the part's job, in place.

    Raises:
        InvalidInput: there is no such part, or the change does not fit into its job.
    """
    given = body.get("parts")
    parts = [part for part in given if isinstance(part, dict)] if isinstance(given, list) else []
    jobs = {str(part.get("name")): part["job"] for part in parts if isinstance(part.get("job"), dict)}
    for each in changes:
        part, dot, rest = each.partition(".")
        if not dot or part not in jobs:
            raise InvalidInput("--set", each, f"PART.FIELD=VALUE with one of the parts {', '.join(jobs)}")
        apply_changes(jobs[part], [rest])


def followed(server: Client, screen: Screen, pipeline_id: str) -> Exit:
    """Print each change of a part until the pipeline has ended; return its outcome."""
    said: dict[str, str] = {}
    patience = Patience(screen.note)
    with hint(f"the pipeline continues without this command: {typed(server, 'pipelines', pipeline_id, '--follow')}"):
        while True:
            found = patience.ask(lambda: server.pipeline(pipeline_id))
            for part in found["parts"]:
                told = _standing(part)
                if said.get(part["name"]) != told:
                    said[part["name"]] = told
                    if screen.as_json:
                        screen.line(part)
                    else:
                        screen.say(f"{part['name']}: {told}")
            state = JobState(found["status"])
            if state.over:
                if not screen.as_json:
                    screen.say(f"pipeline {pipeline_id}: {state.value}")
                return OUTCOMES[state]
            time.sleep(POLL_S)


def _standing(part: Part) -> str:
    """The state of a part without its steps, which change all the time."""
    told = part["status"]
    if part["waits_for"]:
        told += f", {show.waits(part['waits_for'])}"
    elif part["status"] == JobState.IN_PROGRESS:
        told += f", {part['stage']}"
    return told + (f": {part['reason']}" if part["reason"] else "")


def listed(document: PipelineList) -> RenderableType:
    """Render one line per pipeline."""
    if not document["data"]:
        return "no pipelines"
    rows = [
        (each["pipeline_uuid"], each["status"], _counts(each), show.moment(each["created_at"]))
        for each in document["data"]
    ]
    found = table(("PIPELINE", "STATUS", "JOBS", "CREATED"), rows)
    if not document["has_more"]:
        return found
    return Group(found, text(f"there are more: moe-train pipelines --after {rows[-1][0]}"))


def shown(document: Pipeline) -> RenderableType:
    """Render a pipeline: one line per part."""
    rows = [(part["name"], part["job_uuid"], part["recipe"], part["status"], _now(part)) for part in document["parts"]]
    head = f"pipeline {document['pipeline_uuid']}: {document['status']}, {_counts(document)}"
    reasons = [text(f"{part['name']}: {part['reason']}") for part in document["parts"] if part["reason"]]
    if document.get("lost"):  # an older server doesn't say
        lost = ", ".join(document["lost"])
        reasons.append(text(f"deleted before it had completed, so the pipeline can't be resumed: {lost}"))
    return Group(text(head), table(("PART", "JOB", "RECIPE", "STATUS", "NOW"), rows), *reasons)


def _with_logs(parts: list[Part]) -> list[str]:
    """Return the jobs that failed after they had started, a part's or that of its export: the others have no log."""
    failed = [part for part in parts if part["status"] == JobState.FAILED and part["attempts"]]
    return [
        next((each["job_uuid"] for each in part["exports"] if each["status"] == JobState.FAILED), part["job_uuid"])
        for part in failed
    ]


def _now(part: Part) -> str:
    if part["waits_for"]:
        return show.waits(part["waits_for"])
    if part["status"] != JobState.IN_PROGRESS:
        return "-"
    return part["stage"] + (f", step {part['step']} of {part['max_steps']}" if part["step"] is not None else "")


def validated(document: ValidatedPipeline) -> str:
    """Say what each part's job would be."""
    told = []
    for name, job in document["parts"].items():
        model = job.get("model", job["spec"].get("model"))  # an older server doesn't say
        rows = sum(job["rows"].values())
        told.append(f"{name}: {job['spec'].get('recipe')} of {model}" + (f", {rows} rows" if rows else ""))
        told += [f"  {note}" for note in job.get("notes", [])]
    return "\n".join([*told, "every part would be accepted"])


def cancelled(document: PipelineLine) -> str:
    """Say that a pipeline is cancelled, or will be."""
    if document["status"] == JobState.CANCELLED:
        return f"pipeline {document['pipeline_uuid']} is cancelled"
    if JobState(document["status"]).over:  # what ran had completed before it could be stopped
        return f"pipeline {document['pipeline_uuid']} has ended: {_counts(document)}"
    return f"pipeline {document['pipeline_uuid']} will be cancelled: {_counts(document)}"


def resumed(document: ResumedPipeline) -> str:
    """Say which jobs run again."""
    told = [f"{job['job_uuid']}{show.RESUMES.get(job['resumes'], '')}" for job in document["jobs"]]
    return f"pipeline {document['pipeline_uuid']} is resumed: {', '.join(told)}"


def deleted(document: DeletedPipeline) -> str:
    """Say that a pipeline was deleted, and what remains."""
    told = f"pipeline {document['pipeline_uuid']} is deleted, with {len(document['jobs'])} jobs"
    told += f"; checkpoints stay in {', '.join(document['kept'])}" if document["kept"] else ""
    return told + "".join(f"\nbroken: {each}" for each in document["broken"])


def _counts(pipeline: PipelineLine) -> str:
    return ", ".join(f"{count} {state}" for state, count in pipeline["jobs"].items())
