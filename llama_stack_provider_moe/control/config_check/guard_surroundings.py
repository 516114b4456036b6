"""Checks what a configuration of `inline::moe-guard` needs on this machine: rules, probes, folders."""

import shutil
from collections.abc import Iterator, Mapping

from llama_stack_provider_moe.control.config_check.surroundings import Findings
from llama_stack_provider_moe.errors import InvalidConfig, InvalidInput
from llama_stack_provider_moe.shields.probe_card import read_card
from llama_stack_provider_moe.shields.rules import open_places, read_rules
from llama_stack_provider_moe.spec.guard_config import GuardConfig, RepMonitorParams

SHOWN = 8


def check(config: GuardConfig, environment: Mapping[str, str]) -> Findings:
    """Find what a provider with this configuration would lack here; writes nothing.

    Args:
        config: of the provider.
        environment: of the server.
    """
    problems, warnings = [], []
    for name, path in config.rules.items():
        try:
            rules = read_rules(path, f"rules.{name}")
        except InvalidConfig as error:
            problems += [f"rules.{name}: {path}: {each}" for each in error.problems]
            continue
        except InvalidInput as error:
            problems.append(str(error))
            continue
        places = [f"{each.tool}.{each.argument}" for each in open_places(rules)]
        if places:
            shown = ", ".join(places[:SHOWN]) + (f" and {len(places) - SHOWN} more" if len(places) > SHOWN else "")
            warnings.append(f"rules.{name}: nothing limits these texts: {shown}")
    problems += _folders(config)
    if config.on_failure == "allow" and config.probes:
        warnings.append("on_failure: allow lets every conversation through while the scorer is down or busy")
    for shield_id, params in config.shields.items():
        if isinstance(params, RepMonitorParams) and params.on_failure == "allow" and config.on_failure == "block":
            warnings.append(f"shields.{shield_id}.on_failure: allow, although the provider's is block")
    return Findings(problems, warnings)


def _folders(config: GuardConfig) -> Iterator[str]:
    for name, path in config.probes.items():
        try:
            read_card(path, f"probes.{name}")
        except InvalidInput as error:
            yield str(error)
    if config.probes and shutil.which(config.scorer.python) is None:
        yield f"scorer.python: {config.scorer.python!r} is not valid; expected a Python interpreter"
    if config.feedback is not None and config.feedback.folder.exists() and not config.feedback.folder.is_dir():
        yield f"feedback.folder: {str(config.feedback.folder)!r} is not valid; expected a folder"
