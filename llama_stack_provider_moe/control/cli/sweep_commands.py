"""`moe-train sweep` and `moe-train sweeps`: one job with every combination of some settings."""

import json
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.client.sweep_documents import DeletedSweep, Sweep, SweepLine, SweepList
from llama_stack_provider_moe.control.cli import label
from llama_stack_provider_moe.control.cli.act import Where, answer, hint, run, typed
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import OUTCOMES, Exit
from llama_stack_provider_moe.control.cli.job_file import parse_json
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.control.cli.show import figure, moment
from llama_stack_provider_moe.control.cli.submit_commands import Changes, File
from llama_stack_provider_moe.control.cli.template import read_template
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.state import JobState

Grid = Annotated[
    list[str],
    typer.Option(
        "--grid",
        metavar="BLOCK.FIELD=VALUE,VALUE",
        help="Setting and the values to try; every combination is a job. Each value is JSON, or else text; a JSON list "
        "lists values that have commas. Repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands about sweeps to `moe-train`."""
    app.command()(sweep)
    app.command()(sweeps)


def sweep(
    file: File,
    grid: Grid,
    changes: Changes = None,
    name: Annotated[str | None, typer.Option(metavar="ID", help="Name of the sweep; default: the server's.")] = None,
    random: Annotated[
        int | None, typer.Option(min=1, help="Number of combinations to draw at random; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    halving: Annotated[
        bool, typer.Option("--halving", help="End jobs early that do worse than others at the same evaluation.")
    ] = False,
    hyperband: Annotated[bool, typer.Option("--hyperband", help="The same by Hyperband, for many jobs.")] = False,
    reduction: Annotated[int, typer.Option(min=2, help="With early ending: of so many jobs, one goes on.")] = 2,
    max_parallel: Annotated[int, typer.Option(min=1, max=64, help="Jobs that run at once at most.")] = 1,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="Figure on the held-out rows that ranks the jobs.")
    ] = "validation_loss",
    maximize: Annotated[bool, typer.Option("--maximize", help="A larger figure is better.")] = False,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Label of every job. Repeatable.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Run a job file with every combination of some settings, and rank the jobs by a held-out figure."""

    def act(server: Client, screen: Screen) -> Exit:
        job = read_template(file, changes or [])
        label.put_into(job, labels or [], None)
        body: dict[str, object] = {
            "job": job, "parameters": parameters(grid), "random": random, "seed": seed, "max_parallel": max_parallel,
            "metric": metric, "direction": "maximize" if maximize else "minimize",
        }  # fmt: skip
        if halving and hyperband:
            raise InvalidInput("--hyperband", True, "one way to end jobs early; --halving is another")
        if halving or hyperband:
            pruner = "hyperband" if hyperband else "successive_halving"
            body["halving"] = {"pruner": pruner, "reduction_factor": reduction}
        if name is not None:
            body["sweep_uuid"] = name
        with hint(f"to see whether the sweep was created: {typed(server, 'sweeps')}"):
            created = server.create_sweep(body)
        if screen.as_json:
            screen.document(created)
            return Exit.OK
        sweep_id = created["sweep_uuid"]
        screen.say(f"sweep {sweep_id} has {len(created['jobs'])} jobs, {created['jobs'][0]} to {created['jobs'][-1]}")
        for note in created["notes"]:
            screen.note(note)
        screen.note(f"to see them ranked: {typed(server, 'sweeps', sweep_id)}")
        return Exit.OK

    run(Where(url, key), as_json, act)


def sweeps(
    sweep_id: Annotated[
        str | None, typer.Argument(metavar="SWEEP", help="Name of a sweep to show with its jobs; default: list all.")
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel all jobs of the sweep.")] = False,
    rm: Annotated[bool, typer.Option("--rm", help="Delete the sweep, which has ended, with its jobs.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --rm: delete jobs even if other jobs need their files.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Number of sweeps to list at most.")] = 50,
    after: Annotated[str | None, typer.Option(metavar="SWEEP", help="Sweep after which the list starts.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List sweeps, newest first; or show one with its jobs, the best first; or cancel or delete one.

    The exit code of a sweep that is shown is that of a job: 1 if it has ended and no job of it completed.
    """

    def act(server: Client, screen: Screen) -> Exit:
        if sweep_id is None:
            if cancel or rm:
                raise InvalidInput("SWEEP", None, "the name of the sweep")
            return answer(screen, server.sweeps(limit, after), listed)
        if cancel and rm:
            raise InvalidInput("--rm", True, "one of --cancel and --rm; a sweep must have ended to be deleted")
        if cancel:
            return answer(screen, server.cancel_sweep(sweep_id), cancelled)
        if rm:
            return answer(screen, server.delete_sweep(sweep_id, force), deleted)
        found = server.sweep(sweep_id)
        answer(screen, found, shown)
        return OUTCOMES[JobState(found["status"])]

    run(Where(url, key), as_json, act)


def parameters(grid: Iterable[str]) -> dict[str, list[object]]:
    """Return the values to try by setting, from `BLOCK.FIELD=VALUE,VALUE`.

    Raises:
        InvalidInput: one has another form.
    """
    found: dict[str, list[object]] = {}
    for each in grid:
        path, equals, given = each.partition("=")
        if not equals or not path.strip() or not given.strip():
            raise InvalidInput("--grid", each, "BLOCK.FIELD=VALUE,VALUE, such as optimizer.lr=1e-4,2e-4")
        if path.strip() in found:
            raise InvalidInput("--grid", each, f"each setting once; {path.strip()} is there twice")
        whole = _value(given)
        found[path.strip()] = whole if isinstance(whole, list) else [_value(part) for part in given.split(",")]
    return found


def _value(given: str) -> object:
    try:
        return parse_json(given)
    except (ValueError, RecursionError):
        return given.strip()


def listed(document: SweepList) -> RenderableType:
    """Render one line per sweep."""
    if not document["data"]:
        return "no sweeps"
    rows = [
        (each["sweep_uuid"], each["status"], _counts(each), moment(each["created_at"])) for each in document["data"]
    ]
    found = table(("SWEEP", "STATUS", "JOBS", "CREATED"), rows)
    if not document["has_more"]:
        return found
    return Group(found, text(f"there are more: moe-train sweeps --after {rows[-1][0]}"))


def shown(document: Sweep) -> RenderableType:
    """Render a sweep: one line per job, the best first."""
    settings = list(document["parameters"])
    heads = ("RANK", "JOB", "STATUS", document["metric"].upper(), "EVALUATIONS", *settings)
    rows = [
        (
            "-" if job["rank"] is None else str(job["rank"]),
            job["job_uuid"],
            "ended early" if job["ended_early"] and job["status"] == "cancelled" else job["status"],
            figure(job["figure"]),
            str(job["evaluations"]),
            *(json.dumps(job["chosen"].get(name)) for name in settings),
        )
        for job in document["data"]
    ]
    head = f"sweep {document['sweep_uuid']}: {document['status']}, {_counts(document)}"
    failed = [
        text(f"{job['job_uuid']} failed: {job['reason']}")
        for job in document["data"]
        if job["status"] == "failed" and job["reason"]
    ]
    best = [text(f"best: {document['best']}")] if document["best"] else []
    return Group(text(head), table(heads, rows), *failed, *best)


def cancelled(document: SweepLine) -> str:
    """Say that a sweep is cancelled, or will be."""
    if document["status"] == "cancelled":
        return f"sweep {document['sweep_uuid']} is cancelled"
    if JobState(document["status"]).over:  # what ran had completed before it could be stopped
        return f"sweep {document['sweep_uuid']} has ended: {_counts(document)}"
    return f"sweep {document['sweep_uuid']} will be cancelled: {_counts(document)}"


def deleted(document: DeletedSweep) -> str:
    """Say that a sweep was deleted, and what remains."""
    told = f"sweep {document['sweep_uuid']} is deleted, with {len(document['jobs'])} jobs"
    told += f"; checkpoints stay in {', '.join(document['kept'])}" if document["kept"] else ""
    return told + "".join(f"\nbroken: {each}" for each in document["broken"])


def _counts(sweep: SweepLine) -> str:
    return ", ".join(f"{count} {state}" for state, count in sweep["jobs"].items())
