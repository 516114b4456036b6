"""Starts the provider for the host that loaded this package."""

import logging
import os
from pathlib import Path

from llama_stack_provider_moe.control.config_check.guard_start import plain_guard_errors
from llama_stack_provider_moe.control.guard import host, host_routes
from llama_stack_provider_moe.control.guard.llama_stack import SafetyProvider
from llama_stack_provider_moe.control.guard.routes import SafetyService
from llama_stack_provider_moe.control.guard.service import GuardService
from llama_stack_provider_moe.control.scorer.client import ScorerClient
from llama_stack_provider_moe.control.supervisor.executors.local import passed_on
from llama_stack_provider_moe.jobdir import readers
from llama_stack_provider_moe.shields.probe_card import read_card
from llama_stack_provider_moe.shields.scorer_settings import ScorerSettings
from llama_stack_provider_moe.spec.guard_config import GuardConfig
from llama_stack_provider_moe.spec.scorer_config import ScorerLimits

log = logging.getLogger(__name__)


def started(config: GuardConfig) -> SafetyProvider | SafetyService:
    """Return the provider: of the host's safety API, or that API itself.

    Raises:
        InvalidConfig: this machine lacks something that the configuration names; the server does not start.
    """
    with plain_guard_errors(config):
        scorer = _scorer(config)
        service = GuardService(config, scorer, end_scorer=(lambda: None) if scorer is None else scorer.close)
        keep_what_is_read(config)
        if scorer is not None:
            scorer.start()
    if not host.has_safety():
        return SafetyService(service)
    host_routes.install(service)
    return SafetyProvider(service)


def keep_what_is_read(config: GuardConfig) -> None:
    """Have the jobs of the probes, and of the models that they read, kept while this configuration names them."""
    paths: dict[str, list[Path]] = {}
    for name, folder in config.probes.items():
        base = read_card(folder, f"probes.{name}").base
        named = [base.model, *filter(None, [base.adapter_folder])]
        paths[f"probe {name!r}"] = [folder, *(Path(each) for each in named if Path(each).is_absolute())]
    found = readers.register(config.state_dir, "shields of a server", paths)
    if found.jobs:
        log.info("jobs that the probes read are kept: %s", ", ".join(sorted(each.name for each in found.jobs)))
    for problem in found.problems:
        log.warning("%s", problem)


def _scorer(config: GuardConfig) -> ScorerClient | None:
    """The process that scores, not yet started; None without probes."""
    if not config.probes:
        return None
    limits = config.scorer.model_dump(include=set(ScorerLimits.model_fields))
    settings = ScorerSettings(probes={name: str(path) for name, path in config.probes.items()}, **limits)
    environment = passed_on(os.environ) | config.scorer.child_env
    return ScorerClient(settings, config.state_dir / "scorer", environment)
