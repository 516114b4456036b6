"""`moe-train submit` and `validate`, which read job files."""

from typing import Annotated

import typer

from llama_stack_provider_moe.control.cli import label, show
from llama_stack_provider_moe.control.cli.act import Where, answer, follow_job, hint, run, typed, ways_on
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.control.cli.template import read_template
from llama_stack_provider_moe.errors import InvalidInput

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="Job file in JSON or YAML; - for standard input, @NAME for a template of `moe-train templates`.",
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="BLOCK.FIELD=VALUE",
        help="Change of a field in the job file; VALUE is JSON, or else text. Repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add both commands to `moe-train`."""
    app.command()(submit)
    app.command()(validate)


def submit(
    file: File,
    changes: Changes = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label to find the job by. Repeatable.")
    ] = None,
    note: Annotated[str | None, typer.Option(metavar="TEXT", help="Note about the job.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until the job has ended.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only have the server check the job and its rows; create nothing.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Create a job from a job file; with --follow, the exit code is the job's outcome."""

    def act(server: Client, screen: Screen) -> Exit:
        body = read_template(file, changes or [])
        label.put_into(body, labels or [], note)
        if dry_run:
            if follow:
                raise InvalidInput("--follow", "--dry-run", "one of them: a dry run creates no job to follow")
            return answer(screen, server.validate(body), show.validated)
        with hint(f"to see whether the job was created: {typed(server, 'ls')}"):
            created = server.submit(body)
        job_id = str(created.get("job_uuid"))
        if follow:
            if screen.as_json:
                screen.line(created)
            for line in [] if screen.as_json else created.get("notes", []):
                screen.note(line)
            return follow_job(server, screen, job_id)
        if screen.as_json:
            screen.document(created)
        else:
            screen.say(f"job {job_id} is scheduled")
            for line in created.get("notes", []):
                screen.note(line)
            screen.note(ways_on(server, job_id))
        return Exit.OK

    run(Where(url, key), as_json, act)


def validate(
    file: File, changes: Changes = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False
) -> None:
    """Check a job file and its rows as `submit` does, but create nothing; the same as `submit --dry-run`."""

    def act(server: Client, screen: Screen) -> Exit:
        return answer(screen, server.validate(read_template(file, changes or [])), show.validated)

    run(Where(url, key), as_json, act)
