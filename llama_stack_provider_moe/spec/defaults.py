"""A server's defaults for jobs, `defaults:` in its configuration."""

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from llama_stack_provider_moe.spec.ablation import MeasureTraining
from llama_stack_provider_moe.spec.ablation_jobs import EvaluatedModels
from llama_stack_provider_moe.spec.adapter import Adapter
from llama_stack_provider_moe.spec.blocks import Block, Efficiency, Optimizer, Training
from llama_stack_provider_moe.spec.evaluation import GATE_NEEDS, SafetyEvaluation
from llama_stack_provider_moe.spec.exports import Exports
from llama_stack_provider_moe.spec.mixing import MixOptions
from llama_stack_provider_moe.spec.moe import Moe
from llama_stack_provider_moe.spec.options import Options, Trackers
from llama_stack_provider_moe.spec.playground import PlaygroundOptions, PlaygroundTraining
from llama_stack_provider_moe.spec.routing import AnalysisOptions, AnalysisTraining, WholeRowOptions
from llama_stack_provider_moe.spec.surgery import SurgeryOptions, SurgeryTraining

# The fields of `eval` that name something to measure, and those that fit one model only.
MEASURED = (*GATE_NEEDS.values(), "tasks")
OF_ONE_MODEL = ("masked_experts", "masked_from_analysis", "masked_from", "ablated")

# Some fields of a block, as they are in JSON; the block itself checks them.
Part = dict[str, Any]

# The block of a job that each part belongs to.
DEFAULT_BLOCKS: dict[str, type[Block]] = {
    "training": Training, "optimizer": Optimizer, "efficiency": Efficiency, "adapter": Adapter, "moe": Moe,
    "options": Options, "trackers": Trackers, "eval": SafetyEvaluation, "export": Exports,
}  # fmt: skip

# Recipes with few of the blocks, and few of their fields.
_FEW_BLOCKS: dict[str, dict[str, type[Block]]] = {
    "routing_analysis": {"training": AnalysisTraining, "options": AnalysisOptions},
    "ablation_measure": {"training": MeasureTraining, "options": WholeRowOptions},
    "probe": {"training": AnalysisTraining, "options": WholeRowOptions},
    "ablation": {"training": EvaluatedModels, "options": AnalysisOptions, "eval": SafetyEvaluation},
    "mix": {"training": AnalysisTraining, "options": MixOptions},
    "surgery": {"training": SurgeryTraining, "options": SurgeryOptions},
    "playground": {"training": PlaygroundTraining, "options": PlaygroundOptions},
}


class JobDefaults(Block):
    """A server's defaults for jobs: any fields of these blocks. A job's own values override them."""

    training: Part = Field(default_factory=dict, description="Defaults for fields of `training`.")
    optimizer: Part = Field(default_factory=dict, description="Defaults for fields of `optimizer`.")
    efficiency: Part = Field(default_factory=dict, description="Defaults for fields of `efficiency`.")
    adapter: Part | None = Field(
        default=None,
        description="Defaults for fields of `adapter`; if set, jobs without an `adapter` get this one. Left out: none.",
    )
    moe: Part = Field(default_factory=dict, description="Defaults for fields of `moe`.")
    options: Part = Field(default_factory=dict, description="Defaults for fields of `options`.")
    trackers: Part = Field(
        default_factory=dict, description="Defaults for fields of `trackers`; a job switches a tracker off with null."
    )
    eval: Part = Field(
        default_factory=dict,
        description="Defaults for fields of `eval`, except masks and `ablated`. If they name something to measure, "
        'they apply to every training job without `"eval": null`; else only to jobs that have an `eval` block.',
    )
    export: Part = Field(
        default_factory=dict,
        description="Defaults for fields of `export`, for jobs that have this block; other jobs export nothing.",
    )

    # A mistake in a run YAML must stop the server when it starts, not the first job at night. Each block is checked
    # separately, so that the path of an error names it.

    @field_validator("training", "optimizer", "efficiency", "adapter", "moe", "options", "trackers", mode="after")
    @classmethod
    def _part_is_valid(cls, part: Part | None, info: ValidationInfo) -> Part | None:
        DEFAULT_BLOCKS[str(info.field_name)].model_validate(part or {})
        if info.field_name == "adapter" and "init_from" in (part or {}):
            raise ValueError(
                "init_from: fits one base model only, so a server can't have a default for it; set it in jobs"
            )
        return part

    @field_validator("export", mode="after")
    @classmethod
    def _export_is_valid(cls, part: Part) -> Part:
        Exports.model_validate({"merged": True, **part})  # a part alone need not export anything
        return part

    @field_validator("eval", mode="after")
    @classmethod
    def _evaluation_is_valid(cls, part: Part) -> Part:
        for name in OF_ONE_MODEL:
            if name in part:
                raise ValueError(
                    f"{name}: fits one model only, so a server can't have a default for it; set it in jobs"
                )
        # Parts without a set to measure, gates included, get theirs from a job: they must be valid once all are named.
        sets = {} if _names_a_set(part) else dict.fromkeys(GATE_NEEDS.values(), "any")
        SafetyEvaluation.model_validate({**part, **sets})
        return part

    @property
    def _measures(self) -> bool:
        return _names_a_set(self.eval)

    def under(self, body: Part) -> Part:
        """`body` of a job with these defaults filled in, block by block; `body` itself is not changed.

        `"adapter": null` in a body is a choice (train all weights) and stays null, as does `"eval": null`.
        """
        merged = dict(body)
        for name in type(self).model_fields:
            defaults = getattr(self, name)
            few = _FEW_BLOCKS.get(str(body.get("recipe")))
            if few is not None:
                known = few[name].model_fields if name in few else {}
                defaults = {key: value for key, value in (defaults or {}).items() if key in known} or None
            if body.get("recipe") == "export" and name != "export":
                continue
            if name == "eval" and "eval" not in body and (few is not None or not self._measures):
                continue  # settings, but nothing to measure, or a job that trains nothing
            # A default for exports, such as a data type, does not mean that every job is exported.
            asked = name != "export" and defaults is not None
            given = body.get(name, {} if asked else None)
            if isinstance(given, dict) and defaults:
                merged[name] = {**defaults, **given}
        return merged


def _names_a_set(evaluation: Part) -> bool:
    return any(evaluation.get(name) for name in MEASURED)
