"""The commands of `moe-train` that need torch and no server: what a user may type after each.

`control.cli.local` shows and checks the options without torch; the training process reads them again.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationError, create_model

from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.spec import (
    Analysis,
    AnalysisOptions,
    AnalysisTraining,
    DType,
    Gate,
    RefusalJudge,
    RoutingAnalysisSpec,
    RowKind,
    SafetyEvaluation,
)
from llama_stack_provider_moe.spec.ablation import DirectionKind, RunTimeAblation
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.command_words import (
    CommandLine,
    JsonCommandLine,
    metavar,
    option,
    positional,
)
from llama_stack_provider_moe.spec.error_words import problems_of
from llama_stack_provider_moe.spec.exports import shard_bytes
from llama_stack_provider_moe.spec.gguf_types import GGUF_TYPES, GgufType
from llama_stack_provider_moe.spec.routing import made_for, masks_of, read_report

EVALUATION_SETS: dict[str, RowKind] = {
    "refuse": "conversation", "safe": "conversation", "retain": "conversation", "scenarios": "scenario",
    "labelled": "judged",
}  # fmt: skip
# Dense families that can be upcycled -> switches of their configs that the MoE family does not have.
UPCYCLED: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": (),
    "qwen3": ("attention_bias", "use_sliding_window"),
}
_PLAIN = ("max_rows", "max_new_tokens", "batch_size", "resamples", "examples")


def _meaning(name: str) -> str:
    fields = (RefusalJudge if name == "labelled" else SafetyEvaluation).model_fields
    return str(fields[f"{name}_dataset_id"].description)


def _direction_meaning() -> str:
    words = str(RunTimeAblation.model_fields["direction"].description)
    return words[:1].lower() + words[1:]


def _shard_size(text: str) -> str:
    try:
        shard_bytes(text.strip().upper())
    except ValueError:
        raise ValueError("bytes, or a number with KB, MB or GB, such as 5GB") from None
    return text


class UpcycleCommand(CommandLine):
    """`moe-train upcycle`."""

    source: str = positional(
        "Dense model: a folder with config.json and safetensors, name of a job, or hub id.", "SOURCE"
    )
    out: str = positional("Folder for the new model; must not exist.", "OUT")
    experts: int = option(4, "Number of experts in each layer.", ge=2)
    top_k: int = option(2, "Number of experts that each token is routed to.", ge=1)
    seed: int = option(0, "Seed of the router weights and of the noise.")
    router_std: float = option(0.02, "Standard deviation of the router weights.", gt=0, le=1)
    expert_noise: float = option(
        0.0, "Noise added to each expert, in standard deviations of its matrices; 0 keeps the model's logits.",
        ge=0, le=1,
    )  # fmt: skip


class FamiliesCommand(JsonCommandLine):
    """`moe-train families`."""


class MixCommand(JsonCommandLine):
    """`moe-train mix`."""

    plan: str = positional("Plan: a job of recipe `mix` in YAML or JSON; `recipe` may be left out.", "PLAN")
    out: str = option("mixed", "Folder for the mixed model; must not exist.", "OUT")
    dry_run: bool = option(False, "Compare the branches and show what would be made; write nothing.")


class MergeCommand(JsonCommandLine):
    """`moe-train export merge`."""

    base: str = positional("Base model: a folder with config.json and safetensors, name of a job, or hub id.", "BASE")
    adapter: str = positional("Folder of a LoRA adapter, or name or folder of the job that trained it.", "ADAPTER")
    out: str = positional("Folder for the merged model; must not exist.", "OUT")
    dtype: DType | None = option(None, "Data type of the merged matrices; default: the base's.")
    shard_size: Annotated[str, BeforeValidator(_shard_size)] = option("5GB", "Largest size of one file.", "SIZE")


class LoadCheckCommand(JsonCommandLine):
    """`moe-train export check`."""

    given: str = positional("Folder or name of a job, or of one of its artifacts.", "JOBFOLDER|ADAPTER")
    base: str | None = option(
        None, "Base model: a folder, name of a job, or hub id; default: the model that the job names.", "MODEL"
    )
    merged: str | None = option(
        None, "Merged model to compare with the adapter on its base: a folder or name of a job.", "FOLDER"
    )


class GgufCommand(JsonCommandLine):
    """`moe-train export gguf`."""

    model: str = positional(
        "Model: a folder with config.json, safetensors and tokenizer, name of a job, or hub id.", "MODEL"
    )
    out: str = positional("GGUF file to write; must not exist.", "OUT")
    type: GgufType | None = option(None, "Type of the weights (required without --mmproj).")
    mmproj: bool = option(
        False, "Write vision tower and projector instead, in the model's own precision: the file that --mmproj of "
        "llama.cpp's programs loads.",
    )  # fmt: skip

    def require_one_file(self) -> None:
        """Raise InvalidInput unless the command says which file to write."""
        if self.mmproj and self.type is not None:
            raise InvalidInput("--type", self.type, "none with --mmproj: that file keeps the model's own precision")
        if self.type is None and not self.mmproj:
            raise InvalidInput.missing("--type", f"one of {', '.join(GGUF_TYPES)}")


def settings_of(*blocks: type[Block], only: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Options with the names, defaults and meanings of a job's settings. The blocks check the values."""
    return {
        name: (Any, option(field.get_default(), str(field.description), metavar(field)))
        for block in blocks
        for name, field in block.model_fields.items()
        if only is None or name in only
    }


class RoutingCommand(JsonCommandLine):
    """`moe-train analyze routing`; ROUTING_COMMAND adds the settings of a job."""

    model: str = positional("Model: a folder, name of a job, or hub id.", "MODEL")
    rows: list[str] = option([], "Name and file (JSON Lines or CSV) of a set of rows. Give two or more.", "NAME=FILE")
    adapter: str | None = option(None, "LoRA adapter on the model: a folder or name of a job.", "FOLDER")
    out: str = option("routing", "Folder for routing.json and the charts.", "FOLDER")


# Adds the settings of a job as options.
ROUTING_COMMAND: type[RoutingCommand] = create_model(
    "RoutingCommand",
    __base__=RoutingCommand,
    **settings_of(Analysis, AnalysisTraining, AnalysisOptions),
)


class EvaluationCommand(JsonCommandLine):
    """`moe-train eval`; EVALUATION_COMMAND adds the settings of a job."""

    model: str = positional("Model: a folder, name of a job, or hub id; with --url, its name on the server.", "MODEL")
    adapter: str | None = option(
        None, "LoRA adapter: a folder or name of a job. `before` is measured without it, `after` with it.", "FOLDER"
    )
    refuse: str | None = option(None, _meaning("refuse"), "FILE")
    safe: str | None = option(None, _meaning("safe"), "FILE")
    retain: str | None = option(None, _meaning("retain"), "FILE")
    scenarios: str | None = option(None, _meaning("scenarios"), "FILE")
    labelled: str | None = option(None, _meaning("labelled"), "FILE")
    url: str | None = option(
        None, "URL of an OpenAI-compatible server, with /v1. MOE_EVAL_API_KEY holds its API key.", "URL"
    )
    timeout: float = option(120.0, "Seconds to wait for one answer of a server.", gt=0)
    judge_model: str | None = option(
        None, "Model that judges refusals: a folder, name of a job, or hub id; default: the keyword judge.", "MODEL"
    )
    judge_url: str | None = option(
        None, "URL of the server of the judge's model. MOE_EVAL_API_KEY holds its API key.", "URL"
    )
    mask: list[str] = option([], "Experts to mask in a layer, e.g. 3:0-3,7. Repeatable.", "LAYER:EXPERTS")
    mask_from: str | None = option(None, "Routing analysis (routing.json) whose experts to mask.", "FILE")
    mask_set: str | None = option(None, "With --mask-from: the set of rows whose experts to mask.", "NAME")
    mask_top: int = option(
        10, "With --mask-from: the most experts to mask; those that chance can explain are never masked."
    )
    ablate: list[str] = option(
        [], "Decoder blocks to measure without the direction that was measured after a block, and the share to take "
        "out (1 if left out), e.g. 8-23:15:0.5. Repeatable.", "BLOCKS:BLOCK:SHARE",
    )  # fmt: skip
    ablate_from: str | None = option(
        None, "With --ablate: measurements of the model: a measurements.safetensors, its folder, or name of a job.",
        "FILE",
    )  # fmt: skip
    ablate_direction: DirectionKind = option("projected", f"With --ablate: {_direction_meaning()}")
    ablate_gate_scale: float = option(
        0.5, "With --ablate: share of the same at which routers stop reading the direction; 0 leaves them untouched."
    )
    ablate_experts: bool = option(False, "With --ablate: take it out of what routed experts write, too.")
    task: list[str] = option([], "Task of lm-eval to run. Repeatable.", "TASK")
    fail_if: list[str] = option(
        [], f"Limit above which the exit code is 1: {', '.join(Gate.model_fields)}. Repeatable.", "NAME=LIMIT"
    )
    max_length: int = option(1024, "Maximum number of tokens in a prompt.", ge=1)
    seed: int = option(42, "Seed of the resampling.", ge=0)
    dtype: DType = option("bf16", "Data type of the model's parameters.")
    chat_template: Literal["chatml", "plain"] | None = option(None, "Chat template; default: the model's own.")
    out: str = option("evaluation", "Folder for eval.json.", "FOLDER")


# Adds the settings of a job as options.
EVALUATION_COMMAND: type[EvaluationCommand] = create_model(
    "EvaluationCommand",
    __base__=EvaluationCommand,
    **settings_of(SafetyEvaluation, only=_PLAIN),
)


def routing_job(command: RoutingCommand) -> tuple[RoutingAnalysisSpec, dict[str, Path]]:
    """The job that makes the same analysis, so that the same values are valid; and the file of each set.

    Raises:
        InvalidInput: a value is not valid.
    """
    sets = named_files(command.rows)
    body = {
        "recipe": "routing_analysis",
        "model": command.model,
        "adapter_folder": command.adapter,
        "data": {"sets": sets},
        "analysis": {name: getattr(command, name) for name in Analysis.model_fields},
        "training": {name: getattr(command, name) for name in AnalysisTraining.model_fields},
        "options": {name: getattr(command, name) for name in AnalysisOptions.model_fields},
    }
    try:
        return RoutingAnalysisSpec.model_validate(body), {name: Path(path) for name, path in sets.items()}
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None


def named_files(given: list[str]) -> dict[str, str]:
    """Name -> file of each `--rows NAME=FILE`.

    Raises:
        InvalidInput: one has another form, or a name occurs twice.
    """
    sets: dict[str, str] = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not equals or name in sets:
            raise InvalidInput("--rows", each, "NAME=FILE, each name once")
        sets[name] = path
    return sets


def evaluation_settings(command: EvaluationCommand) -> SafetyEvaluation:
    """The block `eval` of a job that measures the same, so that the same values are valid.

    Raises:
        InvalidInput: a value is not valid.
    """
    masked: dict[str, str] = {}
    for given in command.mask:
        layer, colon, experts = given.partition(":")
        if not colon or layer in masked:
            raise InvalidInput("--mask", given, "LAYER:EXPERTS such as 3:0-3,7, each layer once")
        masked[layer] = experts
    masked_from = None
    if command.mask_from is not None:
        found, masked_from = _of_analysis(command, command.mask_from)
        for layer, experts in found.items():
            masked[layer] = f"{masked[layer]},{experts}" if layer in masked else experts
    if command.judge_url and command.judge_model is None:
        raise InvalidInput("--judge-url", command.judge_url, "also --judge-model, the model's name on that server")
    body = {
        **{f"{name}_dataset_id": getattr(command, name) for name in EVALUATION_SETS if name != "labelled"},
        **{name: getattr(command, name) for name in _PLAIN},
        "judge": {
            "kind": "keyword" if command.judge_model is None else "model",
            "model": command.judge_model,
            "labelled_dataset_id": command.labelled,
        },
        "masked_experts": masked,
        "masked_from": masked_from,
        "ablated": _ablated(command),
        "tasks": command.task,
        "fail_if": _limits(command),
    }
    try:
        return SafetyEvaluation.model_validate(body)
    except ValidationError as error:
        raise InvalidBody(problems_of(error)) from None


def _limits(command: EvaluationCommand) -> dict[str, str]:
    limits: dict[str, str] = {}
    for given in command.fail_if:
        name, equals, limit = given.partition("=")
        if not equals or name not in Gate.model_fields:
            raise InvalidInput("--fail-if", given, f"NAME=LIMIT, NAME one of {', '.join(Gate.model_fields)}")
        limits[name] = limit
    if limits and command.adapter is None:
        raise InvalidInput("--fail-if", limits, "also --adapter: without one there is nothing to compare with")
    return limits


def _ablated(command: EvaluationCommand) -> dict[str, object] | None:
    """The block `eval.ablated` of a job that takes the same directions out."""
    if not command.ablate:
        if command.ablate_from is not None:
            raise InvalidInput("--ablate-from", command.ablate_from, "also --ablate, the blocks to edit")
        return None
    if command.ablate_from is None:
        raise InvalidInput("--ablate", command.ablate[0], "also --ablate-from, the measurements of the model")
    entries = []
    for given in command.ablate:
        parts = given.split(":")
        if not 2 <= len(parts) <= 3:
            raise InvalidInput("--ablate", given, "BLOCKS:BLOCK:SHARE or BLOCKS:BLOCK, such as 8-23:15:0.5")
        entries.append(dict(zip(("layer", "measurement", "scale"), parts, strict=False)))
    return {
        "measurements": command.ablate_from,
        "direction": command.ablate_direction,
        "gate_scale": command.ablate_gate_scale,
        "ablate_individual_experts": command.ablate_experts,
        "ablate": entries,
    }


def _of_analysis(command: EvaluationCommand, file: str) -> tuple[dict[str, str], dict[str, object]]:
    """The experts that a routing analysis found for `--mask-set`, as a job takes them, and their source."""
    path, name, top = Path(file), command.mask_set, command.mask_top
    if name is None:
        raise InvalidInput("--mask-from", str(path), "also --mask-set, the set whose experts are masked")
    if top < 1:
        raise InvalidInput("--mask-top", top, ">= 1")
    report = read_report(path, "--mask-from")
    try:
        found = masks_of(report, name, top, "--mask-from")
    except InvalidInput as error:
        raise InvalidInput("--mask-set", name, error.expected) from None
    return found, made_for(report, f"{path.name}, set {name}, top {top}").model_dump()
