"""What a user may type after `moe-train probe fit` and `score`."""

import re
from pathlib import Path

from pydantic import ValidationError, create_model

from llama_stack_provider_moe.spec import AnalysisTraining, Probe, ProbeSpec
from llama_stack_provider_moe.spec.command_words import JsonCommandLine, option, positional, written
from llama_stack_provider_moe.spec.local_commands import named_files, settings_of
from llama_stack_provider_moe.spec.routing import WholeRowOptions
from llama_stack_provider_moe.spec.validation_errors import invalid_body

_SETTING = re.compile(r"\b(probe|training|options)\.(\w+)")


class FitCommand(JsonCommandLine):
    """`moe-train probe fit`; FIT_COMMAND adds the settings of a job."""

    model: str = positional("Model: a folder, name of a job, or hub id.", "MODEL")
    rows: list[str] = option(
        [], "File (JSON Lines or CSV) of prompts that show the concept, target=FILE, and of others, baseline=FILE; for "
        "the report also of other wording, test_target=FILE and test_baseline=FILE.",
        "NAME=FILE",
    )  # fmt: skip
    adapter: str | None = option(None, "LoRA adapter on the model: a folder or name of a job.", "FOLDER")
    out: str = option("probe", "Folder for probe.json and probe.safetensors.", "FOLDER")


# Adds the settings of a job as options.
FIT_COMMAND: type[FitCommand] = create_model(
    "FitCommand",
    __base__=FitCommand,
    **settings_of(Probe, AnalysisTraining, WholeRowOptions),
)


class ScoreCommand(JsonCommandLine):
    """`moe-train probe score`."""

    probe: str = positional("Probe: a folder with probe.json, or name of a job.", "PROBE")
    file: str = positional("File (JSON Lines or CSV) of conversations or prompts.", "FILE")
    batch_size: int = option(8, "Number of texts in one pass.", "NUMBER", ge=1, le=4096)


def fit_job(command: FitCommand) -> tuple[ProbeSpec, dict[str, Path]]:
    """The job that fits the same, so that the same values are valid; and the file of each set.

    Raises:
        InvalidInput: a value is not valid.
    """
    sets = named_files(command.rows)
    body = {
        "recipe": "probe",
        "model": command.model,
        "adapter_folder": command.adapter,
        "data": {"sets": sets},
        "probe": {name: getattr(command, name) for name in Probe.model_fields},
        "training": {name: getattr(command, name) for name in AnalysisTraining.model_fields},
        "options": {name: getattr(command, name) for name in WholeRowOptions.model_fields},
    }
    try:
        return ProbeSpec.model_validate(body), {name: Path(path) for name, path in sets.items()}
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False), ProbeSpec, as_typed, as_typed) from None


def as_typed(message: str) -> str:
    """A job's message with the options of `moe-train probe fit` in place of the job's settings."""

    def option_of(found: re.Match[str]) -> str:
        field = FIT_COMMAND.model_fields.get(found[2])
        return found[0] if field is None else written(found[2], field)

    return _SETTING.sub(option_of, message).replace("data.sets.", "--rows ").replace("data.sets", "--rows")
