"""The pages under docs/reference, made from the code.

    python -m tests.contracts.docs_reference           write them
    python -m tests.contracts.docs_reference --check   exit with 1 where one is not up to date

`test_docs` runs the check, so a field, a command, a route, an event or an error cannot change without its page.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import typer.core
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llama_stack_provider_moe import errors
from llama_stack_provider_moe.control.cli.commands import EPILOG, app_of
from llama_stack_provider_moe.control.cli.help_words import word_of
from llama_stack_provider_moe.jobdir import events, folder
from llama_stack_provider_moe.jobdir.routing_figures import LayerFigures, LayerRouting
from tests.contracts import http_reference, matrices
from tests.contracts.reference import allowed, default, fields

PAGES = Path(__file__).parents[2] / "docs" / "reference"
FAMILIES = PAGES.parents[1] / "llama_stack_provider_moe" / "compute" / "moe" / "families.json"
FILE_LINE = re.compile(r"^  (\S+)\s{2,}(.+?)\s{2,}written by (.+)$", re.MULTILINE)
MODULE_NAMED = re.compile(r" \((?:see )?`[a-z_]+(?:\.\w+)*`(?: as JSON)?\)")
# Errors that no server answers with.
UNANSWERED: dict[type[errors.MoeError], str] = {
    errors.TrainingError: "ends the job",
    errors.ServerLost: "clients",
    errors.ServerRefused: "clients",
}
GENERATED = "<!-- Made by `python -m tests.contracts.docs_reference`. Do not edit. -->"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; a `|` inside a cell is escaped."""
    escaped = [
        [" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in [head, ["---"] * len(head), *rows]
    ]
    return ["", *(f"| {' | '.join(row)} |" for row in escaped), ""]


def settings() -> list[str]:
    """Every field of a job and of a server's configuration."""
    lines = [
        "# Settings",
        "",
        "Every field of a job, then every field of the server's `config:` block. The tables are made from the models "
        "that check a request, so they show the real defaults and ranges. An unknown key is refused.",
        "",
        "A job states only what differs from the defaults. The full job, with every default filled in, is in "
        "`spec.json` of the job's folder.",
    ]
    by_title: dict[str, list[list[str]]] = {}
    for title, name, field in fields():
        meaning = field.description or "A block; its fields follow."
        by_title.setdefault(title, []).append([f"`{name}`", meaning, default(field), allowed(field)])
    for title, rows in by_title.items():
        lines += ["", f"## {title.removesuffix(', and')}", *table(["Field", "Meaning", "Default", "Allowed"], rows)]
    return lines


def commands() -> Iterator[tuple[list[str], Any]]:
    """(words, command) of every command and group that `moe-train` has, parents first."""

    def walk(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
        yield words, command
        if isinstance(command, typer.core.TyperGroup):
            for name in sorted(command.commands):
                yield from walk([*words, name], command.commands[name])

    yield from walk(["moe-train"], typer.main.get_command(app_of()))


def cli() -> list[str]:
    """Every command with its arguments and options."""
    lines = [
        "# Command line",
        "",
        "`moe-train COMMAND --help` prints the same. Commands that ask a server need the base install only.",
        "",
        EPILOG,
    ]
    for words, command in commands():
        if len(words) == 1:
            continue
        help_text = (command.help or "").partition("\f")[0].strip()
        shown = [param for param in command.params if not param.hidden]
        arguments = [param for param in shown if param.param_type_name == "argument"]
        usage = " ".join([*words, *map(_usage, arguments), *(["[OPTIONS]"] if len(shown) > len(arguments) else [])])
        is_group = isinstance(command, typer.core.TyperGroup)
        lines += ["", f"{'#' * min(len(words), 3)} {' '.join(words)}", "", help_text]
        if not is_group:
            lines += ["", "```text", usage, "```"]
        rows = [_parameter(param) for param in shown if param.name != "help"]
        if rows and not is_group:
            lines += table(["Argument or option", "Meaning", "Default"], rows)
    return lines


def _usage(argument: Any) -> str:
    name = argument.metavar or (argument.name or "").upper()
    return name if argument.required else f"[{name}]"


def _parameter(param: Any) -> list[str]:
    if param.param_type_name == "argument":
        name = f"`{_usage(param)}`"
    else:
        metavar = f" {word_of(param)}".rstrip()
        name = ", ".join(f"`{option}{metavar}`" for option in [*param.opts, *param.secondary_opts])
    value = param.default
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    missing = "required" if param.required else ""
    variable = f" Environment: `{param.envvar}`." if isinstance(param.envvar, str) else ""
    return [name, (param.help or "") + variable, f"`{value}`" if is_plain and value != "" else missing]


def events_and_files() -> list[str]:
    """The files of a job's folder, and every event."""
    files = [
        [f"`{name.strip()}`", meaning, writer]
        for name, meaning, writer in re.findall(
            r"^  (\S+)\s{2,}(.+?)\s{2,}written by (.+)$", folder.__doc__ or "", re.M
        )
    ]
    lines = [
        "# Events and files",
        "",
        "A job is a folder, `jobs/ID/` in the server's state folder. Each file has one writer.",
        "",
        "## Files of a job",
        *table(["File", "What it holds", "Written by"], files),
        "",
        "## Events",
        "",
        "`events.jsonl` holds one JSON object a line. The route `GET /jobs/{job_uuid}/events` returns them in "
        "pages. Every event has `time` (ISO 8601, UTC) and `type`. A reader ignores types and fields that it does not "
        "know.",
    ]
    for model in get_args(get_args(events.Event)[0]):
        lines += ["", f"### `{model.model_fields['type'].default}`", "", *_doc(model)]
        own = {name: field for name, field in model.model_fields.items() if name not in ("time", "type")}
        if own:
            lines += table(["Field", "Type", "Meaning"], [_event_field(*each) for each in own.items()])
    records: list[type[BaseModel]] = [folder.Artifact, LayerFigures, LayerRouting, folder.Manifest, folder.Metrics]
    lines += ["", "## Other records"]
    for model in records:
        rows = [_event_field(*each) for each in model.model_fields.items()]
        lines += ["", f"### {model.__name__}", "", *_doc(model), *table(["Field", "Type", "Meaning"], rows)]
    return [MODULE_NAMED.sub("", line) for line in lines]


def _event_field(name: str, field: FieldInfo) -> list[str]:
    return [f"`{name}`", type_name(field.annotation), field.description or ""]


def type_name(annotation: Any) -> str:
    """A type as a page names it: `text or null`, `list of numbers`."""
    plain = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any"}
    if annotation in plain:
        return plain[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is UnionType or str(origin) == "typing.Union":
        return " or ".join(dict.fromkeys(map(type_name, arguments)))
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"object of {type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return "time" if "datetime" in str(annotation).lower() else str(getattr(annotation, "__name__", annotation))


def error_tree() -> list[str]:
    """The tree of errors, with what a server answers for each."""
    rows: list[list[str]] = []

    def walk(error: type[errors.MoeError], depth: int) -> None:
        doc = (error.__doc__ or "").strip().partition("\n\n")[0]
        status = next((word for kind, word in UNANSWERED.items() if issubclass(error, kind)), str(error.status))
        status = "-" if error is errors.MoeError else status
        rows.append([f"{'&emsp;' * depth}`{error.__name__}`", status, doc])
        for each in sorted(error.__subclasses__(), key=lambda kind: kind.__name__):
            if each.__module__ == errors.__name__:
                walk(each, depth + 1)

    walk(errors.MoeError, 0)
    return [
        "# Errors",
        "",
        'Every refusal is `{"error": {"message": ...}}` with an HTTP status. The message names the field, the value '
        "and what was expected. Errors of the training process become the `reason` of a failed job instead. 401 comes "
        "from the host's own login, 413 from the limit on the body's size.",
        *table(["Error", "HTTP status", "Meaning"], rows),
    ]


def _doc(model: type[BaseModel]) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", (model.__doc__ or "").strip())[:1]]


def families() -> list[str]:
    """Every model type with experts, what was found in it, and which laws it holds."""
    tested = json.loads(FAMILIES.read_text(encoding="utf-8"))
    laws, reasons = tested["laws"], list[str]()
    rows: list[list[str]] = []
    for model_type, entry in tested["families"].items():
        if "refused" in entry:
            rows.append([f"`{model_type}`", f"refused: {entry['refused']}", *["-"] * len(laws)])
            continue
        held = []
        for law in laws:
            reason = entry["fails"].get(law)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            held.append("y" if reason is None else f"({reasons.index(reason) + 1})")
        rows.append([f"`{model_type}`", ", ".join(entry["found"]), *held])
    whole = sum(row[2:] == ["y"] * len(laws) for row in rows)
    return [
        "# Families",
        "",
        f"The model types of transformers {tested['transformers']} that have experts and write text: {len(rows)}, of "
        f"which {whole} hold all laws. `moe-train families` shows the same for the transformers that is installed. The "
        "laws run on a tiny model of each (`tests/compute/moe/test_every_family.py`); a model that is not in the table "
        "is found in the same way, and refused where it is not understood.",
        *table(["Model type", "Found in it", *laws], rows),
        *(f"({number}) {reason}.\n" for number, reason in enumerate(reasons, start=1)),
        "## The laws",
        "",
        "- **counts**: experts, layers, top-k and the shapes of LoRA are those of the modules.",
        "- **fast path**: logits and gradients equal those of transformers' loop over experts with plain W + s B A.",
        "- **telemetry**: every token is counted top-k times in each layer, and the experts get what was counted.",
        "- **one step**: a step of training lowers the loss, and moves nothing but LoRA.",
        "- **adapter off**: with its adapter off, the model is the base, bit for bit.",
        "- **TRL's figures**: TRL's head gives the log-probabilities of the model's own logits, and its balance loss.",
        "- **masks**: a masked expert gets no token.",
        "- **4 bits**, **8 bits**: LoRA over such a base computes and learns what it does over the decoded base.",
        "- **balances**: each balance that the family can have acts, and the others are refused.",
        "- **whole model**: training all weights lowers the loss; other parts of a composite model stay as they are.",
        "- **saved and merged**: an adapter, loaded in plain PEFT and merged on disk, gives what was trained.",
        "- **load check**: `moe-train export check` finds what was trained in the adapter and in the merged model.",
        "- **resume**: two steps, saved, and two more from the files give the weights of four steps, bit for bit.",
        "- **states of blocks**: a pass that ends at a block, for circuit breakers, has the states of the whole pass.",
        "- **routing analysis**: rows of several lengths are counted together as each is alone.",
        "- **LoRA report**: from the config alone, `moe-train report lora` counts experts, layers, shapes of LoRA and "
        "parameters as they are in the modules.",
        "- **memory plan**: from the config alone, a plan has the bytes of the modules, and runs every layer of a step "
        "without weights.",
    ]


MAKERS: dict[str, Callable[[], list[str]]] = {
    "settings.md": settings,
    "cli.md": cli,
    "http-api.md": lambda: http_reference.page(table),
    "events.md": events_and_files,
    "errors.md": error_tree,
    "families.md": families,
    "hosts.md": lambda: matrices.hosts(table),
    "sdks.md": lambda: matrices.sdks(table),
}


def page(name: str) -> str:
    """The text of one page."""
    title, *rest = MAKERS[name]()
    text = "\n".join([title, "", GENERATED, *rest])
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main(words: list[str]) -> int:
    """Write the pages, or check them; the exit code."""
    stale = [name for name in MAKERS if not (PAGES / name).exists() or (PAGES / name).read_text("utf-8") != page(name)]
    if words == ["--check"]:
        if stale:
            print(f"not up to date: {', '.join(stale)}; run `python -m tests.contracts.docs_reference`")
        return 1 if stale else 0
    if words:
        print(__doc__)
        return 2
    PAGES.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (PAGES / name).write_text(page(name), "utf-8")
        print(f"wrote docs/reference/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
