"""The job that trains a reward model: a sequence classifier of one label, on pairs of answers."""

from typing import Literal

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.exports import Exports
from llama_stack_provider_moe.spec.options import Options
from llama_stack_provider_moe.spec.preference_jobs import refuse_what_is_for_sft
from llama_stack_provider_moe.spec.training_jobs import TrainingJob


class RewardSpec(TrainingJob):
    """A reward model by Bradley and Terry's loss (Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""

    recipe: Literal["reward"] = Field(description="Reward model: a sequence classifier trained on pairs of answers.")
    center_rewards: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Weight of the mean square of the sum of a pair's two rewards, which keeps rewards around 0 "
        "(arXiv 2312.09244); 0: off.",
    )
    options: Options = Field(default_factory=Options)

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> "RewardSpec":
        refuse_what_is_for_sft(self, self.recipe, "a reward model compares two answers to one prompt")
        if self.resources.sharded:
            raise ValueError(f"resources.strategy: {self.resources.strategy!r} is not valid with recipe 'reward', "
                             "whose new head is not divided; expected 'ddp'")  # fmt: skip
        if self.moe.moe_load_balancing in ("aux_free", "expert_choice"):
            raise ValueError(f"moe.moe_load_balancing: {self.moe.moe_load_balancing!r} is not valid with recipe "
                             "'reward', whose model routes in graders as it came; expected 'switch' or "
                             "'gshard'")  # fmt: skip
        if self.eval is not None:
            raise ValueError("eval: is not valid with recipe 'reward': a classifier writes no answers that could be "
                             "evaluated; expected null")  # fmt: skip
        if self.adapter is not None and self.adapter.apply_lora_to_output:
            raise ValueError("adapter.apply_lora_to_output: true is not valid with recipe 'reward', whose head is new "
                             "and trains whole; expected false")  # fmt: skip
        if self.export is not None:
            check_exports(self.export, "export.")
        return self


def check_exports(asked: Exports, prefix: str) -> None:
    """Raise if an `export` block asks for what can't be made of a classifier.

    Args:
        asked: the block.
        prefix: of the field names in the error.

    Raises:
        ValueError: naming the setting.
    """
    whole = "for a whole model set options.save_merged true, or adapter null"
    refused = {
        "gguf": (bool(asked.gguf), "a GGUF file of it would have no head that writes text"),
        "ollama": (asked.ollama is not None, "Ollama serves models that write text"),
        "serve": (asked.serve, "it is served by no inference; grader reward_model reads it"),
        "merged": (asked.merged, whole),
        "dtype": (asked.dtype is not None, whole),
    }
    for name, (is_asked, why) in refused.items():
        if is_asked:
            raise ValueError(f"{prefix}{name}: is not valid for a reward model, a sequence classifier: {why}")
