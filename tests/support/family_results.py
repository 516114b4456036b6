"""Which laws each family holds: the table that `test_every_family` proves, and the file behind `moe-train families`.

    python -m tests.support.family_results    write compute/moe/families.json

`FAILS` must be exact: the test fails where a listed law holds too.
"""

import json
from pathlib import Path
from typing import NamedTuple

import transformers

from llama_stack_provider_moe.compute.moe import families_command
from llama_stack_provider_moe.compute.moe.exceptions import REFUSED
from llama_stack_provider_moe.compute.moe.families_command import features
from llama_stack_provider_moe.compute.moe.model_types import types_with_experts
from tests.support.family_laws import LAWS
from tests.support.family_subject import Subject

FILE = Path(families_command.__file__).with_name("families.json")


class Failure(NamedTuple):
    """Why a law does not hold, and what the error says."""

    reason: str
    shows: str


_BY_NUMBERS = Failure(
    "sizes of tensors in its attention depend on the numbers in a mask, and a dry run has no numbers; the LoRA report "
    "says so and counts the rest, and a job starts without an estimate",
    "depend on the numbers",
)

# Model type -> why no tiny model of it is made here.
NOT_MADE: dict[str, str] = {
    "inkling_mm_model": "its class needs scipy; its language model is inkling_text",
    "qwen3_omni_moe": "its class also speaks, and its language model is qwen3_omni_moe_thinker",
}

# Model type and law -> why it does not hold.
FAILS: dict[tuple[str, str], Failure] = {
    ("glm5_next", "memory plan"): _BY_NUMBERS,
    ("qwen4_exp", "memory plan"): _BY_NUMBERS,
    ("qwen4_exp_text", "memory plan"): _BY_NUMBERS,
}


def document() -> dict[str, object]:
    """The content of the file."""
    return {
        "transformers": transformers.__version__,
        "laws": list(LAWS),
        "families": {model_type: _entry(model_type) for model_type in types_with_experts()},
    }


def _entry(model_type: str) -> dict[str, object]:
    whole = types_with_experts()[model_type]
    if reason := NOT_MADE.get(model_type) or REFUSED.get(model_type):
        return {"class": whole, "refused": reason}
    return {
        "class": whole,
        "found": features(Subject(model_type).layout),
        "fails": {law: failure.reason for (one, law), failure in FAILS.items() if one == model_type},
    }


def text() -> str:
    """The file, as it is written."""
    return json.dumps(document(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
