"""How a server runs the process that scores conversations."""

import re

from pydantic import Field, field_validator

from llama_stack_provider_moe.spec.scorer_config import MOST_PROBES, PROBE_NAME_PATTERN, ScorerLimits


class ScorerSettings(ScorerLimits):
    """The scorer process: its probes, and how long it may take."""

    probes: dict[str, str] = Field(
        description="Probes to score with: a name of your choice -> folder with probe.json and probe.safetensors. "
        "Probes of the same model share it."
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
