"""Checks the shields that a run YAML registers on Llama Stack: `registered_resources.shields`, in its order."""

import re
from collections.abc import Iterator, Mapping, Sequence

from llama_stack_provider_moe.control.config_check import run_yaml
from llama_stack_provider_moe.control.config_check.surroundings import Findings
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.shields.guard import params_of
from llama_stack_provider_moe.spec.guard_config import (
    SHIELD_PATTERN,
    SHIELD_WORDS,
    GuardConfig,
    ShieldParams,
    TrajectoryParams,
    own_id,
)

FIELD = "registered_resources.shields"
_IDS = ("shield_id", "provider_shield_id")


def check(listed: Sequence[object], provider_id: str, config: GuardConfig, environment: Mapping[str, str]) -> Findings:
    """Find what keeps a host from registering the shields of a provider.

    Args:
        listed: the shields of a run YAML, of every provider, as written.
        provider_id: the provider.
        config: the provider's configuration.
        environment: variables for `${env.NAME}`.
    """
    checked = _Checked(config)
    later = [each.get("shield_id") for each in listed if isinstance(each, dict)]
    for number, written in enumerate(listed):
        field = f"{FIELD}.{number}"
        if not isinstance(written, dict):
            checked.problems.append(f"{field}: {written!r} is not valid; expected an object with shield_id and params")
            continue
        if "provider_id" not in written:
            told = f"{field}.provider_id: is missing, so the host leaves shield {written.get('shield_id')!r} out"
            checked.warnings.append(told)
            continue
        try:
            shield = {str(key): run_yaml.substituted(value, environment) for key, value in written.items()}
        except InvalidInput as error:
            checked.problems.append(f"{field}: {error.value!r} has no value; expected {error.expected}")
            continue
        # The host leaves out what a variable leaves without an id.
        if shield["provider_id"] == provider_id and not any(key in shield and shield[key] is None for key in _IDS):
            checked.add(shield, field, later[number + 1 :])
    return Findings(checked.problems, checked.warnings)


class _Checked:
    """The shields of one provider, as far as they were read.

    Args:
        config: the provider's configuration.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._params: dict[str, ShieldParams | None] = {}  # by id; None: not valid
        self._ids: dict[str, str] = {}  # provider_shield_id -> shield_id

    def add(self, shield: Mapping[str, object], field: str, later: Sequence[object]) -> None:
        """Note what is wrong with a shield.

        Args:
            shield: its entry.
            field: the entry's name.
            later: ids of those that stand after it.
        """
        shield_id = shield.get("shield_id")
        if not isinstance(shield_id, str) or re.fullmatch(SHIELD_PATTERN, shield_id) is None:
            self.problems.append(f"{field}.shield_id: {shield_id!r} is not valid; expected {SHIELD_WORDS}")
            return
        given = shield.get("provider_shield_id") or shield_id
        other = self._ids.setdefault(str(given), shield_id)
        if shield_id in self._params:
            self.problems.append(f"{field}.shield_id: {shield_id!r} is named twice; expected each shield once")
        elif other != shield_id:
            self.problems.append(f"{field}.provider_shield_id: {given!r} is not valid; expected {own_id(other)}")
        self._params[shield_id] = None
        try:
            params = params_of(self._config, _object(shield.get("params"), field), f"{field}.params")
        except InvalidInput as error:
            self.problems += getattr(error, "problems", [str(error)])
            return
        self._params[shield_id] = params
        if isinstance(params, TrajectoryParams):
            self.problems += self._of_trajectory(params, field, later)

    def _of_trajectory(self, params: TrajectoryParams, field: str, later: Sequence[object]) -> Iterator[str]:
        """What is wrong with the shields that it adds up; the host may know others from an earlier start."""
        for name in params.shields:
            if isinstance(self._params.get(name), TrajectoryParams):
                yield (f"{field}.params.shields: {name!r} is not valid; expected shields of type tool_guard or "
                       "rep_monitor")  # fmt: skip
            elif name not in self._params and name in later:
                yield f"{field}.params.shields: {name!r} is not valid; expected shields that stand before this one"


def _object(params: object, field: str) -> Mapping[str, object] | None:
    if params is not None and not isinstance(params, dict):
        raise InvalidBody([f"{field}.params: {params!r} is not valid; expected an object with type"])
    return params
