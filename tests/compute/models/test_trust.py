"""Code from a model's repository runs only if the server allows that model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.control.supervisor.executors.local import child_environment
from llama_stack_provider_moe.spec.server_config import TRUST_VARIABLE, ModelsConfig, ProviderConfig
from tests.support import tiny_models

COMMIT = "0" * 40
# As a repository would contain it. It writes a file when it runs.
CODE = """
import os, pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path(os.environ["TELLTALE"]).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
LOAD = """
import sys, torch
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.compute.models.loader import load
spec = JOB_SPEC.validate_python({"recipe": "sft", "model": sys.argv[1], "data": {"dataset_id": "rows"},
                                 "training": {"dtype": "fp32"}})
print(type(load(spec, torch.device("cpu"))[0]).__name__)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with `acme/own`, as a download leaves it."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--acme--own"
    snapshot = tiny_models.build("llama", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    config = json.loads((snapshot / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"},
    }
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "own_code.py").write_text(CODE)
    return home


def loaded(hub: Path, model: str, trusted: list[str], telltale: Path) -> subprocess.CompletedProcess[str]:
    """The result of a training process in an environment as the supervisor sets it."""
    server = ProviderConfig(state_dir=hub / "state", models=ModelsConfig(trust_remote_code=trusted))
    environment = child_environment(os.environ, server, hub) | {
        "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(hub / "modules"), "TELLTALE": str(telltale),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", LOAD, model], env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_code_of_a_trusted_model_runs(hub: Path, tmp_path: Path) -> None:
    done = loaded(hub, "acme/own", ["acme/own"], tmp_path / "ran")
    assert done.stdout.split()[-1:] == ["OwnForCausalLM"], done.stderr[-2000:]
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("as_folder", [False, True], ids=["hub id", "folder"])
def test_code_of_another_model_does_not_run(hub: Path, tmp_path: Path, as_folder: bool) -> None:
    folder = hub / "hub" / "models--acme--own" / "snapshots" / COMMIT
    # A folder is not the repository, even with the same content.
    model, trusted = (str(folder), ["acme/own"]) if as_folder else ("acme/own", ["acme/other"])
    done = loaded(hub, model, trusted, tmp_path / "ran")
    assert done.returncode != 0
    assert "needs Python code from its repository, which this server does not run" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_job_cannot_trust_for_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, '["acme/own"]')
    server = ProviderConfig(state_dir=tmp_path, child_env={TRUST_VARIABLE: '["acme/own"]'})
    assert child_environment(os.environ, server, tmp_path)[TRUST_VARIABLE] == "[]"


@pytest.mark.parametrize("name", ["acme/*", "/srv/models/own", "../own", ""])
def test_only_names_in_full(name: str) -> None:
    with pytest.raises(ValidationError, match="is not a hub id without wildcards"):
        ModelsConfig(trust_remote_code=[name])
