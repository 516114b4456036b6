"""Code from a model's repository runs only if the server allows that model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
# Loads a model in each environment, one after the other: the imports take longer than all of them.
LOADS = """
import json, os, sys, torch
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.compute.models.loader import load
for model, changes in json.loads(sys.argv[1]):
    os.environ.update(changes)
    spec = JOB_SPEC.validate_python({"recipe": "sft", "model": model, "data": {"dataset_id": "rows"},
                                     "training": {"dtype": "fp32"}})
    try:
        found = type(load(spec, torch.device("cpu"))[0]).__name__
    except Exception as refused:
        found = str(refused)
    print(json.dumps([found, os.path.exists(os.environ["TELLTALE"])]))
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


@pytest.fixture(scope="module")
def loaded(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Case -> the class of the loaded model or why it was not loaded, and whether its code has run.

    In a training process's environment as the supervisor sets it. A model's code runs in the last case alone.
    """
    folder = hub / "hub" / "models--acme--own" / "snapshots" / COMMIT
    # A folder is not the repository, even with the same content.
    cases = {"hub id": ("acme/own", "acme/other"), "folder": (str(folder), "acme/own"), "own": ("acme/own", "acme/own")}
    own = {
        "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(hub / "modules"),
        "PYTHONPATH": str(Path(__file__).parents[3]), "TELLTALE": str(tmp_path_factory.mktemp("telltale") / "ran"),
    }  # fmt: skip
    told: list[tuple[str, dict[str, str]]] = []
    for model, trusted in cases.values():
        server = ProviderConfig(state_dir=hub / "state", models=ModelsConfig(trust_remote_code=[trusted]))
        environment = child_environment(os.environ, server, hub)
        told.append((model, {TRUST_VARIABLE: environment[TRUST_VARIABLE]}))
    done = subprocess.run(
        [sys.executable, "-c", LOADS, json.dumps(told)], env=environment | own, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return dict(zip(cases, answers, strict=True))


def test_code_of_a_trusted_model_runs(loaded: dict[str, list[Any]]) -> None:
    assert loaded["own"] == ["OwnForCausalLM", True]


@pytest.mark.parametrize("case", ["hub id", "folder"])
def test_code_of_another_model_does_not_run(loaded: dict[str, list[Any]], case: str) -> None:
    why, has_run = loaded[case]
    assert "needs Python code from its repository, which this server does not run" in why
    assert not has_run


def test_a_job_cannot_trust_for_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, '["acme/own"]')
    server = ProviderConfig(state_dir=tmp_path, child_env={TRUST_VARIABLE: '["acme/own"]'})
    assert child_environment(os.environ, server, tmp_path)[TRUST_VARIABLE] == "[]"


@pytest.mark.parametrize("name", ["acme/*", "/srv/models/own", "../own", ""])
def test_only_names_in_full(name: str) -> None:
    with pytest.raises(ValidationError, match="is not a hub id without wildcards"):
        ModelsConfig(trust_remote_code=[name])
