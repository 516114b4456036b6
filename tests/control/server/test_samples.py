"""The answers that a job generated, over HTTP and on the command line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir import samples
from llama_stack_provider_moe.jobdir.samples import MOST_CHARACTERS, GeneratedSample
from tests.support.cli_support import moe_train
from tests.support.host_support import Datasets, ask, over_http, serving_in_process, submit


def sample(step: int, group: int, completion: str = "Four.") -> GeneratedSample:
    return GeneratedSample(
        step=step, group=group, prompt="2 + 2?", completion=completion, tokens=3, truncated=False,
        rewards={"right": 1.0, "short": None}, failures={"short": "deadline: too slow"}, reward=None, advantage=0.0,
    )  # fmt: skip


def keep(folder: Path, step: int, *found: GeneratedSample) -> None:
    folder.mkdir(exist_ok=True)
    lines = "".join(f"{each.model_dump_json()}\n" for each in found)
    (folder / f"{step:09d}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, Datasets()) as made:
        yield made


@pytest.fixture
def folder(service: PostTrainingService) -> Path:
    found = service.config.jobs_dir / submit(service) / samples.FOLDER
    keep(found, 1, sample(1, 0), sample(1, 1))
    keep(found, 3, sample(3, 0, "x" * (MOST_CHARACTERS + 5)), sample(3, 1))
    (found / "000000005.writing").write_text("{}")
    return found


def test_the_newest_step_comes_first_and_long_texts_are_cut(service: PostTrainingService, folder: Path) -> None:
    job = folder.parent.name
    found = ask(service, "GET", f"/jobs/{job}/samples").json()
    assert found["steps"] == [1, 3]
    assert [(each["step"], each["group"]) for each in found["data"]] == [(3, 0), (3, 1), (1, 0), (1, 1)]
    assert found["data"][0]["completion"].endswith("x [... 5 characters more]")
    assert found["data"][1]["rewards"] == {"right": 1.0, "short": None}
    few = ask(service, "GET", f"/jobs/{job}/samples", params={"limit": "3"}).json()
    assert [each["step"] for each in few["data"]] == [3, 3, 1]
    one = ask(service, "GET", f"/jobs/{job}/samples", params={"step": "1", "limit": "1"}).json()
    assert [each["step"] for each in one["data"]] == [1]


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"step": "2"}, "step: 2 is not valid; expected a step whose answers the job still has: 1, 3"),
        ({"limit": "0"}, "limit"),
        ({"step": "-1"}, "step"),
    ],
)
def test_wrong_parameters_are_named(
    service: PostTrainingService, folder: Path, params: dict[str, str], told: str
) -> None:
    answer = ask(service, "GET", f"/jobs/{folder.parent.name}/samples", params=params)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_a_job_without_answers_has_none(service: PostTrainingService) -> None:
    found = ask(service, "GET", f"/jobs/{submit(service)}/samples").json()
    assert (found["steps"], found["data"]) == ([], [])


def test_a_file_that_ends_in_the_middle_gives_what_is_whole(service: PostTrainingService, folder: Path) -> None:
    path = folder / "000000003.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    found = ask(service, "GET", f"/jobs/{folder.parent.name}/samples", params={"step": "3"}).json()
    assert [each["group"] for each in found["data"]] == [0]


def test_the_command_shows_them_and_the_client_returns_them(service: PostTrainingService, folder: Path) -> None:
    job = folder.parent.name
    with over_http(service) as url:
        shown = moe_train("samples", job, "--limit", "3", "--url", url)
        assert shown.code == 0, shown.err
        for word in ("right", "short", "Four.", "answers of 2 steps are there, 1 to 3"):
            assert word in shown.out
        empty = moe_train("samples", submit(service), "--url", url)
        assert "has no answers" in empty.out
        wrong = moe_train("samples", job, "--step", "2", "--url", url)
        assert wrong.code == 2
        assert "step: 2 is not valid" in wrong.err
