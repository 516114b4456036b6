"""Remove what Unsloth adds to an adapter's config, so that the folder is a plain PEFT adapter."""

import json
from pathlib import Path

from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.jobdir.folder import write_atomic

LAYOUT = "lora_B_layout"
_DETAIL = "unsloth_fused_expert_lora"


def as_peft_writes(config: Path) -> None:
    """Remove Unsloth's keys from the file `config`; a config without them does not change.

    Raises:
        CheckpointError: the experts' LoRA is not in PEFT's order, so PEFT would load it wrongly.
    """
    saved = json.loads(config.read_text(encoding="utf-8"))
    if _DETAIL in saved or LAYOUT in saved:
        orders = (saved.get(LAYOUT), (saved.get(_DETAIL) or {}).get("lora_A_layout"))
        if orders != ("rank_major", "grouped_by_expert"):
            raise CheckpointError(
                f"loader: 'unsloth' keeps the experts' LoRA in another order than PEFT: {orders}; expected "
                "('rank_major', 'grouped_by_expert')"
            )
    mapping = saved.get("auto_mapping") or {}
    if _DETAIL in saved or LAYOUT in saved or "unsloth_fixed" in mapping:
        plain = {name: value for name, value in saved.items() if name not in (_DETAIL, LAYOUT)}
        write_atomic(config, json.dumps({**plain, "auto_mapping": None}, indent=2))
