"""What a user may type after `moe-train ablate measure`, `analyze` and `apply`."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from llama_stack_provider_moe.errors import InvalidBody
from llama_stack_provider_moe.spec import AblationMeasureSpec, AnalysisTraining
from llama_stack_provider_moe.spec.ablation import AblationOutput, Measure, MeasureTraining
from llama_stack_provider_moe.spec.command_words import JsonCommandLine, option, positional
from llama_stack_provider_moe.spec.error_words import problems_of
from llama_stack_provider_moe.spec.local_commands import named_files, settings_of
from llama_stack_provider_moe.spec.routing import WholeRowOptions

_SCALES = str(MeasureTraining.model_fields["quantize_scales"].description)
_BITS = str(MeasureTraining.model_fields["quantize_bits"].description)


class MeasureCommand(JsonCommandLine):
    """`moe-train ablate measure`; MEASURE_COMMAND adds the settings of a job."""

    model: str = positional("Model: a folder, name of a job, or hub id.", "MODEL")
    rows: list[str] = option(
        [], "File (JSON Lines or CSV) of prompts that show the concept, target=FILE, and of others, baseline=FILE.",
        "NAME=FILE",
    )  # fmt: skip
    adapter: str | None = option(None, "LoRA adapter on the model: a folder or name of a job.", "FOLDER")
    quantize_bits: int | None = option(None, _BITS, "4|8")
    quantize_scales: bool = option(False, _SCALES)
    out: str = option("measured", "Folder for measurements.safetensors, and for routing.json and its charts.", "FOLDER")


# Adds the settings of a job as options.
MEASURE_COMMAND: type[MeasureCommand] = create_model(
    "MeasureCommand",
    __base__=MeasureCommand,
    **settings_of(Measure, AnalysisTraining, WholeRowOptions),
)


class AnalyzeCommand(JsonCommandLine):
    """`moe-train ablate analyze`."""

    measurements: str = positional("Measurements: a measurements.safetensors, or its folder.", "FILE")
    charts: bool = option(False, "Draw charts too; needs matplotlib.")
    out: str | None = option(None, "Folder for directions.json and the charts; default: that of FILE.", "FOLDER")


class ApplyCommand(JsonCommandLine):
    """`moe-train ablate apply`."""

    plan: str = positional("Plan: a job of recipe `ablation` in YAML or JSON; `recipe` may be left out.", "PLAN")
    out: str = option("ablated", "Folder for the edited model; must not exist.", "OUT")
    output: AblationOutput | None = option(
        None, "Result to write: the edited model, or the edit as an adapter of rank 1; default: the plan's `output`.",
        "model|lora",
    )  # fmt: skip
    dry_run: bool = option(
        False, "Show what would be edited, from the model's config and the headers of its files; write nothing."
    )


def measure_job(command: MeasureCommand) -> tuple[AblationMeasureSpec, dict[str, Path]]:
    """The job that measures the same, so that the same values are valid; and the file of each set.

    Raises:
        InvalidInput: a value is not valid.
    """
    sets = named_files(command.rows)
    training: dict[str, Any] = {name: getattr(command, name) for name in AnalysisTraining.model_fields}
    body = {
        "recipe": "ablation_measure",
        "model": command.model,
        "adapter_folder": command.adapter,
        "data": {"sets": sets},
        "measure": {name: getattr(command, name) for name in Measure.model_fields},
        "training": {
            **training,
            "quantize_bits": command.quantize_bits,
            "quantize_scales": command.quantize_scales,
        },
        "options": {name: getattr(command, name) for name in WholeRowOptions.model_fields},
    }
    try:
        return AblationMeasureSpec.model_validate(body), {name: Path(path) for name, path in sets.items()}
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None
