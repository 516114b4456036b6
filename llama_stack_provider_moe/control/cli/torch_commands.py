"""Commands that need torch and no server: `upcycle`, `mix`, `eval`, `families`, `analyze`, `ablate`, `probe`, ...

Arguments are checked here, without torch; then a separate process does the work.
"""

from collections.abc import Callable

import typer

from llama_stack_provider_moe.control.cli import ablate, local, local_checks, mix
from llama_stack_provider_moe.control.cli.help_words import App
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.control.cli.typed_options import command
from llama_stack_provider_moe.spec.ablate_commands import MEASURE_COMMAND, AnalyzeCommand, ApplyCommand
from llama_stack_provider_moe.spec.command_words import CommandLine
from llama_stack_provider_moe.spec.local_commands import (
    EVALUATION_COMMAND,
    ROUTING_COMMAND,
    FamiliesCommand,
    GgufCommand,
    LoadCheckCommand,
    MergeCommand,
    MixCommand,
    UpcycleCommand,
)
from llama_stack_provider_moe.spec.probe_commands import FIT_COMMAND, ScoreCommand
from llama_stack_provider_moe.spec.surgery_commands import PRUNE_COMMAND, SplitCommand

_ABLATE = "Measure a direction on two sets of prompts, analyze it, and take it out of a model. Needs torch."

_PROBE = "Fit a probe on a model's hidden states, and score conversations with it. Needs torch."

_EXPERTS = "Change the number of a model's experts. Needs torch."


def register(app: typer.Typer) -> None:
    """Add `upcycle`, `mix`, `eval`, `families`, `analyze routing`, `ablate`, `probe` and `experts` to `moe-train`."""
    app.command(name="upcycle")(
        command(
            UpcycleCommand,
            "Convert a dense model to a Mixture-of-Experts model that computes the same function. Needs torch.",
            _process("compute.models.upcycle", local_checks.upcycle),
        )
    )
    app.command(name="mix")(
        command(
            MixCommand,
            "Make the branches of one model the experts of a new one, one tensor at a time. Needs torch.",
            mix.mix,
        )
    )
    app.command(name="eval")(
        command(
            EVALUATION_COMMAND,
            "Measure a model's refusals, over-refusals, perplexity and tool calls. Needs torch.",
            _process("compute.evaluation.command", local_checks.evaluate),
        )
    )
    app.command(name="families")(
        command(
            FamiliesCommand,
            "Show every model type of transformers with experts, and which of the tested laws it holds. Needs torch.",
            _process("compute.moe.families_command", _nothing_to_check),
        )
    )
    analyze = App(help="Analyze a model on this machine. Needs torch.", no_args_is_help=True)
    app.add_typer(analyze, name="analyze")
    analyze.callback()(_group)
    analyze.command(name="routing")(
        command(
            ROUTING_COMMAND,
            "Compare two or more sets of rows: which experts does the model route each of them to?",
            _process("compute.analysis.routing", local_checks.routing),
        )
    )

    ablate = App(help=_ABLATE, no_args_is_help=True)
    app.add_typer(ablate, name="ablate")
    _register_ablation(ablate)

    probe = App(help=_PROBE, no_args_is_help=True)
    app.add_typer(probe, name="probe")
    _register_probes(probe)

    experts = App(help=_EXPERTS, no_args_is_help=True)
    app.add_typer(experts, name="experts")
    experts.callback()(_group_of_surgeries)
    experts.command(name="prune")(
        command(
            PRUNE_COMMAND,
            "Write a model without some of its experts, and measure what they were worth.",
            _process("compute.surgery.prune_command", local_checks.prune),
        )
    )
    experts.command(name="split")(
        command(
            SplitCommand,
            "Write a model with several equal experts for each old one, which computes the same.",
            _process("compute.surgery.split_command", local_checks.split),
        )
    )


def _register_probes(app: typer.Typer) -> None:
    app.command(name="fit")(
        command(
            FIT_COMMAND,
            "Fit a probe that tells prompts that show a concept from others, and measure it on held-out ones.",
            _process("compute.probing.fit_command", local_checks.fit_probe),
        )
    )
    app.command(name="score")(
        command(
            ScoreCommand,
            "Score the conversations of a file with a probe, as a server's scorer does.",
            _process("compute.probing.score_command", local_checks.score),
        )
    )


def _register_ablation(app: typer.Typer) -> None:
    app.command(name="measure")(
        command(
            MEASURE_COMMAND,
            "Measure the mean hidden states of two sets of prompts after every decoder block.",
            _process("compute.ablation.measure_command", local_checks.measure),
        )
    )
    app.command(name="analyze")(
        command(
            AnalyzeCommand,
            "Show how well the direction after each block tells the two sets apart, and which blocks agree.",
            _process("compute.ablation.analyze_command", local_checks.analyze_directions),
        )
    )
    app.command(name="apply")(
        command(
            ApplyCommand,
            "Write a model without the directions that a plan names, one tensor at a time.",
            ablate.apply,
        )
    )


def register_exports(app: typer.Typer) -> None:
    """Add `gguf`, `check` and `merge` to `moe-train export`."""
    app.command(name="gguf")(
        command(
            GgufCommand,
            "Convert a Hugging Face folder to a GGUF file, and verify it with llama.cpp. Needs torch.",
            _process("compute.export.gguf", local_checks.gguf),
        )
    )
    app.command(name="check")(
        command(
            LoadCheckCommand,
            "Load what a job saved, and compare its logits with those recorded at the end of training. Needs torch.",
            _process("compute.export.load_check", local_checks.load_check),
        )
    )
    app.command(name="merge")(
        command(
            MergeCommand,
            "Merge a LoRA adapter into its base model, one tensor at a time. Needs torch.",
            _process("compute.export.merge", local_checks.merge),
        )
    )


def _group() -> None:
    """Analyze a model on this machine. Needs torch."""


def _group_of_surgeries() -> None:
    """Change the number of a model's experts. Needs torch."""


def _nothing_to_check(line: CommandLine) -> None:
    """For a command line without files."""


def _process[Kind: CommandLine](module: str, check: Callable[[Kind], None]) -> Callable[[Screen, Kind], int]:
    """Check a copy of the command line, then run `module` with it."""

    def act(screen: Screen, line: Kind) -> int:
        check(line)
        return local.in_training_python(screen, module, line)

    return act
