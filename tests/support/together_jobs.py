"""Bodies of HTTP jobs that should give the same in one process and in two, for each recipe and strategy."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

STRATEGIES = ("ddp", "fsdp", "ep")
# recipe -> family, and parts of the body. A breaker with a fresh adapter equals its reference, so its first gradient is
# only rounding, and what it does then is chance: it begins with another job's adapter, for which it waits.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("granitemoe", {"data": {"dataset_id": "words"}, "optimizer": {"lr": 5e-3},
                           "moe": {"train_router": True, "router_aux_loss_coef": 0.1}}),
    "dpo": ("mixtral", {"data": {"dataset_id": "pairs"}, "optimizer": {"lr": 5e-3}}),
    "circuit_breaker": ("mixtral", {"data": {"dataset_id": "words"}, "optimizer": {"lr": 1e-3},
                                    "adapter": {"rank": 4, "init_from": "dpo-alone"},
                                    "circuit_breaker": {"retain": {"dataset_id": "kept"}, "target_layers": "1"}}),
}  # fmt: skip
PAIRS = list(product(RECIPES, STRATEGIES))
FEW = list(zip(RECIPES, ("ep", "ddp", "fsdp"), strict=True))  # each recipe and each strategy once
BATCH, STEPS = 8, 3


def body(recipe: str, models: Path, strategy: str | None, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    """A job of a few steps with `BATCH` rows; with `strategy` None in one process."""
    family, parts = RECIPES[recipe]
    alone = strategy is None
    together = {} if alone else {"resources": {"gpus": 0, "processes": 2, "strategy": strategy}}
    options: dict[str, Any] = {"max_length": 64, "validation_split": 0}
    if recipe == "dpo":
        options["precompute_ref_log_probs"] = False
    training = {"dtype": "fp32", "batch_size": BATCH if alone else BATCH // 2, "max_steps_per_epoch": steps}
    return {
        "recipe": recipe, "job_uuid": f"{recipe}-{strategy or 'alone'}", "model": str(models / family),
        "training": training, "adapter": {"rank": 4}, "options": options, **together, **parts, **more,
    }  # fmt: skip


def bodies(models: Path, pairs: Iterable[tuple[str, str]] = PAIRS) -> list[dict[str, Any]]:
    """Each recipe in one process, and in two as the pairs of recipe and strategy say."""
    asked: list[tuple[str, str | None]] = [(recipe, None) for recipe in RECIPES]
    return [body(recipe, models, strategy) for recipe, strategy in [*asked, *sorted(pairs)]]
