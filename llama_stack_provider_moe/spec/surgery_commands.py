"""What a user may type after `moe-train experts prune`, `merge`, `add` and `split`."""

import re
from typing import Literal, NamedTuple

from pydantic import BaseModel, ValidationError, create_model

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.command_words import JsonCommandLine, option, positional
from llama_stack_provider_moe.spec.local_commands import settings_of
from llama_stack_provider_moe.spec.surgery import (
    ALL_LAYERS,
    AddedExperts,
    Criterion,
    Likeness,
    Surgery,
    SurgeryOptions,
    SurgeryTraining,
)
from llama_stack_provider_moe.spec.validation_errors import invalid_body

_MODEL = "Model with experts: a folder with config.json and safetensors, name of a job, or hub id."
_OUT = "Folder for the new model; must not exist."
_DRY_RUN = "Choose, and measure the loss, but write nothing."


class PruneCommand(JsonCommandLine):
    """`moe-train experts prune`; PRUNE_COMMAND adds the settings of a job."""

    model: str = positional(_MODEL, "MODEL")
    keep: int | None = option(None, "Number of experts to keep in each layer; needs --rows.", "NUMBER")
    drop: list[str] = option(
        [], "Experts to remove from every layer, e.g. 0-3,7; or from one, e.g. 5:0-3,7, repeated for every layer.",
        "EXPERTS",
    )  # fmt: skip
    by: Criterion | None = option(
        None, "With --keep, score of an expert. reap (default): mean of router weight times the norm of the expert's "
        "output, over the tokens that chose it (arXiv 2510.13999); usage: number of tokens that chose it.",
    )  # fmt: skip
    rows: str | None = option(
        None, "File of rows (JSON Lines or CSV) that decide which experts stay, and on which the loss is measured "
        "before and after.",
        "FILE",
    )  # fmt: skip
    out: str = option("pruned", _OUT, "OUT")
    dry_run: bool = option(False, _DRY_RUN)


class MergeExpertsCommand(JsonCommandLine):
    """`moe-train experts merge`; MERGE_EXPERTS_COMMAND adds the settings of a job."""

    model: str = positional(_MODEL, "MODEL")
    keep: int | None = option(None, "Number of experts that each layer has afterwards; required.", "NUMBER")
    by: Likeness | None = option(
        None, "Likeness of experts. outputs (default): their mean outputs on the rows, in hierarchical clusters "
        "(HC-SMoE, arXiv 2410.08589); weights: the same clusters by their weights, which needs no rows; router_logits: "
        "the most used experts, each with those that the router treats alike (M-SMoE, arXiv 2310.01334).",
    )  # fmt: skip
    align: Literal["on", "off"] | None = option(
        None, "Permute the hidden neurons of experts to match before they are averaged; default: on with --by "
        "router_logits, as in its paper.",
    )  # fmt: skip
    rows: str | None = option(
        None, "File of rows (JSON Lines or CSV) that show which experts are alike and how often they are used, and on "
        "which the loss is measured before and after.",
        "FILE",
    )  # fmt: skip
    out: str = option("merged-experts", _OUT, "OUT")
    dry_run: bool = option(False, _DRY_RUN)


class AddExpertsCommand(JsonCommandLine):
    """`moe-train experts add`; ADD_EXPERTS_COMMAND adds the settings of a job."""

    model: str = positional(_MODEL, "MODEL")
    rows: str | None = option(
        None, "File of rows (JSON Lines or CSV) that the new experts are for, and on which the change is measured.",
        "FILE",
    )  # fmt: skip
    general_rows: str | None = option(
        None, "File of rows of what the model already does: --router domain takes their mean away, and the change on "
        "them is measured too.",
        "FILE",
    )  # fmt: skip
    closed: bool = option(False, str(AddedExperts.model_fields["closed"].description))
    out: str = option("extended", _OUT, "OUT")
    dry_run: bool = option(False, _DRY_RUN)


class SplitCommand(JsonCommandLine):
    """`moe-train experts split`."""

    model: str = positional(_MODEL, "MODEL")
    factor: int = option(2, "Number of new experts for each old one.", "NUMBER", ge=2, le=16)
    out: str = option("split", _OUT, "OUT")
    dry_run: bool = option(False, "Show what would be written, and write nothing.")


# These add the settings of a job as options.
PRUNE_COMMAND: type[PruneCommand] = create_model(
    "PruneCommand", __base__=PruneCommand, **settings_of(SurgeryTraining, SurgeryOptions)
)
MERGE_EXPERTS_COMMAND: type[MergeExpertsCommand] = create_model(
    "MergeExpertsCommand", __base__=MergeExpertsCommand, **settings_of(SurgeryTraining, SurgeryOptions)
)
_ADDED = tuple(name for name in AddedExperts.model_fields if name not in AddExpertsCommand.model_fields)
ADD_EXPERTS_COMMAND: type[AddExpertsCommand] = create_model(
    "AddExpertsCommand",
    __base__=AddExpertsCommand,
    **settings_of(AddedExperts, only=_ADDED),
    **settings_of(SurgeryTraining, SurgeryOptions),
)
SurgeryCommand = PruneCommand | MergeExpertsCommand | AddExpertsCommand | SplitCommand


class SurgerySettings(NamedTuple):
    """The blocks of a job that does the same, and the files of its rows."""

    surgery: Surgery
    training: SurgeryTraining
    options: SurgeryOptions
    rows: str | None = None
    general_rows: str | None = None


def surgery_settings(command: SurgeryCommand) -> SurgerySettings:
    """The same settings as in a job, so that the same values are valid.

    Raises:
        InvalidInput: a value is not valid.
    """
    if isinstance(command, SplitCommand):
        return SurgerySettings(Surgery(action="split", factor=command.factor), SurgeryTraining(), SurgeryOptions())
    asked = _valid(Surgery, _body(command))
    training, options = (
        _valid(block, {name: getattr(command, name) for name in block.model_fields})
        for block in (SurgeryTraining, SurgeryOptions)
    )
    general = command.general_rows if isinstance(command, AddExpertsCommand) else None
    _check_rows(asked, command.rows, general)
    return SurgerySettings(
        asked, SurgeryTraining.model_validate(training), SurgeryOptions.model_validate(options), command.rows, general
    )


def _valid[M: BaseModel](block: type[M], given: dict[str, object]) -> M:
    try:
        return block.model_validate(given)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False), block, _option, as_typed) from None


def _option(path: str) -> str:
    """`drop.all` -> `--drop`, `add.router` -> `--router`; a block as a whole has no option."""
    name = path.removeprefix("add.").partition(".")[0]
    return "" if name in ("", "add") else f"--{name.replace('_', '-')}"


def as_typed(message: str) -> str:
    """A job's message about a surgery with options and MODEL in place of the job's settings."""
    settings = "|".join([*Surgery.model_fields, *AddedExperts.model_fields])
    message = re.sub(r"^model: ", "MODEL: ", message)
    message = re.sub(rf"^({settings}): ", lambda found: f"{_option(found[1])}: ", message)
    return re.sub(rf"`({settings})`", lambda found: _option(found[1]), message)


def _body(command: PruneCommand | MergeExpertsCommand | AddExpertsCommand) -> dict[str, object]:
    if isinstance(command, PruneCommand):
        if command.keep is None and not command.drop:
            raise InvalidInput.missing("--keep", "the number of experts to keep in each layer; or --drop")
        if command.keep is not None and command.rows is None and not command.drop:
            raise InvalidInput.missing("--rows", "a file of rows, because --keep chooses by what experts do on "
                                       "them; or --drop")  # fmt: skip
        return {"action": "prune", "keep": command.keep, "by": command.by, "drop": _drop(command.drop)}
    if isinstance(command, MergeExpertsCommand):
        if command.keep is None:
            raise InvalidInput.missing("--keep", "the number of experts that each layer has afterwards")
        align = None if command.align is None else command.align == "on"
        return {"action": "merge", "keep": command.keep, "by": command.by, "align": align}
    given = {name: getattr(command, name) for name in AddedExperts.model_fields if name in command.model_fields_set}
    return {"action": "add", "add": given}


def _check_rows(asked: Surgery, rows: str | None, general: str | None) -> None:
    if asked.action == "merge" and rows is None and asked.likeness != "weights":
        raise InvalidInput.missing("--rows", f"a file of rows, because --by {asked.likeness} is measured on them; or "
                           "--by weights")  # fmt: skip
    if asked.action != "add":
        return
    if general is not None and rows is None:
        raise InvalidInput("--general-rows", general, "--rows beside it")
    if asked.added.router == "domain" and (rows is None or general is None):
        expected = "a file of rows, because --router domain is the difference of the mean router inputs on both files"
        raise InvalidInput.missing("--rows" if rows is None else "--general-rows", expected)


def _drop(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        layer, colon, experts = each.rpartition(":")
        layer = layer if colon else ALL_LAYERS
        if layer in found:
            raise InvalidInput("--drop", each, "each layer once")
        found[layer] = experts
    return found
