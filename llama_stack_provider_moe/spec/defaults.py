"""A server's defaults for jobs, `defaults:` in its configuration.

A server reads its configuration when it starts, so this module loads the blocks of jobs only where it needs them.
"""

from importlib import import_module
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from llama_stack_provider_moe.spec.blocks import Block

# The fields of `eval` that fit one model only.
OF_ONE_MODEL = ("masked_experts", "masked_from_analysis", "masked_from", "ablated")

# Some fields of a block, as they are in JSON; the block itself checks them.
Part = dict[str, Any]

# The names of blocks in `spec`, which loads a block by its name; `default_blocks` has all of them.
_BLOCKS = {
    "training": "Training", "optimizer": "Optimizer", "efficiency": "Efficiency", "adapter": "Adapter", "moe": "Moe",
    "options": "Options", "trackers": "Trackers", "eval": "SafetyEvaluation", "export": "Exports",
}  # fmt: skip


def block_of(part: str) -> type[Block]:
    """Return the block of a job that a part of the defaults belongs to."""
    found: type[Block] = getattr(import_module("llama_stack_provider_moe.spec"), _BLOCKS[part])
    return found


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
        block_of(str(info.field_name)).model_validate(part or {})
        if info.field_name == "adapter" and "init_from" in (part or {}):
            raise ValueError(
                "init_from: fits one base model only, so a server can't have a default for it; set it in jobs"
            )
        return part

    @field_validator("export", mode="after")
    @classmethod
    def _export_is_valid(cls, part: Part) -> Part:
        block_of("export").model_validate({"merged": True, **part})  # a part alone need not export anything
        return part

    @field_validator("eval", mode="after")
    @classmethod
    def _evaluation_is_valid(cls, part: Part) -> Part:
        for name in OF_ONE_MODEL:
            if name in part:
                raise ValueError(
                    f"{name}: fits one model only, so a server can't have a default for it; set it in jobs"
                )
        from llama_stack_provider_moe.spec.evaluation import GATE_NEEDS

        # Parts without a set to measure, gates included, get theirs from a job: they must be valid once all are named.
        sets = {} if _names_a_set(part) else dict.fromkeys(GATE_NEEDS.values(), "any")
        block_of("eval").model_validate({**part, **sets})
        return part

    @property
    def _measures(self) -> bool:
        return _names_a_set(self.eval)

    def under(self, body: Part) -> Part:
        """`body` of a job with these defaults filled in, block by block; `body` itself is not changed.

        `"adapter": null` in a body is a choice (train all weights) and stays null, as does `"eval": null`.
        """
        from llama_stack_provider_moe.spec.default_blocks import FEW_BLOCKS

        merged = dict(body)
        for name in type(self).model_fields:
            defaults = getattr(self, name)
            few = FEW_BLOCKS.get(str(body.get("recipe")))
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
    from llama_stack_provider_moe.spec.evaluation import GATE_NEEDS

    return any(evaluation.get(name) for name in (*GATE_NEEDS.values(), "tasks"))
