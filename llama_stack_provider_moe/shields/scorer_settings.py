"""How a server runs the process that scores conversations."""

import re
import sys

from pydantic import Field, field_validator

from llama_stack_provider_moe.spec.blocks import Block

PROBE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
MOST_PROBES = 16


class ScorerSettings(Block):
    """The scorer process: its probes, and how long it may take."""

    probes: dict[str, str] = Field(
        description="Probes to score with: a name of your choice -> folder with probe.json and probe.safetensors. "
        "Probes of the same model share it."
    )
    python: str = Field(
        default=sys.executable,
        min_length=1,
        max_length=4096,
        description="Interpreter of the environment with torch that runs the scorer.",
    )
    queue: int = Field(
        default=256, ge=1, le=100_000, description="Conversations that may wait; further ones are not scored."
    )
    batch_size: int = Field(default=16, ge=1, le=4096, description="Texts in one pass through a model.")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="Processor threads of the scorer; left out: torch decides."
    )
    ping_s: float = Field(
        default=2.0, ge=0.05, le=60, description="Seconds between two checks that the scorer answers."
    )
    hung_after_s: float = Field(
        default=30.0,
        ge=0.2,
        le=3600,
        description="Seconds without an answer to a check after which the scorer is killed and replaced; longer than "
        "its longest batch.",
    )
    load_s: float = Field(
        default=900.0, ge=1, le=86_400, description="Seconds after its start within which the scorer must answer."
    )

    @field_validator("probes")
    @classmethod
    def _are_named_and_few(cls, probes: dict[str, str]) -> dict[str, str]:
        if not 1 <= len(probes) <= MOST_PROBES:
            raise ValueError(f"{len(probes)} probes; expected 1 to {MOST_PROBES}")
        for name, folder in probes.items():
            if re.fullmatch(PROBE_NAME_PATTERN, name) is None:
                raise ValueError(f"{name[:80]!r} is not valid as a name; expected 1 to 64 letters, digits, '_' and "
                                 "'-', the first a letter or a digit")  # fmt: skip
            if not 1 <= len(folder) <= 4096:
                raise ValueError(f"{name}: is not valid; expected a folder of 1 to 4096 characters")
        return probes
