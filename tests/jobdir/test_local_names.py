"""A job's name on the command line of its machine: which folder it means, and what takes precedence."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir import local_names
from tests.control.server.test_model_names import adapter_at

SFT = {"recipe": "sft", "model": "owner/base", "data": {"dataset_id": "d"}, "adapter": {}}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


def job(state: Path, name: str, *artifacts: str, complete: bool = True, **body: Any) -> Path:
    folder = state / "jobs" / name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(SFT | body if body.get("recipe") != "export" else body))
    for each in artifacts:
        path = folder / ("checkpoints" if "-" in each else "artifacts") / each
        if each in ("model", "merged"):
            path.mkdir(parents=True)
        else:
            adapter_at(path)
    if complete:
        (folder / "manifest.json").write_text("{}")
    return folder


def test_a_job_is_its_model_or_its_adapter_on_its_base(state: Path) -> None:
    whole, merged = job(state, "whole", "model"), job(state, "both", "adapter", "merged")
    lora = job(state, "lora", "adapter", "epoch-1")
    assert local_names.on_base("whole") == (str(whole / "artifacts" / "model"), None)
    assert local_names.on_base("both") == (str(merged / "artifacts" / "merged"), None)
    assert local_names.on_base("lora") == ("owner/base", str(lora / "artifacts" / "adapter"))
    assert local_names.on_base("lora/epoch-1") == ("owner/base", str(lora / "checkpoints" / "epoch-1"))
    assert local_names.on_base("owner/base", "both") == ("owner/base", str(merged / "artifacts" / "adapter"))
    assert local_names.whole_model("both/merged") == str(merged / "artifacts" / "merged")
    assert local_names.job_or_artifact("lora", "X") == str(lora)
    assert local_names.job_or_artifact("lora/adapter", "X") == str(lora / "artifacts" / "adapter")
    export = {"recipe": "export", "of": "lora", "export": {"merged": True}}
    made = job(state, "export-1", "merged", **export)
    assert local_names.whole_model("lora/merged") == str(made / "artifacts" / "merged")
    assert local_names.whole_model("lora") == str(made / "artifacts" / "merged")


def test_what_is_no_job_stays_as_it_is(state: Path, tmp_path: Path) -> None:
    job(state, "taken", "model")
    (tmp_path / "taken").mkdir()
    (state / "jobs" / "broken").mkdir()
    (state / "jobs" / "broken" / "spec.json").write_text("{")
    for name in ("taken", "broken", "no-such", "no-such/merged", "owner/name", "/abs/path", "../up", "", "taken/name"):
        assert local_names.on_base(name) == (name, None)
        assert local_names.whole_model(name) == local_names.job_or_artifact(name, "X") == name
        assert local_names.adapter_folder(name, "X") == name


def test_what_a_job_has_not_left_is_told(state: Path) -> None:
    job(state, "lora", "adapter")
    job(state, "whole", "model")
    job(state, "running", complete=False)
    for ask, told in (
        (lambda: local_names.whole_model("lora"), "`moe-train export lora --merged` to create one"),
        (lambda: local_names.on_base("lora/merged"), "it left no 'merged'"),
        (lambda: local_names.on_base("running"), "a completed job"),
        (lambda: local_names.adapter_folder("whole/model", "X"), "an adapter; the job left a whole model"),
        (lambda: local_names.adapter_folder("whole", "X"), "it left no 'adapter'"),
        (lambda: local_names.on_base("lora", "other"), "--adapter names an adapter already"),
    ):
        with pytest.raises(InvalidInput) as caught:
            ask()
        assert told in str(caught.value)


def test_a_job_that_a_later_version_has_made_is_still_found(state: Path) -> None:
    lora = job(state, "lora", "adapter", of_a_later_version=1)
    assert local_names.on_base("lora") == ("owner/base", str(lora / "artifacts" / "adapter"))


def test_a_model_of_the_server_is_found_unless_a_job_or_folder_has_the_name(state: Path, tmp_path: Path) -> None:
    for name in ("own", "lora"):
        (state / "models" / name).mkdir(parents=True)
        (state / "models" / name / "config.json").write_text("{}")
    (state / "models" / "empty").mkdir()
    lora = job(state, "lora", "adapter")
    assert local_names.on_base("own") == (str(state / "models" / "own"), None)
    assert local_names.on_base("lora") == ("owner/base", str(lora / "artifacts" / "adapter"))
    assert local_names.on_base("empty") == ("empty", None)
    (tmp_path / "own").mkdir()
    assert local_names.on_base("own") == ("own", None)
