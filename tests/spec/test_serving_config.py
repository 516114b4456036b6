"""`serving:` of a server's configuration, and the names of served models."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llama_stack_provider_moe.spec import JOB_ID_PATTERN
from llama_stack_provider_moe.spec.destinations import OLLAMA_NAME_PATTERN
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.serving_config import NAME_LIMIT, SERVING, gguf_of, served_name

LLAMA_CPP = {
    "kind": "llama_cpp",
    "provider_id": "llama-cpp",
    "url": "http://127.0.0.1:8080/",
    "models_dir": "/srv/models",
}


def test_the_defaults_of_each_kind() -> None:
    llama = SERVING.validate_python(LLAMA_CPP)
    ollama = SERVING.validate_python({"kind": "ollama", "provider_id": "ollama"})
    vllm = SERVING.validate_python({"kind": "vllm", "provider_id": "vllm", "url": "https://gpu.example.org"})
    assert [gguf_of(each) for each in (llama, ollama, vllm)] == ["q8_0", "q8_0", None]
    assert (llama.url, ollama.url) == ("http://127.0.0.1:8080", "http://127.0.0.1:11434")
    assert [SERVING.validate_json(SERVING.dump_json(each)) for each in (llama, ollama, vllm)] == [llama, ollama, vllm]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "tgi"}, "'llama_cpp', 'ollama', 'vllm'"),
        ({"modles_dir": "/a"}, "Extra inputs"),
        ({"models_dir": "models"}, "'models' is not valid; expected an absolute path"),
        ({"models_dir": " "}, "' ' is not valid; expected a path"),
        (
            {"url": "http://127.0.0.1:8080/v1"},
            "expected http://HOST:PORT or https://HOST[:PORT], without a user or a path",
        ),
        ({"url": "http://me:secret@host:1"}, "without a user or a path"),
        ({"provider_id": "a/b"}, "String should match pattern"),
        ({"gguf": "q4"}, "Input should be 'f32'"),
        ({"answer_s": 0}, "greater than or equal to 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_mistake_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ProviderConfig.model_validate({"serving": LLAMA_CPP | changes})
    assert told in str(refused.value)


@pytest.mark.parametrize("inside", ["", "jobs", "serving"], ids=["itself", "jobs", "a new folder"])
def test_the_folder_is_apart_from_the_state(tmp_path: Path, inside: str) -> None:
    state = tmp_path / "state"
    settings: dict[str, Any] = {"state_dir": state, "serving": LLAMA_CPP | {"models_dir": str(state / inside)}}
    with pytest.raises(ValidationError, match=r"serving\.models_dir: .* and state_dir .* overlap"):
        ProviderConfig.model_validate(settings)


def test_jobs_and_mirrors_write_nothing_there(tmp_path: Path) -> None:
    above: dict[str, Any] = {
        "state_dir": tmp_path / "state",
        "serving": LLAMA_CPP | {"models_dir": str(tmp_path / "m/s")},
    }
    with pytest.raises(ValidationError, match=r"serving\.models_dir: .* and allowed_roots .* overlap"):
        ProviderConfig.model_validate(above | {"allowed_roots": [tmp_path / "m"]})
    with pytest.raises(ValidationError, match=r"serving\.models_dir: .* and mirror\.url .* overlap"):
        ProviderConfig.model_validate(above | {"mirror": {"url": f"file://{tmp_path}/m"}})
    (tmp_path / "link").symlink_to(tmp_path / "state")
    with pytest.raises(ValidationError, match="and state_dir"):
        ProviderConfig.model_validate(above | {"serving": LLAMA_CPP | {"models_dir": str(tmp_path / "link" / "x")}})
    assert ProviderConfig.model_validate(above).serving is not None


@given(st.from_regex(JOB_ID_PATTERN, fullmatch=True))
def test_a_name_fits_every_server(job_id: str) -> None:
    name = served_name(job_id)
    assert len(name) <= NAME_LIMIT
    assert re.fullmatch(OLLAMA_NAME_PATTERN, name)
    # What llama.cpp's router cuts from a file's name, or takes for parts of other models.
    assert not any(part in name.lower() for part in (".gguf", "mmproj"))
    assert not name.startswith(("mtp-", "dspark-", "dflash-", "."))


def test_different_jobs_have_different_names() -> None:
    jobs = ["a", "a.gguf", "b.GGUF", "mmproj", "x" * 128, "x" * 127 + "y", "tune.1"]
    assert len({served_name(job) for job in jobs}) == len(jobs)
    assert served_name("tune.1") == "ft-tune.1"
