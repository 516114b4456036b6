"""The configuration of `inline::moe-guard` as a host creates it; a wrong one ends the start with plain lines."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from llama_stack_provider_moe.control.config_check import guard_surroundings, run_yaml
from llama_stack_provider_moe.control.config_check.problems import lines
from llama_stack_provider_moe.control.config_check.start import log, where_of, without_traceback
from llama_stack_provider_moe.errors import InvalidConfig
from llama_stack_provider_moe.spec.guard_config import GuardConfig


class HostGuardConfig(GuardConfig):
    """The provider's configuration as a host creates it, from the `config:` of the run YAML."""

    def __init__(self, **settings: Any) -> None:
        with without_traceback():
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise InvalidConfig(where_of(settings, run_yaml.GUARD_TYPE), lines(error, GuardConfig)) from None


@contextmanager
def plain_guard_errors(config: GuardConfig) -> Iterator[None]:
    """Check the configuration, then start the provider inside.

    Raises:
        InvalidConfig: the provider can't start with this configuration.
    """
    with without_traceback():
        where = where_of(None, run_yaml.GUARD_TYPE)
        found = guard_surroundings.check(config, os.environ)
        if found.problems:
            raise InvalidConfig(where, found.problems)
        for warning in found.warnings:
            log.warning("%s: %s", where, warning)
        yield
