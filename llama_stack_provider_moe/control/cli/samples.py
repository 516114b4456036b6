"""`moe-train samples`: the answers that a job generated, with their rewards."""

from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from llama_stack_provider_moe.client.sweep_documents import GeneratedSamples
from llama_stack_provider_moe.control.cli.act import Where, answer, run
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen, text

SHOWN = 300  # characters of an answer in the table


def register(app: typer.Typer) -> None:
    """Add `samples` to `moe-train`."""
    app.command()(samples)


def samples(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job.")],
    step: Annotated[
        int | None, typer.Option(metavar="STEP", help="Step that learns from them first; default: the newest.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Largest number of answers.")] = 20,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show answers that a GRPO or distill job generated, with the value of each grader."""

    def act(server: Client, screen: Screen) -> Exit:
        return answer(screen, server.samples(job_id, step, limit), shown)

    run(Where(url, key), as_json, act)


def shown(document: GeneratedSamples) -> RenderableType:
    """Render answers, one row each."""
    if not document["data"]:
        return text(
            f"job {document['job_uuid']} has no answers; GRPO jobs with rl.keep_samples above 0 keep some, and distill "
            "jobs with generation.keep_samples above 0"
        )
    graders = list(document["data"][0]["rewards"])
    graded = ("reward", *graders, "advantage") if graders else ()
    table = Table("step", "group", "tokens", *graded, "answer", box=None, padding=(0, 2, 0, 0))
    for each in document["data"]:
        figures = [_figure(each["reward"]), *(_figure(each["rewards"].get(name)) for name in graders)]
        figures.append("-" if each["advantage"] is None else f"{each['advantage']:+.2f}")
        table.add_row(
            str(each["step"]), str(each["group"]), f"{each['tokens']}{' (cut)' * each['truncated']}",
            *(figures if graders else ()), text(" ".join(each["completion"].split())[:SHOWN]),
        )  # fmt: skip
    steps = document["steps"]
    return Group(table, text(f"answers of {len(steps)} steps are there, {steps[0]} to {steps[-1]}"))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
