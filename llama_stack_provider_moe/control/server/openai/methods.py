"""OpenAI's methods of fine-tuning, by our recipes, and the learning rate that a multiplier of 1 stands for."""

from typing import Final, Literal

from llama_stack_provider_moe.spec.rl import RL

type Method = Literal["supervised", "dpo", "reinforcement"]
type Recipe = Literal["sft", "dpo", "grpo"]

RECIPES: Final[dict[Method, Recipe]] = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
METHODS: Final[dict[str, Method]] = {recipe: method for method, recipe in RECIPES.items()}
# Learning rates of LoRA, as in our templates; a preference loss and rewards need a smaller one.
BASE_LR: Final[dict[str, float]] = {"sft": 1e-4, "dpo": 5e-6, "circuit_breaker": 1e-4, "grpo": 1e-5}
BASE_ANSWERS: Final = int(RL.model_fields["n_generations"].default)  # to each prompt, at a compute multiplier of 1


def multiplier(recipe: str, lr: float) -> float:
    """Return the learning rate multiplier of a job, without the last digits of its division."""
    return float(f"{lr / BASE_LR[recipe]:.12g}")
