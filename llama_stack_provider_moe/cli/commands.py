"""What can be typed after `moe-train`, and what it ends with."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import typer

from llama_stack_provider_moe.cli import export, local, plan, report, show
from llama_stack_provider_moe.cli.exits import OUTCOMES, Exit, exit_of
from llama_stack_provider_moe.cli.follow import Follower
from llama_stack_provider_moe.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.cli.pull import Puller
from llama_stack_provider_moe.cli.screen import Screen
from llama_stack_provider_moe.cli.server import Server, state_of
from llama_stack_provider_moe.cli.template import read_template
from llama_stack_provider_moe.cli.views import view
from llama_stack_provider_moe.errors import InvalidInput, MoeError, ServerLost, ServerRefused
from llama_stack_provider_moe.jobs.state import JobState

EPILOG = (
    "Exit codes: 0 done, or the job completed or runs on; 1 the job failed; 2 refused, or a mistake in the command "
    "line; 3 the job was cancelled; 4 no server, or it stopped answering; 130 interrupted (a job goes on)."
)

app = typer.Typer(
    name="moe-train", help="Post-training jobs of a Llama Stack server with provider inline::moe.", epilog=EPILOG,
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

app.add_typer(report.app, name="report")
app.add_typer(export.app, name="export")
app.command(name="plan")(plan.plan)

File = Annotated[str, typer.Argument(metavar="FILE", help="Job template, a JSON object; - reads standard input.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="BLOCK.FIELD=VALUE", help="Change the template; VALUE is JSON, or else text. Repeatable."
    ),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="The job.")]


class Where(NamedTuple):
    """A server, and who asks."""

    url: str
    key: str | None


@app.command()
def submit(
    file: File,
    changes: Changes = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the job has ended.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Create a job from a template; with --follow, end as the job ends."""

    def act(server: Server, screen: Screen) -> Exit:
        body = read_template(file, changes or [])
        with _hint(f"whether the job was created, this tells: {_typed(server, 'ls')}"):
            created = server.submit(body)
        job_id = str(created.get("job_uuid"))
        if follow:
            if screen.as_json:
                screen.line(created)
            return follow_job(server, screen, job_id)
        if screen.as_json:
            screen.document(created)
        else:
            screen.say(f"job {job_id} is scheduled")
            screen.note(ways_on(server, job_id))
        return Exit.OK

    run(Where(url, key), as_json, act)


@app.command()
def validate(
    file: File, changes: Changes = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False
) -> None:
    """Check a template and its rows as `submit` would, and create nothing."""

    def act(server: Server, screen: Screen) -> Exit:
        return _answer(screen, server.validate(read_template(file, changes or [])), show.validated)

    run(Where(url, key), as_json, act)


@app.command(name="ls")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most jobs to list.")] = 50,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Go on after this job.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""

    def act(server: Server, screen: Screen) -> Exit:
        return _answer(screen, server.jobs(limit, after), show.jobs)

    run(Where(url, key), as_json, act)


@app.command()
def status(
    job_id: Id,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until the job has ended.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Tell how a job stands; the exit code is its outcome."""

    def act(server: Server, screen: Screen) -> Exit:
        if watch:
            return follow_job(server, screen, job_id)
        job = server.job(job_id)
        _answer(screen, job, show.job)
        return OUTCOMES[state_of(job)]

    run(Where(url, key), as_json, act)


@app.command()
def logs(
    job_id: Id,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the job has ended; end as it ends.")] = False,
    tail: Annotated[int | None, typer.Option(min=1, max=10_000, help="Last lines only; the server's default is 200.")]
    = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Print the output of a job's training process."""

    def act(server: Server, screen: Screen) -> Exit:
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


@app.command()
def cancel(job_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Ask for a job to be cancelled; asking again changes nothing."""

    def act(server: Server, screen: Screen) -> Exit:
        server.cancel(job_id)
        state = state_of(server.status(job_id))
        if screen.as_json:
            screen.document({"job_uuid": job_id, "status": state.value})
        elif state is JobState.CANCELLED:
            screen.say(f"job {job_id} is cancelled")
        else:
            screen.say(f"job {job_id} will be cancelled after the step at hand, with a checkpoint")
        return Exit.OK

    run(Where(url, key), as_json, act)


@app.command()
def resume(
    job_id: Id,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the job has ended; end as it ends.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Let a cancelled or failed job go on from its last checkpoint; an export, with what is not done yet."""

    def act(server: Server, screen: Screen) -> Exit:
        resumed = server.resume(job_id)
        if follow:
            if screen.as_json:
                screen.line(resumed)
            return follow_job(server, screen, job_id)
        if screen.as_json:
            screen.document(resumed)
        else:
            screen.say(f"job {job_id} is scheduled again, and goes on from what it has saved")
            screen.note(ways_on(server, job_id))
        return Exit.OK

    run(Where(url, key), as_json, act)


@app.command()
def rm(job_id: Id, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Delete a job that has ended, with all its files."""

    def act(server: Server, screen: Screen) -> Exit:
        return _answer(screen, server.delete(job_id), show.deleted)

    run(Where(url, key), as_json, act)


@app.command()
def artifacts(
    job_id: Id,
    pull: Annotated[
        Path | None, typer.Option("--pull", metavar="DIR", help="Fetch them into DIR, checked; again: goes on.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="With --pull: this artifact. Repeatable.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List what a job has left so far, or fetch it: checkpoints, adapter, models."""

    def act(server: Server, screen: Screen) -> Exit:
        if pull is None:
            if only:
                raise InvalidInput("--only", only, "--pull DIR beside it")
            return _answer(screen, server.artifacts(job_id), show.artifacts)
        with _hint("what has come is kept; the same command again goes on from there"):
            files = list(Puller(server, job_id, pull, screen.note).pull(only or []))
        return _answer(screen, {"job_uuid": job_id, "files": files}, show.pulled)

    run(Where(url, key), as_json, act)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def upcycle(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="SOURCE OUT ...", help="--help lists them.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a dense model into a Mixture-of-Experts of the same function; needs torch, no server."""
    end(as_json, lambda screen: local.upcycle(screen, arguments or []))


analyze = typer.Typer(help="Find out about a model, here; needs torch, no server.", no_args_is_help=True)
app.add_typer(analyze, name="analyze")


@analyze.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def routing(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL --set NAME=FILE --set NAME=FILE ...", help="--help lists them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell which experts serve which prompts, by comparing two or more files of rows."""
    end(as_json, lambda screen: local.analyze_routing(screen, arguments or []))


@app.command(
    name="eval",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def evaluate(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL --refuse FILE --safe FILE ...", help="--help lists them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure refusals, over-refusals, perplexity and tool calls of a model; needs torch, no server of ours."""
    end(as_json, lambda screen: local.evaluate(screen, arguments or []))


@app.command()
def supervisor(
    run_config: Annotated[Path, typer.Option("--run-config", metavar="FILE", help="The server's run YAML.")],
    provider_id: Annotated[str | None, typer.Option(help="Which inline::moe, where the YAML has several.")] = None,
    exit_when_idle: Annotated[
        bool, typer.Option("--exit-when-idle", help="Leave after the YAML's idle_exit_s; else stay.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a server's jobs here, on a machine that shares its store and state folder."""
    end(as_json, lambda screen: local.supervise(screen, run_config, provider_id, exit_when_idle))


def _answer(screen: Screen, document: dict[str, Any], shown: Callable[[dict[str, Any]], Any]) -> Exit:
    if screen.as_json:
        screen.document(document)
    else:
        screen.say(shown(document))
    return Exit.OK


def follow_job(server: Server, screen: Screen, job_id: str) -> Exit:
    """Show how a job stands until it has ended; its outcome."""
    last: dict[str, Any] = {}
    with _hint(f"the job goes on without this command. {ways_on(server, job_id)}"), view(screen) as shown:
        for last in Follower(server, job_id, screen.note).statuses():
            shown.show(last)
    return OUTCOMES[state_of(last)]


def _follow_output(server: Server, screen: Screen, job_id: str, tail: int | None) -> Exit:
    with _hint(f"the job goes on without this command. {ways_on(server, job_id, 'logs', '--follow')}"):
        for piece in Follower(server, job_id, screen.note).output(tail):
            if screen.as_json:
                screen.line(piece)
            else:
                screen.print(piece["log_lines"])
        return OUTCOMES[state_of(server.status(job_id))]


@contextmanager
def _hint(hint: str) -> Iterator[None]:
    """Say what to do next where the server is lost, or the user leaves, inside."""
    try:
        yield
    except (KeyboardInterrupt, ServerLost, ServerRefused) as error:
        if isinstance(error, KeyboardInterrupt) or (exit_of(error) is Exit.LOST and getattr(error, "asked", True)):
            error.add_note(hint)
        raise


def ways_on(server: Server, job_id: str, command: str = "status", option: str = "--watch") -> str:
    """What can be typed next about a job."""
    follow, stop = _typed(server, command, job_id, option), _typed(server, "cancel", job_id)
    return f"Follow it: {follow}   cancel it: {stop}"


def _typed(server: Server, *words: str) -> str:
    """A command as it must be typed to reach the same server."""
    is_found = server.url == os.environ.get("MOE_TRAIN_URL", DEFAULT_URL)
    return " ".join(["moe-train", *words, *([] if is_found else ["--url", server.url])])


def run(where: Where, as_json: bool, act: Callable[[Server, Screen], int]) -> NoReturn:
    """Do it with a server, and leave as `end` does."""

    def ask(screen: Screen) -> int:
        with Server(where.url, where.key) as server:
            return act(server, screen)

    end(as_json, ask)


def end(as_json: bool, act: Callable[[Screen], int]) -> NoReturn:
    """Do it, say what went wrong, and leave with the exit code."""
    screen = Screen(as_json)
    try:
        code = act(screen)
        sys.stdout.flush()
    except MoeError as error:
        code = exit_of(error)
        screen.error(error, str(error), code)
    except KeyboardInterrupt as interrupt:
        code = Exit.INTERRUPTED
        screen.error(interrupt, "interrupted", code)
    except BrokenPipeError:
        code = Exit.PIPE_CLOSED
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit fails too
    raise typer.Exit(code)


def main(arguments: list[str] | None = None) -> int:
    """`moe-train`; the exit code. Without `--json`, typer tells of mistakes in the command line and exits itself."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        return int(app(args=words, prog_name="moe-train", standalone_mode=not as_json) or Exit.OK)
    except typer.TyperException as error:
        Screen(as_json).error(error, error.format_message(), Exit.REFUSED)
        return Exit.REFUSED
