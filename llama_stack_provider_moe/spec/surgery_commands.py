"""What a user may type after `moe-train experts prune` and `split`."""

from typing import NamedTuple

from pydantic import ValidationError, create_model

from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.spec.command_words import JsonCommandLine, option, positional
from llama_stack_provider_moe.spec.error_words import problems_of
from llama_stack_provider_moe.spec.local_commands import settings_of
from llama_stack_provider_moe.spec.surgery import ALL_LAYERS, Criterion, Surgery, SurgeryOptions, SurgeryTraining


class PruneCommand(JsonCommandLine):
    """`moe-train experts prune`; PRUNE_COMMAND adds the settings of a job."""

    model: str = positional(
        "Model with experts: a folder with config.json and safetensors, name of a job, or hub id.", "MODEL"
    )
    keep: int | None = option(None, "Number of experts to keep in each layer; needs --rows.", "NUMBER")
    drop: list[str] = option(
        [], "Experts to remove from every layer, e.g. 0-3,7; or from one, e.g. 5:0-3,7, repeated for every layer.",
        "EXPERTS",
    )  # fmt: skip
    by: Criterion | None = option(None, str(Surgery.model_fields["by"].description))
    rows: str | None = option(
        None, "File of rows (JSON Lines or CSV) that decide which experts stay, and on which the loss is measured "
        "before and after.",
        "FILE",
    )  # fmt: skip
    out: str = option("pruned", "Folder for the new model; must not exist.", "OUT")
    dry_run: bool = option(False, "Choose, and measure the loss, but write nothing.")


class SplitCommand(JsonCommandLine):
    """`moe-train experts split`."""

    model: str = positional(
        "Model with experts: a folder with config.json and safetensors, name of a job, or hub id.", "MODEL"
    )
    factor: int = option(2, "Number of new experts for each old one.", "NUMBER", ge=2, le=16)
    out: str = option("split", "Folder for the new model; must not exist.", "OUT")
    dry_run: bool = option(False, "Show what would be written, and write nothing.")


# Adds the settings of a job as options.
PRUNE_COMMAND: type[PruneCommand] = create_model(
    "PruneCommand",
    __base__=PruneCommand,
    **settings_of(SurgeryTraining, SurgeryOptions),
)


class PruneSettings(NamedTuple):
    """The blocks of a job that does the same."""

    surgery: Surgery
    training: SurgeryTraining
    options: SurgeryOptions


def prune_settings(command: PruneCommand) -> PruneSettings:
    """The same settings as in a job, so that the same values are valid.

    Raises:
        InvalidInput: a value is not valid.
    """
    body = {"action": "prune", "keep": command.keep, "by": command.by, "drop": _drop(command.drop)}
    if command.keep is not None and command.rows is None and not command.drop:
        raise InvalidInput("--rows", None, "a file of rows, because --keep chooses by what experts do on them; or "
                           "--drop")  # fmt: skip
    try:
        return PruneSettings(
            Surgery.model_validate(body),
            SurgeryTraining.model_validate({name: getattr(command, name) for name in SurgeryTraining.model_fields}),
            SurgeryOptions.model_validate({name: getattr(command, name) for name in SurgeryOptions.model_fields}),
        )
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None


def _drop(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        layer, colon, experts = each.rpartition(":")
        layer = layer if colon else ALL_LAYERS
        if layer in found:
            raise InvalidInput("--drop", each, "each layer once")
        found[layer] = experts
    return found
