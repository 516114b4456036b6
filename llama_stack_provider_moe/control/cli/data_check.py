"""`moe-train data check`: what a job would make of a file of rows. Needs no server; with --model, torch."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from llama_stack_provider_moe.client.upload import SourceFormat, opened
from llama_stack_provider_moe.control.cli import local, model_checks, show_profile, template
from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import Images, Json
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput, TrainingError
from llama_stack_provider_moe.ground import run
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import TrainingSpec
from llama_stack_provider_moe.spec.data_profile import DataProfile, stood_in
from llama_stack_provider_moe.spec.row_domains import RowDomains
from llama_stack_provider_moe.spec.row_files import RowFile
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.rows.images import ImageLimits
from llama_stack_provider_moe.spec.rows.profiling import RowsProfiler
from llama_stack_provider_moe.spec.training_jobs import TrainingRecipe

_MODULE = "llama_stack_provider_moe.compute.data.token_profile"
_SAID_LIMIT = 4000  # characters
_ROWS = {"dataset_id": "rows"}  # a check reads a file, whatever the job names


def check(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="File of rows: JSON Lines or CSV, also gzipped, or Parquet; - for standard input."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model whose tokenizer and chat template count the tokens: a folder, name of a job or of a "
                     "model in the server's folder, or hub id; default: the job file's, or no token is counted."),
    ] = None,
    recipe: Annotated[
        TrainingRecipe | None,
        typer.Option(
            metavar="sft|dpo|circuit_breaker|grpo|kto|reward|distill",
            help="Recipe of the job; default: the job file's, or sft. For grpo, --job names the rewards whose "
            "columns rows need.",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="File of the held-out rows, to find those that are also in FILE."),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Job file whose settings count, or @NAME for a template; default: the "
                     "defaults of a job."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="BLOCK.FIELD=VALUE", help="Setting of the job, e.g. options.max_length=4096. "
                     "Repeatable."),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Domain of the job file's data.domains that FILE has the rows of."),
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, max=1000, help="Number of sequences to print as they are learnt; needs a model.")
    ] = 0,
    file_format: Annotated[
        SourceFormat | None,
        typer.Option("--format", metavar="jsonl|csv|parquet", help="Format of FILE; default: by the end of its name."),
    ] = None,
    images: Images = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Check a file of rows as a job would: formats, refused and repeated rows, lengths, learnt tokens, steps."""

    def act(screen: Screen) -> Exit:
        spec, has_model = _job(job, changes or [], recipe, model, held_out is not None, domain)
        if show and not has_model:
            raise InvalidInput("--show", show, "also --model: without one there are no tokens")
        if file == held_out == "-":
            raise InvalidInput("--held-out", held_out, "a file; standard input is read once")
        with tempfile.TemporaryDirectory() as folder:
            valid = Path(folder) / "rows.jsonl"
            profile = _profiled(screen, spec, file, file_format, held_out, valid, images)
            if has_model and profile.refused < profile.rows:
                profile = _with_tokens(screen, spec, profile, valid, show)
        rows = spec.row_sources()[0]
        too_few = rows.shortage(profile.rows, profile.notes)
        if screen.as_json:
            screen.document(profile.model_dump(mode="json"))
        else:
            screen.say(show_profile.shown(profile, too_few))
        return Exit.OK if profile.is_ready() and too_few is None else Exit.FAILED

    end(as_json, act)


def _job(
    job: str | None,
    changes: list[str],
    recipe: TrainingRecipe | None,
    model: str | None,
    has_held_out: bool,
    domain: str | None,
) -> tuple[TrainingSpec, bool]:
    """Return the job whose settings count, and whether it has a model."""
    body: dict[str, object] = {"recipe": recipe or "sft", "data": dict(_ROWS)}
    if job is not None:
        body = template.read_template(job, changes) | ({} if recipe is None else {"recipe": recipe})
    else:
        template.apply_changes(body, changes)
    option = "model" if model is None else "--model"
    named = body.get("model") if model is None else model
    has_model = isinstance(named, str)
    if isinstance(named, str):
        model_checks.planned(named, option)
        body["model"] = local_names.on_base(named, option=option)[0]
    body.setdefault("model", "none")
    body["data"] = data = _of_domain(body.get("data"), domain)
    if isinstance(data, dict):
        data.setdefault("dataset_id", "rows")
        if has_held_out:
            data["validation_dataset_id"] = "held-out"
    if body["recipe"] == "circuit_breaker":
        body.setdefault("circuit_breaker", {"retain": dict(_ROWS)})
    return template.training_job(stood_in(body["recipe"], body["model"]) | body), has_model


def _of_domain(data: object, domain: str | None) -> object:
    """The `data` block of a job on one domain alone; without domains, the block itself."""
    found = data.get("domains") if isinstance(data, dict) else None
    if not (isinstance(data, dict) and isinstance(found, list)):
        if domain is not None:
            raise InvalidInput("--domain", domain, "a job file with data.domains")
        return data
    named = {each["name"]: each for each in found if isinstance(each, dict) and isinstance(each.get("name"), str)}
    if domain not in named:
        raise InvalidInput("--domain", domain, f"a domain of the job file: {', '.join(map(repr, named))}")
    others = {name: value for name, value in data.items() if name not in ("domains", "exhausted")}
    return others | {name: value for name, value in named[domain].items() if name not in ("name", "ratio")}


def _profiled(
    screen: Screen,
    spec: TrainingSpec,
    file: str,
    file_format: SourceFormat | None,
    held_out: str | None,
    valid: Path,
    images: str | None,
) -> DataProfile:
    source = spec.row_sources()[0]
    how = source.domains
    domains = None if how is None else RowDomains(how, how.values)
    profiler = RowsProfiler(
        spec.recipe, spec.data.format, spec.data.columns, "data.columns", domains, source.answered, source.needs
    )
    with valid.open("wb") as out:
        profiler.add_all(_rows(screen, file, file_format, images), out)
    if held_out is not None:
        for row in _rows(screen, held_out, None, images):
            profiler.add_held_out(row)
    return profiler.profile()


def _rows(screen: Screen, file: str, file_format: SourceFormat | None, images: str | None) -> Iterator[object]:
    door = ImageDoor(ImageLimits(), lambda _content, _part: None)
    with opened(file, file_format, images) as upload:
        is_csv = upload.content_type == "text/csv"
        reader = RowFile(file, "csv" if is_csv else "jsonl", gzipped=upload.content_encoding is not None, images=door)
        told = 0
        for piece in upload.body(lambda: None):
            for row in reader.feed(piece):
                yield row.content
            if reader.rows - told >= 100_000:
                told = reader.rows
                screen.note(f"checked {told:,} rows")
        for row in reader.finish():
            yield row.content


def _with_tokens(screen: Screen, spec: TrainingSpec, profile: DataProfile, valid: Path, show: int) -> DataProfile:
    """Add the figures of the tokenizer, which a process with torch finds."""
    local.require_training_environment()
    request = json.dumps({"job": spec.model_dump(mode="json"), "rows": str(valid), "show": show})
    errors = subprocess.PIPE if screen.as_json else None  # progress goes to the terminal
    done = subprocess.run(
        run.command(sys.executable, _MODULE), check=False, input=request, stdout=subprocess.PIPE, stderr=errors,
        text=True, errors="replace",
    )  # fmt: skip
    if done.returncode or not done.stdout:
        said = (done.stderr or "")[-_SAID_LIMIT:].strip()
        raise TrainingError(said or f"counting tokens ended with exit code {done.returncode}")
    return profile.with_tokens(done.stdout)


def register(app: typer.Typer) -> None:
    """Add `check` to `moe-train data`."""
    app.command(name="check")(check)
