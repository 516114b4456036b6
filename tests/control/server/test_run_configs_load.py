"""The host reads every run config of ours, and our part of it is valid."""

from pathlib import Path

import pytest
import yaml
from llama_stack.core.configure import parse_and_maybe_upgrade_config
from llama_stack.core.stack import replace_env_vars

from llama_stack_provider_moe.control.cli.hosts import HOSTS
from llama_stack_provider_moe.spec.guard_config import GuardConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.host_harness import API, RUN_CONFIGS

GUARDED = {name for host in HOSTS.values() for name in host.guarded}


# llama-stack 0.6.1 reads its own field `image_name`, which it has marked deprecated.
@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning:llama_stack.core.datatypes")
@pytest.mark.parametrize("path", sorted(RUN_CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_run_configs_load(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MOE_PROBE", str(tmp_path / "probe"))
    content = replace_env_vars(yaml.safe_load(path.read_text(encoding="utf-8")))
    config = parse_and_maybe_upgrade_config(content)
    assert config.server.host == "127.0.0.1"
    if path.stem.startswith("serve_"):  # these serve a trained model on another machine
        assert config.apis == ["inference"]
        return
    if path.stem in GUARDED:  # these serve a model with shields
        (ours,) = config.providers["safety"]
        assert (ours.provider_type, ours.module) == ("inline::moe-guard", "llama_stack_provider_moe")
        probes = {} if path.stem.endswith("tool_guard") else {"refused": tmp_path / "probe"}
        assert GuardConfig.model_validate(ours.config).probes == probes
        return
    (ours,) = config.providers["post_training"]
    assert (ours.provider_type, ours.module) == ("inline::moe", "llama_stack_provider_moe")
    assert ProviderConfig.model_validate(ours.config).state_dir == tmp_path
    rows = {"files"} if path.stem == "ogx" else {"datasetio"}  # OGX has no data sets
    assert rows | {"post_training"} <= set(config.apis)
    is_external = path.stem in {host.server for host in HOSTS.values() if host.is_external}
    assert (config.external_apis_dir is not None) is is_external


def test_the_prefix_is_the_apis() -> None:
    assert API == "/v1alpha/post-training"
