"""`moe-train plan`: check whether a job fits on your GPUs, with which strategy, and what would make it fit."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from llama_stack_provider_moe.control.cli import model_checks
from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import Json
from llama_stack_provider_moe.control.cli.planning_documents import Plan, PlanDocument
from llama_stack_provider_moe.control.cli.report import TERMS, answer_of
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.control.cli.show import duration, size
from llama_stack_provider_moe.control.cli.template import read_template, training_job
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.spec.expected_images import IMAGE_SIZE, MOST_IMAGES, sides_of
from llama_stack_provider_moe.spec.run_time import RunTime

_MODULE = "llama_stack_provider_moe.compute.planning.plan_command"
_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
LEAST, MOST = 10**8, 10**13  # bytes of a device


def register(app: typer.Typer) -> None:
    """Add `plan` to `moe-train`."""
    app.command()(plan)


def bytes_of(written: str) -> int:
    """`80GB` -> 80,000,000,000; GiB are 2**30.

    Raises:
        InvalidInput: the text is not a size, or no device has this much memory.
    """
    found = _SIZE.fullmatch(written.strip())
    count = float(found[1]) * _UNITS.get(found[2].upper(), 0) if found else 0
    if not LEAST <= count <= MOST:
        raise InvalidInput("--memory", written, "a size of 100MB to 10TB, such as 80GB or 141GB (GiB: 2**30 bytes)")
    return int(count)


def _count(processes: int, what: str) -> str:
    return number_of(processes, "GPU") if what == "device" else number_of(processes, "process", "processes")


def shown(document: PlanDocument) -> RenderableType:
    """Render the plan as a table, and say whether the job fits."""
    job, found = document["job"], document["plan"]
    what = "device" if found["device"] == "cuda" else "process"
    facts = [
        ("job", f"{job['recipe']} of {job['model']}, {job['trains']}, {job['optimizer']}"),
        ("micro-batch", f"{job['batch_size']} x {job['max_length']:,} tokens in {job['dtype']}, activation "
                        f"checkpointing {'on' if job['checkpointing'] else 'off'}"),
        ("machine", f"{_count(found['processes'], what)} of "
                    f"{size(found['device_bytes'])}, of which {size(found['usable_bytes'])} can be used"),
    ]  # fmt: skip
    if (loading := found["loading"]) is not None:
        on_device = f", {size(loading['device_bytes'])} of the GPU" if loading["device_bytes"] else ""
        facts.append(("loading", f"{size(loading['host_bytes'])} of main memory at most{on_device}, for each process"))
    if (merging := found["merging_bytes"]) is not None:
        where = "of the GPU if it has that much free, else of main memory" if what == "device" else "of main memory"
        facts.append(("merging", f"{size(merging)} {where}, at the end"))
    if (vision := document["vision"]) is not None:
        facts.append(("vision tower", vision))
    facts.append(("training", timed(document["time"])))
    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        grid.add_row(name, text(value))
    lines = [text(line) for line in _told(document)]
    return Group(grid, "", _options(found), "", *lines)


def timed(found: RunTime) -> str:
    """Return how long the job will train, in words."""
    if found["tokens_per_s"] is None:
        return f"time not known: {found['basis']}"
    took = "time not known" if found["seconds"] is None else f"about {duration(found['seconds'])}"
    return f"{took} at {found['tokens_per_s']:,.0f} tokens/s ({found['basis']})"


def _options(found: Plan) -> Table:
    made = [option["estimate"] for option in found["options"] if option["estimate"]]
    used = [term for term in TERMS if any(each["terms"][term] for each in made)]
    rows = []
    for option in found["options"]:
        estimate = option["estimate"]
        terms = [size(estimate["terms"][term]) if estimate else "-" for term in used]
        rows.append(
            (
                option["strategy"], option["verdict"], size(option["peak_bytes"]) if estimate else "-",
                size(option["certain_bytes"]) if estimate else "-", *terms, estimate["moment"] if estimate else "-",
            )
        )  # fmt: skip
    heads = ("STRATEGY", "VERDICT", "PEAK", "CERTAIN", *(term.replace("_", " ").upper() for term in used), "AT")
    return table(heads, rows)


def _told(document: PlanDocument) -> list[str]:
    found, changes = document["plan"], document["changes"]
    each_of = f", for each of {found['processes']} processes" if found["processes"] > 1 else ""
    lines = [f"{option['strategy']} is not valid here: {option['refused']}"
             for option in found["options"] if option["refused"]]  # fmt: skip
    if lent := max((each["estimate"]["machine_bytes"] for each in found["options"] if each["estimate"]), default=0):
        lines.append(
            f"beside the peak, up to {size(lent)} of the optimiser's state may lie in the machine's memory{each_of}"
        )
    if away := max((each["estimate"]["offloaded_bytes"] for each in found["options"] if each["estimate"]), default=0):
        lines.append(f"beside the peak, {size(away)} of experts lie in the machine's memory{each_of}")
    if found["verdict"] == "fits":
        asked = " (resources.strategy auto)" if found["asked"] == "auto" and found["processes"] > 1 else ""
        return [*lines, f"it fits, with {found['strategy']}{asked}"]
    tight = "it may not fit: the estimate is more than the usable memory, though the certain part of it is less"
    lines.append(
        tight
        if found["verdict"] == "tight"
        else "it can't fit: the certain part of the estimate alone is more than the memory"
    )
    if not changes:
        return [*lines, "no change that was tried makes it fit"]
    lines.append("each of these changes alone makes it fit:" if len(changes) > 1 else "this change makes it fit:")
    return [*lines, *(f"- {change['text']}" for change in changes)]


def plan(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Job file in JSON or YAML; - for standard input, @NAME for a template of `moe-train templates`.",
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="BLOCK.FIELD=VALUE", help="Change of a field in the job file. Repeatable."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, max=64, help="Number of GPUs; default: the job file's.")] = None,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory per GPU (of the host when --gpus 0), e.g. 80GB.")
    ] = "80GB",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="Folder or config.json with the model's config; default: the job file's model."
        ),
    ] = None,
    run_config: Annotated[
        Path | None,
        typer.Option("--run-config", metavar="FILE", help="Run YAML of a server, for its defaults for jobs."),
    ] = None,
    provider_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Id of the inline::moe provider, if the YAML has several.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_IMAGES,
            help="Number of images in each row; default: 1 if the job and its model can train on images.",
        ),
    ] = None,
    image_size: Annotated[
        str, typer.Option(metavar="PIXELS", help="Width and height of each image in pixels, e.g. 640x480.")
    ] = IMAGE_SIZE,
    as_json: Json = False,
) -> None:
    """Check whether a job fits on your GPUs, with which strategy, and what would make it fit. Needs torch."""

    def act(screen: Screen) -> Exit:
        body = read_template(file, [*(changes or []), *([] if gpus is None else [f"resources.gpus={gpus}"])])
        if run_config is not None:
            from llama_stack_provider_moe.control.config_check.run_yaml import read_run_config  # imports yaml

            body = read_run_config(run_config, provider_id).defaults.under(body)
        job = training_job(body)
        memory_bytes = bytes_of(memory)
        named = body.get("model")
        if isinstance(named, str) and model is None:
            model_checks.planned(named, "model")
        if model is not None:
            model_checks.planned(model, "--model")
        if (teacher := job.teacher_named()) is not None:
            model_checks.planned(teacher[1], teacher[0])
        sides_of(image_size)
        words = ["--memory", str(memory_bytes), *([] if model is None else ["--model", model])]
        words += ["--image-size", image_size, *([] if images is None else ["--images", str(images)])]
        document = answer_of(PlanDocument, _MODULE, words, json.dumps(body))
        if screen.as_json:
            screen.document(document)
        else:
            screen.say(shown(document))
        return Exit.OK if document["plan"]["verdict"] == "fits" else Exit.FAILED

    end(as_json, act)
