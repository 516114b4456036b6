"""OpenAI's methods of fine-tuning, by our recipes, and the learning rate that a multiplier of 1 stands for."""

from typing import Final, Literal

type Method = Literal["supervised", "dpo"]

RECIPES: Final[dict[Method, Literal["sft", "dpo"]]] = {"supervised": "sft", "dpo": "dpo"}
METHODS: Final[dict[str, Method]] = {recipe: method for method, recipe in RECIPES.items()}
# Learning rates of LoRA, as in our templates; a preference loss needs a smaller one.
BASE_LR: Final[dict[str, float]] = {"sft": 1e-4, "dpo": 5e-6, "circuit_breaker": 1e-4}


def multiplier(recipe: str, lr: float) -> float:
    """Return the learning rate multiplier of a job, without the last digits of its division."""
    return float(f"{lr / BASE_LR[recipe]:.12g}")
