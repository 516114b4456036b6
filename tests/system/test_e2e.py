"""Whole jobs over HTTP: a real server, supervisor and training processes, tiny models, llama-stack-client 0.6.1."""

import hashlib
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.chosen import chosen
from tests.support.host_harness import Server
from tests.support.shared_server import Shared

pytestmark = pytest.mark.e2e

FAMILIES = ["granitemoe", "mixtral", "qwen3_moe", "llama"]
RECIPES = ["sft", "dpo"]
# One family with both recipes; what these jobs have in common no family can break alone.
JOBS = [
    pytest.param(family, recipe, marks=[] if family == "granitemoe" else [pytest.mark.wide])
    for family in FAMILIES for recipe in RECIPES
]  # fmt: skip
LATER = {"merged": True, "dtype": "bf16", "load_check": False}
EXPORTED = "granitemoe-sft"  # by itself, as soon as it has completed
LIMIT_S = 800  # ten processes that import torch and trl, some minutes each where cores are slow

WORDS = ["garden", "letter", "friend", "spring", "answer", "France", "Paris", "token"]
SFT_ROWS = [
    {"prompt": f"Write a word about {a} and {b}.", "completion": "The capital of France is Paris."}
    for a in WORDS for b in WORDS
]  # fmt: skip
DPO_ROWS = [
    {"prompt": f"What about {a} and {b}?", "chosen": "The answer is five.", "rejected": "A few experts of many."}
    for a in WORDS for b in WORDS
]  # fmt: skip
TRAINING = {"n_epochs": 1, "gradient_accumulation_steps": 1}
ADAPTER = {"type": "LoRA", "rank": 4, "alpha": 8, "lora_attn_modules": ["q_proj", "v_proj"],
           "apply_lora_to_mlp": True, "apply_lora_to_output": False}  # fmt: skip


@pytest.fixture(scope="module")
def server(shared: Shared) -> Server:
    for family in FAMILIES:
        shared.model(family)
    shared.rows("words", SFT_ROWS)
    shared.rows("pairs", DPO_ROWS)
    return shared.server


def asking(server: Server) -> httpx.Client:
    """A client without kept connections: the server closes idle ones after 5 s, even during a request."""
    http = server.http()
    http.headers["Connection"] = "close"
    return http


def submit(server: Server, family: str, recipe: str) -> str:
    """Submit through the API's own routes as an SDK user would, with our blocks in `extra_body`."""
    job_id, model = f"{family}-{recipe}", str(server.state_dir / "models" / family)
    api = server.client().alpha.post_training
    extra: dict[str, Any] = {"options": {"max_length": 64, "lr_scheduler": "constant"}}
    if family != "llama":
        extra["moe"] = {"train_router": True, "router_z_loss_coef": 0.001}
    if job_id == EXPORTED:
        extra["export"] = {"merged": True}
    data = {"dataset_id": "words" if recipe == "sft" else "pairs", "batch_size": 8, "shuffle": True}
    optimizer = {"optimizer_type": "adamw", "lr": 5e-3, "weight_decay": 0.0, "num_warmup_steps": 0}
    training = {**TRAINING, "data_config": {**data, "data_format": "instruct"}, "optimizer_config": optimizer}
    common: dict[str, Any] = {"hyperparam_search_config": {}, "logger_config": {}, "training_config": training}
    if recipe == "sft":
        job = api.supervised_fine_tune(
            job_uuid=job_id, model=model, algorithm_config=ADAPTER, extra_body=extra, **common
        )
    else:
        extra["adapter"] = {key: value for key, value in ADAPTER.items() if key != "type"}
        algorithm = {"beta": 0.1, "loss_type": "sigmoid"}
        job = api.preference_optimize(
            job_uuid=job_id, finetuned_model=model, algorithm_config=algorithm, extra_body=extra, **common
        )
    assert job.job_uuid == job_id
    return job_id


@pytest.fixture(scope="module")
def jobs(server: Server, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Run the jobs of all cases at once: id -> the whole job after its end."""
    cases = chosen(request, "family", "recipe") | {("granitemoe", "sft"), ("mixtral", "sft")}
    ids = [submit(server, family, recipe) for family, recipe in sorted(cases)]
    ended: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + LIMIT_S
    with asking(server) as http:
        while len(ended) < len(ids) and time.monotonic() < deadline:
            for job_id in set(ids) - set(ended):
                job = http.get(f"/jobs/{job_id}").json()
                if job["status"] not in ("scheduled", "in_progress"):
                    ended[job_id] = job
            time.sleep(5)  # each look costs the server something, on cores that the jobs need
    assert set(ended) == set(ids), f"not ended after {LIMIT_S} s: {set(ids) - set(ended)}"
    return ended


def each_job() -> Any:
    return pytest.mark.parametrize(("family", "recipe"), JOBS)


@each_job()
def test_job_completes_and_its_held_out_loss_falls(
    jobs: dict[str, dict[str, Any]], server: Server, family: str, recipe: str
) -> None:
    job = jobs[f"{family}-{recipe}"]
    assert job["status"] == "completed", job.get("reason")
    progress = job["resources_allocated"]
    before, after = progress["evaluation"]["first"]["metrics"], progress["evaluation"]["last"]["metrics"]
    assert after["validation_loss"] < 0.9 * before["validation_loss"], (before, after)
    checkpoints = server.client().alpha.post_training.job.artifacts(extra_query={"job_uuid": job["job_uuid"]})
    metrics = checkpoints.checkpoints[0].training_metrics
    assert metrics.validation_loss == pytest.approx(after["validation_loss"])
    assert metrics.perplexity > 1
    assert all(Path(each.path).is_dir() for each in checkpoints.checkpoints)


@each_job()
def test_experts_were_seen(jobs: dict[str, dict[str, Any]], family: str, recipe: str) -> None:
    job = jobs[f"{family}-{recipe}"]
    progress = job["resources_allocated"]
    if family == "llama":
        assert progress["routing"] is None
        assert "aux_loss" not in progress["metrics"]
        return
    assert progress["metrics"]["aux_loss"] > 0
    assert progress["routing"]["experts"] == 4
    assert progress["routing"]["layers"] == len(job["resolved"]["layout"]["moe_layers"])
    assert job["resolved"]["moe"]["aux_coef"] == pytest.approx(0.001)


@each_job()
def test_old_and_new_routes_answer_alike(
    jobs: dict[str, dict[str, Any]], server: Server, family: str, recipe: str
) -> None:
    job_id = f"{family}-{recipe}"
    with asking(server) as http:
        for what in ("status", "artifacts"):
            new, old = http.get(f"/jobs/{job_id}/{what}"), http.get(f"/job/{what}", params={"job_uuid": job_id})
            assert new.status_code == old.status_code == 200
            assert new.json() == old.json()
    status = server.client().alpha.post_training.job.status(extra_query={"job_uuid": job_id})
    assert status.status == "completed"
    assert status.job_uuid == job_id


@each_job()
def test_final_adapter_loads_with_plain_peft_and_changes_the_model(
    jobs: dict[str, dict[str, Any]], server: Server, family: str, recipe: str
) -> None:
    found = jobs[f"{family}-{recipe}"]["checkpoints"]
    (adapter,) = [each for each in found if each["kind"] == "adapter"]
    base = AutoModelForCausalLM.from_pretrained(server.state_dir / "models" / family)
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        untouched = base(tokens).logits
        tuned = PeftModel.from_pretrained(base, adapter["path"])
        changed = tuned(tokens).logits
        with tuned.disable_adapter():
            assert torch.equal(tuned(tokens).logits, untouched)
    assert (changed - untouched).abs().max() > 0.05


def exported(server: Server, job_id: str, count: int) -> list[dict[str, Any]]:
    """The exports of a job, newest first, once all have ended."""
    deadline = time.monotonic() + LIMIT_S
    with asking(server) as http:
        while time.monotonic() < deadline:
            found: list[dict[str, Any]] = http.get(f"/jobs/{job_id}/exports").json()["data"]
            if len(found) == count and all(each["completed_at"] for each in found):
                return found
            time.sleep(2)
    raise AssertionError(f"no {count} exports of {job_id} after {LIMIT_S} s")


def test_what_a_job_asked_for_is_exported_and_served_by_it(
    jobs: dict[str, dict[str, Any]], server: Server, tmp_path: Path
) -> None:
    (own,) = exported(server, EXPORTED, 1)
    assert (own["status"], [(step["name"], step["state"]) for step in own["steps"]]) == (
        "completed", [("load_check", "completed"), ("merged", "completed")],
    )  # fmt: skip
    with asking(server) as http:
        later = http.post(f"/jobs/{EXPORTED}/exports", json=LATER).json()["job_uuid"]
        assert [each["job_uuid"] for each in exported(server, EXPORTED, 2)] == [later, own["job_uuid"]]
        shown = {each["name"]: each for each in http.get(f"/jobs/{EXPORTED}/artifacts").json()["checkpoints"]}
        sizes = [shown[name]["bytes"] for name in ("merged", f"merged@{own['job_uuid']}")]
        assert sizes[0] < 0.7 * sizes[1], "16 bits, and 32"
        for file in http.get(f"/jobs/{EXPORTED}/artifacts/merged@{own['job_uuid']}").json()["files"]:
            content = http.get(f"/jobs/{EXPORTED}/artifacts/merged@{own['job_uuid']}/{file['path']}").content
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
            (tmp_path / file["path"]).write_bytes(content)
        assert http.delete(f"/jobs/{own['job_uuid']}").status_code == 200
        assert http.get(f"/jobs/{EXPORTED}").json()["status"] == "completed", "it does without"
    base = AutoModelForCausalLM.from_pretrained(server.state_dir / "models" / "granitemoe")
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(base, shown["adapter"]["path"])(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    assert torch.allclose(merged, tuned, atol=1e-4, rtol=0)


def test_a_running_job_is_cancelled_and_keeps_what_it_had(server: Server, jobs: dict[str, dict[str, Any]]) -> None:
    body = {"recipe": "sft", "job_uuid": "to-cancel", "model": str(server.state_dir / "models" / "mixtral"),
            "data": {"dataset_id": "words"}, "training": {"n_epochs": 500, "batch_size": 2},
            "adapter": {"rank": 4}, "options": {"max_length": 64}}  # fmt: skip
    with asking(server) as http:
        assert http.post("/jobs", json=body).status_code == 200
        deadline = time.monotonic() + LIMIT_S
        while (http.get("/jobs/to-cancel").json()["resources_allocated"].get("step") or 0) < 3:
            assert time.monotonic() < deadline
            time.sleep(2)
        assert http.post("/jobs/to-cancel/cancel").status_code == 200
        while (job := http.get("/jobs/to-cancel").json())["status"] == "in_progress":
            assert time.monotonic() < deadline
            time.sleep(2)
        assert job["status"] == "cancelled"
        assert any(each["kind"] == "checkpoint" for each in job["checkpoints"])
        assert http.post("/jobs/to-cancel/cancel").status_code == 200  # asked again: no change
        assert http.post("/jobs/mixtral-sft/cancel").status_code == 409


def test_hub_model_that_is_not_in_the_cache_is_refused(server: Server) -> None:
    """Training processes of this server may not use the hub (HF_HUB_OFFLINE)."""
    body = {"recipe": "sft", "job_uuid": "no-model", "model": "nobody/no-such-model", "data": {"dataset_id": "words"}}
    with asking(server) as http:
        answer = http.post("/jobs", json=body)
        assert answer.status_code == 400
        assert "model: 'nobody/no-such-model' is not valid" in answer.json()["error"]["message"]
        assert http.get("/jobs/no-model").status_code == 404
