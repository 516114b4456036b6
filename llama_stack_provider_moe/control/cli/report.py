"""`moe-train report`: what a job would train in a model, and the memory it would need. Needs torch."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from llama_stack_provider_moe.control.cli import job_report, model_checks
from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import App
from llama_stack_provider_moe.control.cli.planning_documents import Report
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.control.cli.show import size
from llama_stack_provider_moe.errors import InvalidInput, TrainingError
from llama_stack_provider_moe.ground import run
from llama_stack_provider_moe.spec.expected_images import IMAGE_SIZE, MOST_IMAGES, sides_of

_MODULE = "llama_stack_provider_moe.compute.planning.lora_report"
_NEEDED = ("torch", "transformers", "peft", "trl", "bitsandbytes")
_SAID_LIMIT = 4000  # characters
TERMS = (
    "weights",
    "adapter",
    "optimizer",
    "gradients",
    "activations",
    "hidden_states",
    "routers",
    "working",
    "decoded",
    "buckets",
    "gathered",
    "cache",
    "vision",
)


class Question:
    """The command line of `compute.planning.lora_report`.

    Args:
        model: the model, as typed.
        options: option -> value; True is a flag, False and None are left out.
    """

    def __init__(self, model: str, **options: str | int | bool | None) -> None:
        self.words = [model]
        for name, value in options.items():
            if value is True:
                self.words.append(f"--{name.replace('_', '-')}")
            elif value is not None and value is not False:
                self.words += [f"--{name.replace('_', '-')}", str(value)]


def lora(screen: Screen, question: Question, out: str | None) -> Exit:
    """Create the report in a process with torch; show it, or write its JSON to `out` (`-`: standard output).

    Raises:
        InvalidInput: this environment can't train, or `out` can't be written.
        TrainingError: the model or the adapter is not valid.
    """
    document = answer_of(Report, _MODULE, question.words)
    if out == "-":
        screen.document(document)
        return Exit.OK
    if out is not None:
        try:
            Path(out).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidInput("--json", out, f"a file that can be written: {error.strerror}") from error
    screen.say(shown(document))
    return Exit.OK


def answer_of[Document](kind: type[Document], module: str, words: list[str], given: str = "") -> Document:
    """Run a module that needs torch in a separate process, and return the JSON that it prints.

    Args:
        kind: kind of document that it prints; its fields are not checked.
        module: name of the module.
        words: its command line.
        given: its standard input.

    Raises:
        InvalidInput: this environment can't train.
        TrainingError: the module printed an error, or nothing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput("python", sys.executable, "an environment for training: pip install "
                           f"'llama-stack-provider-moe[train]' (this one lacks {', '.join(missing)})")  # fmt: skip
    done = subprocess.run(
        [*run.command(sys.executable, module), *words],
        check=False, input=given, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if not lines:
        raise TrainingError(done.stderr[-_SAID_LIMIT:].strip() or f"the report ended with exit code {done.returncode}")
    document = json.loads(lines[-1])
    if "error" in document:
        raise TrainingError(document["error"])
    return cast(Document, document)


def shown(report: Report) -> RenderableType:
    """Render the report as tables."""
    hidden = report["hidden_states"]
    blocks = ", ".join(map(str, hidden["targets"]))
    facts = [
        ("model", f"{report['model']} ({report['model_type']}), from its {report['source']}"),
        ("shape", f"{report['layers']} layers, {report['hidden_size']:,} wide, vocabulary {report['vocabulary']:,}"),
        ("experts", report["experts"]),
        ("base", f"{report['base_parameters']:,} parameters"),
        ("adapter", report["method"]),
        ("trains", f"{report['trainable_parameters']:,} parameters "
                   f"({report['trainable_parameters'] / report['base_parameters']:.3%} of the base's)"),
        ("in fp32", f"adapter {size(report['adapter_bytes'])}, gradients {size(report['gradient_bytes'])}, "
                    f"AdamW's moments {size(report['optimizer_bytes'])}"),
        ("batch", f"{report['batch']} x {report['length']:,} tokens"),
        ("hidden states", f"{size(hidden['all_layers_bytes'])} of all layers, {size(hidden['targets_bytes'])} of "
                          f"layers {blocks}"),
    ]  # fmt: skip
    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        grid.add_row(name, text(value))
    parts: list[RenderableType] = [
        grid,
        "",
        _targets(report),
        "",
        _parts(report),
    ]
    if report["memory"]:  # the notes say why there is none
        parts += ["", _memory(report), "", _cards(report)]
    lines = [text(f"- {line}") for line in (*report["recommended"], *report["notes"])]
    return Group(*parts, "", *lines)


def _targets(report: Report) -> Table:
    rows = [
        (
            each["name"], each["part"], f"{each['count']} {each['kind']}s", _shape(each["weight_shape"]),
            _shape(each["lora_a_shape"]), _shape(each["lora_b_shape"]), f"{each['adapters']:,} {each['sharing']}",
            f"{each['parameters']:,}",
        )
        for each in report["targets"]
    ]  # fmt: skip
    return table(("TARGET", "PART", "MATCHES", "WEIGHT", "A", "B", "ADAPTERS", "PARAMETERS"), rows)


def _parts(report: Report) -> Table:
    rows = [
        (each["part"], f"{each['matches']:,}", f"{each['adapters']:,}", f"{each['parameters']:,}")
        for each in report["parts"]
    ]
    return table(("PART", "MATCHES", "ADAPTERS", "PARAMETERS"), rows)


def _memory(report: Report) -> Table:
    used = [term for term in TERMS if any(each["terms"][term] for each in report["memory"])]
    rows = [
        (
            each["recipe"], str(each["bits"]), "yes" if each["checkpointing"] else "no", size(each["peak_bytes"]),
            *(size(each["terms"][term]) for term in used), each["moment"],
        )
        for each in report["memory"]
    ]  # fmt: skip
    heads = ("RECIPE", "BITS", "CHECKPOINTING", "PEAK", *(term.replace("_", " ").upper() for term in used), "AT")
    return table(heads, rows)


def _cards(report: Report) -> Table:
    recipes = list(report["cards"][0]["setups"])
    rows = [
        (f"{each['memory_gb']} GB", *(each["setups"][recipe] or "-" for recipe in recipes)) for each in report["cards"]
    ]
    return table(("GPU", *(recipe.upper().replace("_", " ") for recipe in recipes)), rows)


def _shape(sizes: list[int]) -> str:
    return "x".join(map(str, sizes))


app = App(help="Report a job in one HTML file, or what a job would train in a model and the memory it would need.",
                  no_args_is_help=True)  # fmt: skip


@app.command(name="lora")
def _lora(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model: a folder, its config.json, name of a job, or hub id.")
    ],
    plan: Annotated[
        str | None,
        typer.Option(metavar="trunk|all_experts|per_expert", help="Adapter plan; default: a job's."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of every LoRA update.")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="JSON", help="Whole `adapter` block of a job.")] = None,
    train_router: Annotated[bool, typer.Option("--train-router", help="Add LoRA to the routers as well.")] = False,
    bits: Annotated[
        int | None, typer.Option(metavar="16|4", help="Bits of the base model's weights; default: both.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Number of sequences (or pairs) in a micro-batch.")] = 4,
    length: Annotated[int, typer.Option(min=8, max=1 << 20, help="Number of tokens in each sequence.")] = 1024,
    targets: Annotated[
        str | None,
        typer.Option(metavar="BLOCKS", help="Decoder blocks that circuit breakers compare, e.g. 10,20; default: the "
                     "blocks at a third and two thirds of the depth."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="cuda|cpu", help="Device for training.")] = "cuda",
    load: Annotated[bool, typer.Option("--load", help="Load and count the weights as well.")] = False,
    images: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_IMAGES, help="Number of images in each row of SFT and DPO; default: 1 if the "
                     "model sees images."),
    ] = None,
    image_size: Annotated[
        str, typer.Option(metavar="PIXELS", help="Width and height of each image in pixels, e.g. 640x480.")
    ] = IMAGE_SIZE,
    out: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="File to write JSON to; - for standard output.")
    ] = None,
) -> None:  # fmt: skip
    """Report what LoRA reaches and trains, and the peak memory of SFT, DPO and circuit breakers. Needs torch."""
    for name, given, known in (("--bits", bits, (None, 16, 4)), ("--device", device, ("cuda", "cpu"))):
        if given not in known:
            raise typer.BadParameter(f"{name}: {given!r} is not valid; expected one of "
                                     f"{', '.join(str(each) for each in known if each is not None)}")  # fmt: skip
    question = Question(
        model, plan=plan, rank=rank, adapter=adapter, train_router=train_router, bits=bits, batch=batch,
        length=length, targets=targets, device=device, load=load, images=images, image_size=image_size,
    )  # fmt: skip

    def act(screen: Screen) -> Exit:
        model_checks.planned(model, "MODEL")
        sides_of(image_size)
        return lora(screen, question, out)

    end(out == "-", act)


app.command(name="job")(job_report.job)


def register(moe_train: typer.Typer) -> None:
    """Add `report` to `moe-train`."""
    moe_train.add_typer(app, name="report")
