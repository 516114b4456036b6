"""Profiles of uploaded data sets over their route: the figures of `moe-train data check`, kept with the version."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server import dataset_profiles
from llama_stack_provider_moe.control.server.service import PostTrainingService
from tests.control.server.test_datasets import files, pushed, refusal
from tests.support import tiny_models
from tests.support.host_support import ask, caller, serving_in_process
from tests.support.jobs_support import wait_for


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    models = tmp_path / "allowed"
    tiny_models.build("mixtral", models / "mixtral")
    with serving_in_process(tmp_path, allowed_roots=[models]) as made:
        yield made


def test_a_profile_without_a_model(service: PostTrainingService) -> None:
    sha256 = pushed(service)
    found = ask(service, "GET", "/datasets/mine/profile").json()
    assert (found["is_ready"], found["sha256"], found["profile"]["rows"]) == (True, sha256, 12)
    assert found["profile"]["tokens"] is None
    kept = [path for path in files(service) if path.name.startswith("profile-")]
    assert len(kept) == 1
    kept[0].write_text(kept[0].read_text().replace('"rows": 12', '"rows": 13'))
    assert ask(service, "GET", "/datasets/mine/profile").json()["profile"]["rows"] == 13, "it is not made again"
    assert ask(service, "DELETE", "/datasets/mine").status_code == 200
    assert not files(service)


def test_a_profile_with_a_model(service: PostTrainingService, tmp_path: Path) -> None:
    pushed(service)
    path = f"/datasets/mine/profile?model={tmp_path}/allowed/mixtral&max_length=64"
    wait_for(lambda: ask(service, "GET", path).json()["is_ready"], timeout_s=300)
    tokens = ask(service, "GET", path).json()["profile"]["tokens"]
    assert (tokens["max_length"], tokens["sequences"], tokens["refused"]) == (64, 11, 0)
    assert tokens["learnt"] > 0
    assert not list((service.config.state_dir / "staging").iterdir())


@pytest.mark.parametrize("recipe", ["grpo", "distill"])
def test_prompts_are_profiled(service: PostTrainingService, recipe: str) -> None:
    pushed(service)
    found = ask(service, "GET", f"/datasets/mine/profile?recipe={recipe}").json()["profile"]
    assert (found["recipe"], found["rows"], found["refused"]) == (recipe, 12, 0)


@pytest.mark.parametrize(("recipe", "steps"), [("grpo", 11), ("distill", 2)])
def test_a_profile_of_prompts_with_a_model(
    service: PostTrainingService, tmp_path: Path, recipe: str, steps: int
) -> None:
    pushed(service)
    query = f"model={tmp_path}/allowed/mixtral&recipe={recipe}&max_length=64&max_completion_length=16"
    path = f"/datasets/mine/profile?{query}"
    assert ask(service, "GET", path).status_code == 200
    wait_for(lambda: ask(service, "GET", path).json()["is_ready"], timeout_s=300)
    tokens = ask(service, "GET", path).json()["profile"]["tokens"]
    assert (tokens["max_length"], tokens["answer"], tokens["sequences"], tokens["steps"]) == (48, 16, 11, steps)
    assert tokens["plan"]
    assert not any("learnt" in line or "mask" in line for line in tokens["plan"]), "no answer of the rows is learnt"


def test_a_slow_profile_is_asked_for_again(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(service)
    monkeypatch.setattr(dataset_profiles, "WAIT_S", 0.0)
    first = ask(service, "GET", "/datasets/mine/profile").json()
    assert (first["is_ready"], first["profile"]) == (False, None)
    wait_for(lambda: ask(service, "GET", "/datasets/mine/profile").json()["is_ready"])


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("?model=/etc", 403, "/etc"),
        ("?recipe=export", 400, "recipe"),
        ("?max_length=2", 400, "max_length"),
        ("?max_completion_length=8", 400, "max_completion_length: 8 is not valid; expected nothing with recipe 'sft'"),
        ("?recipe=grpo&max_completion_length=0", 400, "max_completion_length"),
        ("?version=abcdef", 404, "abcdef"),
    ],
)
def test_mistakes(service: PostTrainingService, query: str, status: int, says: str) -> None:
    pushed(service)
    assert says in refusal(ask(service, "GET", f"/datasets/mine/profile{query}"), status)


def test_another_owner_gets_no_profile(service: PostTrainingService) -> None:
    with caller("ann"):
        pushed(service)
    with caller("bob"):
        assert ask(service, "GET", "/datasets/mine/profile").status_code == 404
