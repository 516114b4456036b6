"""KTO, reward models and on-policy distillation over HTTP: rows, a result, and what is refused."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.scan import scan
from tests.support import tiny_models
from tests.support.host_harness import QUICKSTART, Server, run_config, serving

pytestmark = pytest.mark.e2e

LIMIT_S = 400
THUMBS = [
    {"prompt": f"Say {number}.", "completion": "Five." if number % 3 else "No.", "thumbs_up": bool(number % 3)}
    for number in range(24)
]
KTO: dict[str, Any] = {
    "recipe": "kto", "data": {"dataset_id": "thumbs"}, "training": {"batch_size": 8, "dtype": "fp32"},
    "optimizer": {"lr": 5e-3}, "adapter": {"rank": 4, "alpha": 8}, "options": {"max_length": 64},
}  # fmt: skip

PAIRS = [
    {"prompt": f"Say {number}.", "chosen": "The answer is five.", "rejected": ("No.", "Well, who knows?")[number % 2]}
    for number in range(24)
]
REWARD: dict[str, Any] = {**KTO, "recipe": "reward", "data": {"dataset_id": "pairs"},
                          "options": {"max_length": 64, "save_merged": True}}  # fmt: skip
PROMPTS = [{"prompt": f"Say {number}.", "completion": "Five."} for number in range(24)]
DISTILL: dict[str, Any] = {**KTO, "recipe": "distill", "data": {"dataset_id": "prompts"}, "teacher": "teacher",
                           "generation": {"max_completion_length": 8}}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("thin")
    child_env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    config = run_config(QUICKSTART, folder, provider={"child_env": child_env, "supervisor": {"poll_s": 1}})
    with serving(config, folder / "state") as running:
        tiny_models.build("qwen3_moe", running.state_dir / "models" / "qwen3_moe")
        tiny_models.build("granitemoe", running.state_dir / "models" / "teacher")
        running.register("prompts", PROMPTS)
        running.register("thumbs", THUMBS)
        running.register("pairs", PAIRS)
        running.register("only-up", [row | {"thumbs_up": True} for row in THUMBS])
        running.register("stars", [{"prompt": "a", "completion": "b", "label": 4}] * 4)
        yield running


def submitted(server: Server, body: dict[str, Any], job: str) -> JobFolder:
    """Submit a job and wait until it has completed."""
    model = str(server.state_dir / "models" / "qwen3_moe")
    with server.http() as http:
        answer = http.post("/jobs", json={"model": model, **body, "job_uuid": job})
        assert answer.status_code in (200, 201), answer.text
        deadline = time.monotonic() + LIMIT_S
        while (found := http.get(f"/jobs/{job}").json())["status"] in ("scheduled", "in_progress"):
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
    assert found["status"] == "completed", found
    return JobFolder(server.state_dir / "jobs" / job)


def test_a_kto_job_completes(server: Server) -> None:
    folder = submitted(server, KTO, "kto")
    (*_, last) = scan(folder.events, events.Step)
    assert {"preference_loss", "kl", "rewards/margins", "aux_loss"} <= last.metrics.keys()
    manifest = folder.read_manifest()
    assert manifest is not None
    assert [artifact.kind for artifact in manifest.artifacts].count("adapter") == 1


def test_a_model_learns_from_a_teacher_and_its_answers_are_shown(server: Server) -> None:
    folder = submitted(server, DISTILL, "taught")
    (*_, last) = scan(folder.events, events.Step)
    assert {"divergence", "entropy", "completions/mean_length", "aux_loss"} <= last.metrics.keys()
    assert folder.read_spec().teacher == str(server.state_dir / "models" / "teacher")  # type: ignore[union-attr]
    with server.http() as http:
        shown = http.get("/jobs/taught/samples", params={"limit": 100}).json()
        assert shown["steps"] == [1, 2]
        assert all(each["rewards"] == {} and each["advantage"] is None for each in shown["data"])
        assert "Say " in shown["data"][0]["prompt"]
        assert "Five." not in shown["data"][0]["prompt"]
        moving = http.post("/jobs", json={**DISTILL, "model": "qwen3_moe", "moe": {"moe_load_balancing": "aux_free"}})
        assert moving.status_code == 400, moving.text
        assert "moe.moe_load_balancing: 'aux_free' is not valid with recipe 'distill'" in moving.text
        absent = http.post("/jobs", json={**DISTILL, "model": "qwen3_moe", "teacher": "nobody/has-it"})
        assert absent.status_code == 400, absent.text
        assert "teacher: 'nobody/has-it' is not valid" in absent.text


def test_a_reward_model_is_trained_and_grades(server: Server) -> None:
    folder = submitted(server, REWARD, "taste")
    (*_, last) = scan(folder.events, events.Step)
    assert {"preference_loss", "rewards/accuracies", "rewards/margins"} <= last.metrics.keys()
    manifest = folder.read_manifest()
    assert manifest is not None
    assert {"adapter", "merged"} <= {artifact.kind for artifact in manifest.artifacts}
    grader = {"type": "reward_model", "name": "taste", "model": "taste", "scale": "raw"}
    with server.http() as http:
        refused = http.post("/jobs/taste/exports", json={"gguf": ["q8_0"]})
        assert refused.status_code == 409, refused.text
        assert "gguf: is not valid for a reward model, a sequence classifier" in refused.text
        values = []
        for answer in ("The answer is five.", "No."):
            body = {"grader": grader, "item": {"messages": [{"role": "user", "content": "Say 30."}]},
                    "model_sample": answer}  # fmt: skip
            graded = http.post("/graders/run", json=body, timeout=LIMIT_S)
            assert graded.status_code == 200, graded.text
            values.append(graded.json()["reward"])
    assert values[0] > values[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"dataset_id": "only-up"}}, "at least 2 row(s) with a thumb down, because one is held out; it has 0"),
        ({"data": {"dataset_id": "stars"}}, "row 1: label: is 4; expected true (thumb up) or false (thumb down)"),
        ({"training": {"batch_size": 1}}, "training.batch_size: 1 is not valid with recipe 'kto'"),
    ],
)
def test_what_can_not_be_is_refused_at_the_door(server: Server, changes: dict[str, Any], told: str) -> None:
    model = str(server.state_dir / "models" / "qwen3_moe")
    with server.http() as http:
        answer = http.post("/jobs", json={**KTO, "model": model, "job_uuid": "refused", **changes})
        assert answer.status_code == 400, answer.text
        assert told in answer.text
        assert http.get("/jobs/refused").status_code == 404
