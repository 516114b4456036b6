"""A server's own defaults of jobs, `defaults:` in its configuration."""

from typing import Any

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.adapter import Adapter
from llama_stack_provider_moe.spec.blocks import Block, Efficiency, Optimizer, Training
from llama_stack_provider_moe.spec.evaluation import GATE_NEEDS, SafetyEvaluation
from llama_stack_provider_moe.spec.exports import Exports
from llama_stack_provider_moe.spec.moe import Moe
from llama_stack_provider_moe.spec.options import Options, Trackers
from llama_stack_provider_moe.spec.routing import AnalysisOptions, AnalysisTraining

# Of `eval`: what names something to measure, and what is of one model alone.
MEASURED = (*GATE_NEEDS.values(), "tasks")
OF_ONE_MODEL = ("masked_experts", "masked_from_analysis", "masked_from")


class JobDefaults(Block):
    """A server's own defaults for jobs: any part of these blocks; a job's own values go before them."""

    training: dict[str, Any] = Field(default_factory=dict, description="Parts of `training`.")
    optimizer: dict[str, Any] = Field(default_factory=dict, description="Parts of `optimizer`.")
    efficiency: dict[str, Any] = Field(default_factory=dict, description="Parts of `efficiency`.")
    adapter: dict[str, Any] | None = Field(
        default=None, description="Parts of `adapter`; given, jobs that name no adapter get this one."
    )
    moe: dict[str, Any] = Field(default_factory=dict, description="Parts of `moe`.")
    options: dict[str, Any] = Field(default_factory=dict, description="Parts of `options`.")
    trackers: dict[str, Any] = Field(
        default_factory=dict, description="Parts of `trackers`; a job turns one off with null."
    )
    eval: dict[str, Any] = Field(
        default_factory=dict,
        description="Parts of `eval`, but for masks. Naming something to measure, they measure every training job that "
        'does not say `"eval": null`; else they lie beneath the `eval` of jobs that have one.',
    )
    export: dict[str, Any] = Field(
        default_factory=dict, description="Parts of `export`, for jobs that have this block; others export nothing."
    )

    @model_validator(mode="after")
    def _each_part_is_valid(self) -> "JobDefaults":
        # A typing error in a run YAML must stop the server at its start, not the first job at night.
        blocks: dict[str, type[Block]] = {
            "training": Training, "optimizer": Optimizer, "efficiency": Efficiency,
            "adapter": Adapter, "moe": Moe, "options": Options, "trackers": Trackers,
        }  # fmt: skip
        for name, block in blocks.items():
            block.model_validate(getattr(self, name) or {})
        self._check_evaluation()
        Exports.model_validate({"merged": True, **self.export})  # a part need not ask for something
        return self

    def _check_evaluation(self) -> None:
        for name in OF_ONE_MODEL:
            if name in self.eval:
                raise ValueError(f"defaults.eval.{name}: is of one model's experts, and jobs name many; it is for jobs")
        # Parts that name nothing to measure wait for a job's sets, a gate's too: with all of them they must be right.
        sets = {} if self._measures else dict.fromkeys(GATE_NEEDS.values(), "any")
        SafetyEvaluation.model_validate({**self.eval, **sets})

    @property
    def _measures(self) -> bool:
        return any(self.eval.get(name) for name in MEASURED)

    def under(self, body: dict[str, Any]) -> dict[str, Any]:
        """`body` of a job with these defaults beneath it, block by block; `body` itself is left as it is.

        `"adapter": null` in a body is a choice (train all weights) and stays null, as `"eval": null` does.
        """
        merged = dict(body)
        analysis: dict[str, type[Block]] = {"training": AnalysisTraining, "options": AnalysisOptions}
        for name in type(self).model_fields:
            defaults = getattr(self, name)
            if body.get("recipe") == "routing_analysis":  # which has few of the blocks, and few of their fields
                known = analysis[name].model_fields if name in analysis else {}
                defaults = {key: value for key, value in (defaults or {}).items() if key in known} or None
            if body.get("recipe") == "export" and name != "export":
                continue
            if name == "eval" and "eval" not in body and not self._measures:
                continue  # how to measure, but nothing to
            # A server's wish for a data type is no wish that every job be exported.
            asked = name != "export" and defaults is not None
            given = body.get(name, {} if asked else None)
            if isinstance(given, dict) and defaults:
                merged[name] = {**defaults, **given}
        return merged
