"""Commands about jobs that a server has: `moe-train ls`, `status`, `logs` and the like."""

from pathlib import Path
from typing import Annotated, cast

import typer

from llama_stack_provider_moe.client.calls import JobFilters
from llama_stack_provider_moe.client.documents import Pulled
from llama_stack_provider_moe.client.pull import Puller
from llama_stack_provider_moe.control.cli import show
from llama_stack_provider_moe.control.cli.act import Where, answer, follow_job, hint, run, ways_on
from llama_stack_provider_moe.control.cli.client import Client, state_of
from llama_stack_provider_moe.control.cli.exits import OUTCOMES, Exit
from llama_stack_provider_moe.control.cli.follow import Follower
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.state import JobState

Id = Annotated[str, typer.Argument(metavar="ID", help="Name of the job.")]


def register(app: typer.Typer) -> None:
    """Add the commands about jobs that exist to `moe-train`."""
    for command in (status, logs, cancel, resume, rm, artifacts):
        app.command()(command)
    app.command(name="ls")(list_jobs)


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Number of jobs to list at most.")] = 50,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Job after which the list starts.")] = None,
    state: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="State of the jobs. Repeatable for others.")
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="KEY=VALUE", help="Label of the jobs, or KEY with any value. Repeatable: all of them."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="Recipe of the jobs.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Model of the jobs, as the list shows it.")] = None,
    sweep: Annotated[str | None, typer.Option(metavar="SWEEP", help="Sweep that the jobs belong to.")] = None,
    pipeline: Annotated[str | None, typer.Option(metavar="PIPELINE", help="Pipeline that the jobs belong to.")] = None,
    owner: Annotated[
        str | None, typer.Option(metavar="OWNER", help="Owner, as `--json` shows it; only for administrators.")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--text", metavar="TEXT", help="A part of name, model, note or a label's value.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first: all, or those that fit every filter."""
    single = {
        "recipe": recipe, "model": model, "sweep": sweep, "pipeline": pipeline, "owner": owner, "text": part,
    }  # fmt: skip
    chosen = {name: value for name, value in single.items() if value is not None}

    def act(server: Client, screen: Screen) -> Exit:
        filters = cast(JobFilters, chosen | {"state": state or [], "label": labels or []})
        return answer(screen, server.jobs(limit, after, **filters), show.jobs)

    run(Where(url, key), as_json, act)


def status(
    job_id: Id,
    watch: Annotated[bool, typer.Option("--watch", help="Wait until the job has ended.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show the status of a job; the exit code is its outcome."""

    def act(server: Client, screen: Screen) -> Exit:
        if watch:
            return follow_job(server, screen, job_id)
        job = server.job(job_id)
        answer(screen, job, show.job)
        return OUTCOMES[state_of(job)]

    run(Where(url, key), as_json, act)


def logs(
    job_id: Id,
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait until the job has ended; the exit code is its outcome.")
    ] = False,
    tail: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Number of last lines to print; default: the server's, 200.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Print the output of a job's training process."""

    def act(server: Client, screen: Screen) -> Exit:
        if follow:
            return _follow_output(server, screen, job_id, tail)
        piece = server.logs(job_id, tail=tail)
        if screen.as_json:
            screen.document(piece)
        elif piece["log_lines"]:
            screen.print(piece["log_lines"])
        else:
            screen.note("no output yet")
        return Exit.OK

    run(Where(url, key), as_json, act)


def cancel(job_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Cancel a job. Repeating the command is harmless."""

    def act(server: Client, screen: Screen) -> Exit:
        server.cancel(job_id)
        state = state_of(server.status(job_id))
        if screen.as_json:
            screen.document({"job_uuid": job_id, "status": state.value})
        elif state is JobState.CANCELLED:
            screen.say(f"job {job_id} is cancelled")
        else:
            screen.say(
                f"job {job_id} will be cancelled: after its current step, with a checkpoint, or immediately if it "
                "has not started its first step"
            )
        return Exit.OK

    run(Where(url, key), as_json, act)


def resume(
    job_id: Id,
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait until the job has ended; the exit code is its outcome.")
    ] = False,
    experts_backend: Annotated[
        str | None,
        typer.Option(
            metavar="BACKEND",
            help="Code that computes the experts from now on, in place of the job's moe.experts_backend: auto, torch, "
            "triton, quack or peft.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Resume a cancelled or failed job from its last checkpoint, or from the beginning if there is none."""

    def act(server: Client, screen: Screen) -> Exit:
        resumed = server.resume(job_id, experts_backend)
        if follow:
            if screen.as_json:
                screen.line(resumed)
            return follow_job(server, screen, job_id)
        if screen.as_json:
            screen.document(resumed)
        else:
            screen.say(f"job {job_id} is scheduled again{show.RESUMES.get(str(resumed.get('resumes')), '')}")
            screen.note(ways_on(server, job_id))
        return Exit.OK

    run(Where(url, key), as_json, act)


def rm(
    job_id: Id,
    force: Annotated[
        bool, typer.Option("--force", help="Delete the job even if other jobs need its files, and list those jobs.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Delete a job that has ended, and all its files."""

    def act(server: Client, screen: Screen) -> Exit:
        return answer(screen, server.delete(job_id, force), show.deleted)

    run(Where(url, key), as_json, act)


def artifacts(
    job_id: Id,
    pull: Annotated[
        Path | None,
        typer.Option(
            "--pull",
            metavar="DIR",
            help="Folder to download the artifacts to. Files are verified; repeat the command to resume.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="With --pull: name of an artifact to download. Repeatable."),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List or download the artifacts of a job: checkpoints, adapter, models."""

    def act(server: Client, screen: Screen) -> Exit:
        if pull is None:
            if only:
                raise InvalidInput("--only", only, "--pull DIR as well")
            return answer(screen, server.artifacts(job_id), show.artifacts_and_report)
        with hint("downloaded files are kept; repeat the command to resume"):
            files = list(Puller(server, job_id, pull, screen.note).pull(only or []))
        return answer(screen, Pulled(job_uuid=job_id, files=files), show.pulled)

    run(Where(url, key), as_json, act)


def _follow_output(server: Client, screen: Screen, job_id: str, tail: int | None) -> Exit:
    with hint(f"the job continues without this command. {ways_on(server, job_id, 'logs', '--follow')}"):
        for piece in Follower(server, job_id, screen.note).output(tail):
            if screen.as_json:
                screen.line(piece)
            else:
                screen.print(piece["log_lines"])
        return OUTCOMES[state_of(server.status(job_id))]
