"""What Unsloth adds to an adapter's config.json, read and taken out: the folder is a PEFT adapter."""

import json
from pathlib import Path

from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.jobs.folder import write_atomic

LAYOUT = "lora_B_layout"
_DETAIL = "unsloth_fused_expert_lora"


def as_peft_writes(config: Path) -> None:
    """Take Unsloth's own keys out of `config`; of an adapter that it has not touched nothing changes.

    Raises:
        CheckpointError: experts' LoRA lies in another order than PEFT's, which whoever loads it takes it for.
    """
    told = json.loads(config.read_text(encoding="utf-8"))
    if _DETAIL in told or LAYOUT in told:
        orders = (told.get(LAYOUT), (told.get(_DETAIL) or {}).get("lora_A_layout"))
        if orders != ("rank_major", "grouped_by_expert"):
            raise CheckpointError(
                f"loader: 'unsloth' holds experts' LoRA in another order than PEFT's: {orders}; expected "
                "('rank_major', 'grouped_by_expert')"
            )
    mapping = told.get("auto_mapping") or {}
    if _DETAIL in told or LAYOUT in told or "unsloth_fixed" in mapping:
        plain = {name: value for name, value in told.items() if name not in (_DETAIL, LAYOUT)}
        write_atomic(config, json.dumps({**plain, "auto_mapping": None}, indent=2))
