"""Tests the check of models at submission: the cache, the hub's answers, served models, and what can't be checked."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_stack_provider_moe.control.server import hub_check, job_names
from llama_stack_provider_moe.ground.hub_cache import cache_folder, is_cached
from llama_stack_provider_moe.spec.executors_config import ExecutorsConfig, RayConfig
from tests.support import hub_server
from tests.support.free_ports import free_port
from tests.support.host_harness import hub_cache
from tests.support.host_support import BODY, ask, serving_in_process
from tests.support.hub_server import TOKEN, State

CONFIG = {"config.json": b"{}"}


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, State]]:
    with hub_server.hub() as (url, state):
        state.repos |= {
            "owner/there": CONFIG,
            "gpt2": CONFIG,
            "new/name": CONFIG,
            "mine/private": CONFIG,
            "a/empty": {},
        }
        state.private["mine/private"] = True
        state.renamed["old/name"] = "new/name"
        yield url, state


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


class Models:
    """The models of a host's inference: name of the host, and of the provider."""

    served = (("openai/gpt-4o-mini", "gpt-4o-mini"), ("ollama/llama3.2:3b", "llama3.2:3b"), ("vllm/o/n", "owner/name"))

    async def list_models(self) -> SimpleNamespace:
        """Answer as the host's registry does."""
        return SimpleNamespace(
            data=[SimpleNamespace(identifier=one, provider_resource_id=other) for one, other in self.served]
        )


class SilentModels(Models):
    """A host whose inference servers do not answer."""

    async def list_models(self) -> SimpleNamespace:
        """Never answer."""
        await asyncio.Event().wait()
        raise AssertionError


def answer(
    tmp_path: Path, model: str, field: str = "model", config: dict[str, Any] | None = None, **environment: str
) -> tuple[int, str]:
    """Status, and the notes or the error, of a server with an empty cache and this environment for its jobs."""
    given = {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN_PATH": str(tmp_path / "token"), **environment}
    judge = {"eval": {"refuse_dataset_id": "good", "judge": {"kind": "model", "model": model}}}
    named = {"model": model} if field == "model" else {"model": "owner/there", **judge}
    with serving_in_process(tmp_path, child_env=given, **{"served": Models(), **(config or {})}) as service:
        told = ask(service, "POST", "/jobs", json=BODY | named)
    if told.status_code == 200:
        return 200, "; ".join(told.json().get("notes", []))
    return told.status_code, told.json()["error"]["message"]


@pytest.mark.parametrize("model", ["owner/there", "gpt2", "old/name"])
def test_a_model_on_the_hub_is_accepted_without_notes(tmp_path: Path, hub: tuple[str, State], model: str) -> None:
    assert answer(tmp_path, model, HF_ENDPOINT=hub[0]) == (200, "")
    assert f"HEAD /{model}/resolve/main/config.json" in hub[1].asked


@pytest.mark.parametrize("field", ["model", "eval.judge.model"])
@pytest.mark.parametrize("model", ["gpt-4", "owner/not-there", "a/empty", "mine/private"])
def test_a_model_missing_from_the_hub_is_refused(
    tmp_path: Path, hub: tuple[str, State], model: str, field: str
) -> None:
    status, told = answer(tmp_path, model, field, HF_ENDPOINT=hub[0])
    assert (status, told.startswith(f"{field}: {model!r} is not valid; expected a job's name, a folder, or a")) == (
        400,
        True,
    )
    assert hub[0] in told


def test_private_models_are_found_by_the_token_of_the_jobs(
    tmp_path: Path, hub: tuple[str, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as during:
        during.setenv("HF_TOKEN", TOKEN)
        assert answer(tmp_path, "mine/private", HF_ENDPOINT=hub[0]) == (200, "")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert answer(tmp_path, "mine/private", HF_ENDPOINT=hub[0]) == (200, "")
    assert TOKEN not in answer(tmp_path, "owner/not-there", HF_ENDPOINT=hub[0])[1]


def test_a_cached_model_needs_no_request_to_the_hub(tmp_path: Path, hub: tuple[str, State]) -> None:
    before = list(hub[1].asked)
    cache = hub_cache(tmp_path / "hf" / "hub", "owner/cached", "bert")
    for model in ("owner/cached", "bert"):
        assert answer(tmp_path, model, HF_ENDPOINT=hub[0]) == (200, "")
        assert answer(tmp_path, model, HF_HUB_OFFLINE="1") == (200, "")
    assert hub[1].asked == before
    (cache / "models--bert" / "refs" / "main").write_text("../../../../etc")
    assert not is_cached("bert", {"HF_HUB_CACHE": str(cache)})


SERVED = "; the host's inference serves a model of that name, but a job needs weights, which it does not give"
TAGGED = "; a name with ':' is that of a served model (NAME:TAG of Ollama), and a job needs the weights"


@pytest.mark.parametrize("field", ["model", "eval.judge.model"])
@pytest.mark.parametrize("model", [name for names in Models.served for name in names])
def test_a_served_model_is_refused_as_one(tmp_path: Path, hub: tuple[str, State], model: str, field: str) -> None:
    status, told = answer(tmp_path, model, field, HF_ENDPOINT=hub[0])
    assert (status, told.startswith(f"{field}: {model!r} is not valid; expected "), told.endswith(SERVED)) == (
        400, True, True,
    )  # fmt: skip


def test_a_served_model_is_refused_as_one_without_the_hub(tmp_path: Path) -> None:
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}):
        status, told = answer(tmp_path, "gpt-4o-mini", **environment)
        assert (status, told.endswith(SERVED)) == (400, True), told


def test_a_model_with_weights_may_be_served_too(tmp_path: Path, hub: tuple[str, State]) -> None:
    hub[1].repos["owner/name"] = CONFIG
    try:
        assert answer(tmp_path, "owner/name", HF_ENDPOINT=hub[0]) == (200, "")
    finally:
        del hub[1].repos["owner/name"]
    hub_cache(tmp_path / "hf" / "hub", "gpt-4o-mini")
    assert answer(tmp_path, "gpt-4o-mini", HF_HUB_OFFLINE="1") == (200, "")


def test_what_the_host_serves_is_not_known(
    tmp_path: Path, hub: tuple[str, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_names, "MODELS_LIMIT_S", 0.1)
    for models in (None, SilentModels()):
        status, told = answer(tmp_path, "gpt-4o-mini", config={"served": models}, HF_ENDPOINT=hub[0])
        assert (status, told.endswith("has no such model, or HF_TOKEN may not read it")) == (400, True), told
        status, told = answer(tmp_path, "qwen3:0.6b", config={"served": models}, HF_ENDPOINT=hub[0])
        assert (status, told.endswith(TAGGED)) == (400, True), told


@pytest.mark.parametrize("variable", [{"HF_HUB_OFFLINE": "1"}, {"TRANSFORMERS_OFFLINE": "yes"}])
def test_offline_only_the_cache_counts(tmp_path: Path, variable: dict[str, str]) -> None:
    for model in ("owner/name", "gpt-4"):
        status, told = answer(tmp_path, model, **variable)
        assert status == 400
        assert f"({next(iter(variable))} is set), and its cache has no such model" in told


def test_a_cluster_may_have_a_model_that_this_machine_lacks(tmp_path: Path) -> None:
    ray = {"executors": ExecutorsConfig(default="ray", ray=RayConfig(address="http://127.0.0.1:1"))}
    status, told = answer(tmp_path, "owner/name", config=ray, HF_HUB_OFFLINE="1")
    assert status == 200
    assert told.startswith("model: the server did not check whether 'owner/name' can be loaded: training processes")


def test_an_unreachable_hub_is_noted(tmp_path: Path, hub: tuple[str, State]) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    status, told = answer(tmp_path, "owner/name", HF_ENDPOINT=nobody)
    assert (status, told) == (
        200,
        f"model: the server could not check whether the hub has 'owner/name': {nobody} did not answer (ConnectError)",
    )  # fmt: skip
    status, told = answer(tmp_path, "gpt-4", HF_ENDPOINT=nobody)
    assert (status, "a hub id with its owner (owner/name)" in told) == (400, True)
    hub[1].answers["owner/there/resolve/main/config.json"] = 503
    try:
        status, told = answer(tmp_path, "owner/there", HF_ENDPOINT=hub[0])
    finally:
        hub[1].answers.clear()
    assert (status, told.endswith("answered with status 503")) == (200, True)


def test_a_silent_hub_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_check, "TIME_LIMIT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        status, told = answer(tmp_path, "owner/name", HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert (status, told.endswith("did not answer (ReadTimeout)")) == (200, True)


@pytest.mark.parametrize(("offered", "status"), [("owner/not-there", 400), ("owner/there", 200)])
def test_a_password_in_the_hubs_url_is_not_shown(
    tmp_path: Path, hub: tuple[str, State], monkeypatch: pytest.MonkeyPatch, offered: str, status: int
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub[0].replace("://", "://mirror:hunter2@"))
    if status == 200:
        hub[1].answers[f"{offered}/resolve/main/config.json"] = 503
    try:
        found, told = answer(tmp_path, offered)
    finally:
        hub[1].answers.clear()
    assert found == status
    assert "mirror:***@" in told
    assert "hunter2" not in told


def test_cache_folders() -> None:
    """The same folders as in huggingface_hub (constants.py)."""
    home = Path.home()
    assert cache_folder({}) == home / ".cache" / "huggingface" / "hub"
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert cache_folder({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}) == Path("/h/hub")
    assert cache_folder({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}) == Path("/c")
