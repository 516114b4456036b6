"""`moe-train report`: what a model would train and take, told before a job is sent. Needs torch, and no server."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from llama_stack_provider_moe.cli.exits import Exit
from llama_stack_provider_moe.cli.screen import Screen, table, text
from llama_stack_provider_moe.cli.show import size
from llama_stack_provider_moe.errors import InvalidInput, TrainingError

_MODULE = "llama_stack_provider_moe.analysis.lora_report"
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
)


class Question:
    """What `report lora` asks: the words of `analysis.lora_report`'s command line."""

    def __init__(self, model: str, **options: Any) -> None:
        self.words = [model]
        for name, value in options.items():
            if value is True:
                self.words.append(f"--{name.replace('_', '-')}")
            elif value is not None and value is not False:
                self.words += [f"--{name.replace('_', '-')}", str(value)]


def lora(screen: Screen, question: Question, out: str | None) -> Exit:
    """Have the report made by a process that imports torch; show it, or write its JSON to `out` (`-`: standard output).

    Raises:
        InvalidInput: this environment can't train, or `out` can't be written.
        TrainingError: the model or the adapter is not as asked.
    """
    document = answer_of(_MODULE, question.words)
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


def answer_of(module: str, words: list[str], given: str = "") -> dict[str, Any]:
    """What a module that needs torch says in one line of JSON, in a process of its own.

    Args:
        given: to its standard input.

    Raises:
        InvalidInput: this environment can't train.
        TrainingError: what it says is an error, or it says nothing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInput("python", sys.executable, "an environment for training: pip install "
                           f"'llama-stack-provider-moe[train]' (this one lacks {', '.join(missing)})")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        check=False, input=given, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if not lines:
        raise TrainingError(done.stderr[-_SAID_LIMIT:].strip() or f"the report ended with exit code {done.returncode}")
    document: dict[str, Any] = json.loads(lines[-1])
    if "error" in document:
        raise TrainingError(document["error"])
    return document


def shown(report: dict[str, Any]) -> RenderableType:
    """The report as tables."""
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
        "",
        _memory(report),
        "",
        _cards(report),
    ]
    lines = [text(f"- {line}") for line in (*report["recommended"], *report["notes"])]
    return Group(*parts, "", *lines)


def _targets(report: dict[str, Any]) -> Table:
    rows = [
        (
            each["name"], each["part"], f"{each['count']} {each['kind']}s", _shape(each["weight_shape"]),
            _shape(each["lora_a_shape"]), _shape(each["lora_b_shape"]), f"{each['adapters']:,} {each['sharing']}",
            f"{each['parameters']:,}",
        )
        for each in report["targets"]
    ]  # fmt: skip
    return table(("TARGET", "PART", "MATCHES", "WEIGHT", "A", "B", "ADAPTERS", "PARAMETERS"), rows)


def _parts(report: dict[str, Any]) -> Table:
    rows = [
        (each["part"], f"{each['matches']:,}", f"{each['adapters']:,}", f"{each['parameters']:,}")
        for each in report["parts"]
    ]
    return table(("PART", "MATCHES", "ADAPTERS", "PARAMETERS"), rows)


def _memory(report: dict[str, Any]) -> Table:
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


def _cards(report: dict[str, Any]) -> Table:
    recipes = list(report["cards"][0]["setups"])
    rows = [
        (f"{each['memory_gb']} GB", *(each["setups"][recipe] or "-" for recipe in recipes)) for each in report["cards"]
    ]
    return table(("GPU", *(recipe.upper().replace("_", " ") for recipe in recipes)), rows)


def _shape(sizes: list[int]) -> str:
    return "x".join(map(str, sizes))


app = typer.Typer(help="What a model would train and take, from its config alone; needs torch, no server.",
                  no_args_is_help=True)  # fmt: skip


@app.command(name="lora")
def _lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder with config.json, that file, or a hub id.")],
    plan: Annotated[str | None, typer.Option(help="trunk, all_experts, per_expert; left out: as a job.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of every update.")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="JSON", help="The whole `adapter` block of a job.")] = None,
    train_router: Annotated[bool, typer.Option("--train-router", help="LoRA on the routers, too.")] = False,
    bits: Annotated[int | None, typer.Option(help="Of the base, 16 or 4; left out: both.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Sequences (or pairs) of a micro-batch.")] = 4,
    length: Annotated[int, typer.Option(min=8, max=1 << 20, help="Tokens of each.")] = 1024,
    targets: Annotated[
        str | None,
        typer.Option(metavar="BLOCKS", help="Decoder blocks that circuit breakers compare, as 10,20; left out: those "
                     "at a third and two thirds of the depth."),
    ] = None,
    device: Annotated[str, typer.Option(help="That trains: cuda or cpu.")] = "cuda",
    load: Annotated[bool, typer.Option("--load", help="Load the weights, and count what is there.")] = False,
    out: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON there; - standard output.")]
    = None,
) -> None:  # fmt: skip
    """What LoRA reaches, what trains, and what a step takes at its peak: SFT, DPO, circuit breakers."""
    # Its callback would import this module, and this one it.
    from llama_stack_provider_moe.cli.commands import end

    for name, given, known in (("--bits", bits, (None, 16, 4)), ("--device", device, ("cuda", "cpu"))):
        if given not in known:
            raise typer.BadParameter(f"{name}: {given!r} is not valid; expected one of "
                                     f"{', '.join(str(each) for each in known if each is not None)}")  # fmt: skip
    question = Question(
        model, plan=plan, rank=rank, adapter=adapter, train_router=train_router, bits=bits, batch=batch,
        length=length, targets=targets, device=device, load=load,
    )  # fmt: skip
    end(out == "-", lambda screen: lora(screen, question, out))
