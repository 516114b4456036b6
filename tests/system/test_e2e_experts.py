"""Jobs over HTTP with each adapter plan, each balance strategy and a quantised base: SFT and DPO, a real server.

Circuit breakers, of the families that acceptance names, run on the same server; so do evaluations, a gate that fails
a job, and a routing analysis with the job that trains what it found; and jobs of two processes.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.spec.routing import RoutingReport
from tests.compute.recipes.test_sft import mean_nll
from tests.support import safety_jobs, together_jobs
from tests.support.chosen import chosen
from tests.support.host_harness import Server
from tests.support.shared_server import Shared
from tests.system.test_e2e import DPO_ROWS, LIMIT_S, SFT_ROWS, asking

pytestmark = pytest.mark.e2e

RULES = [{"layers": "0-1", "experts": {"0": 8, "3": 4}, "lr_multiplier": 2.0}]
# name -> family, parts of the body, and what `resolved.json` must say: dotted path -> value
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "trunk": ("qwen3_moe", {"adapter": {"rank": 4, "plan": "trunk"}},
              {"adapter.method": "LoRA r=4, alpha=32, plan trunk"}),
    "all-experts": ("mixtral", {"adapter": {"rank": 4, "plan": "all_experts"}},
                    {"adapter.method": "LoRA r=4, alpha=32, plan all_experts"}),
    "per-expert": ("mixtral", {"adapter": {"rank": 4, "plan": "per_expert", "rules": RULES}},
                   {"adapter.method": "LoRA r=4 to 8, alpha=32, plan per_expert"}),
    "switch": ("deepseek_v3", {"adapter": {"rank": 4}, "moe": {"router_aux_loss_coef": 0.01, "train_router": True}},
               {"moe.own_aux": True, "moe.load_balancing": "switch"}),
    "gshard": ("mixtral", {"adapter": {"rank": 4}, "moe": {"moe_load_balancing": "gshard", "train_router": True}},
               {"moe.own_aux": True, "moe.load_balancing": "gshard", "moe.aux_coef": 0.001}),
    "expert-choice": ("llama4_text", {"adapter": {"rank": 4}, "moe": {"moe_load_balancing": "expert_choice"}},
                      {"moe.experts_implementation": "moe_torch_partial"}),
    "aux-free": ("deepseek_v3", {"adapter": {"rank": 4}, "moe": {"moe_load_balancing": "aux_free"}},
                 {"moe.bias_rate": 0.001}),
    "4-bit": ("granitemoe", {"adapter": {"rank": 4, "quantize_base": True}, "options": {"save_merged": True}},
              {"quantized.bits": 4, "quantized.experts": 16}),
}  # fmt: skip
RECIPES = ["sft", "dpo"]
# Few cases, each with one of the recipes: neither an adapter's plan nor a balance knows which recipe trains it.
FEW = {("per-expert", "sft"), ("expert-choice", "dpo"), ("aux-free", "sft"), ("4-bit", "dpo")}
JOBS = [pytest.param(case, recipe, marks=[] if (case, recipe) in FEW else [pytest.mark.wide])
        for case in CASES for recipe in RECIPES]  # fmt: skip
# Each recipe and each strategy once; `tests.compute.distributed` has them with each other, without a server.
TOGETHER = [pytest.param(*pair, marks=[] if pair in together_jobs.FEW else [pytest.mark.wide])
            for pair in together_jobs.PAIRS]  # fmt: skip
# Of two blocks both are rerouted at the second, where Llama 4's and GLM-4's experts are.
BREAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3": ("qwen3_moe", {"adapter": {"rank": 4, "plan": "trunk"}}),
    "granite-4-bit": ("granitemoe", {"adapter": {"rank": 4, "quantize_base": True}}),
    "llama-4": ("llama4_text", {"moe": {"router_aux_loss_coef": 0.01}}),
    "glm-4": ("glm4_moe", {"adapter": {"rank": 4, "plan": "per_expert", "rules": [{"experts": {"1": 4}}]}}),
}
# One by the API's own route and one on a quantised base; `tests.compute.recipes.test_circuit_breaker` has every family.
BREAKER_JOBS = [pytest.param(each, marks=[] if each in ("qwen3", "granite-4-bit") else [pytest.mark.wide])
                for each in BREAKERS]  # fmt: skip
KEPT_ROWS = [{"prompt": f"Add {i} and {i + 3}.", "completion": f"That makes {2 * i + 3}."} for i in range(16)]


@pytest.fixture(scope="module")
def server(shared: Shared) -> Server:
    for family in {*safety_jobs.FAMILIES, *(family for family, *_ in [*CASES.values(), *BREAKERS.values()])}:
        shared.model(family)
    for name, rows in {"words": SFT_ROWS, "pairs": DPO_ROWS, "kept": KEPT_ROWS, **safety_jobs.DATA}.items():
        shared.rows(name, rows)
    return shared.server


@pytest.fixture(scope="module")
def jobs(server: Server, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Run the jobs of all cases at once: id -> the whole job after its end."""
    ids = []
    with asking(server) as http:
        for name, recipe in sorted(chosen(request, "case", "recipe")):
            family, parts, _ = CASES[name]
            body: dict[str, Any] = {
                "recipe": recipe,
                "job_uuid": f"{name}-{recipe}",
                "model": str(server.state_dir / "models" / family),
                "data": {"dataset_id": "words" if recipe == "sft" else "pairs"},
                "training": {"batch_size": 8},
                "optimizer": {"lr": 5e-3},
                **{block: value for block, value in parts.items() if block != "options"},
                "options": {"max_length": 64, "lr_scheduler": "constant", **parts.get("options", {})},
            }
            answer = http.post("/jobs", json=body)
            assert answer.status_code == 200, answer.text
            ids.append(body["job_uuid"])
        return ended(http, ids)


@pytest.fixture(scope="module")
def breakers(server: Server, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The circuit-breaker jobs, the same way."""
    names = sorted(name for (name,) in chosen(request, "name"))
    with asking(server) as http:
        for name in names:
            family, parts = BREAKERS[name]
            answer = post_breaker(http, name, str(server.state_dir / "models" / family), parts)
            assert answer.status_code == 200, answer.text
        return ended(http, [f"breaker-{name}" for name in names])


def ended(http: httpx.Client, ids: list[str]) -> dict[str, dict[str, Any]]:
    """The whole jobs, once all of them have ended."""
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + LIMIT_S
    while len(found) < len(ids) and time.monotonic() < deadline:
        for job_id in set(ids) - set(found):
            job = http.get(f"/jobs/{job_id}").json()
            if job["status"] not in ("scheduled", "in_progress"):
                found[job_id] = job
        time.sleep(5)
    assert set(found) == set(ids), f"not ended after {LIMIT_S} s: {set(ids) - set(found)}"
    return found


def post_breaker(http: httpx.Client, name: str, model: str, parts: dict[str, Any]) -> httpx.Response:
    """A circuit-breaker job; that of Qwen3 by the API's own route, with the block in its options."""
    block = {"retain": {"dataset_id": "kept"}, "target_layers": "1"}
    options = {"lr_scheduler": "constant", "max_length": 64}
    if name != "qwen3":
        body = {"recipe": "circuit_breaker", "model": model, "data": {"dataset_id": "words"},
                "circuit_breaker": block, "training": {"batch_size": 4}, "optimizer": {"lr": 2e-2},
                "adapter": {"rank": 4}, "options": options, **parts}  # fmt: skip
        return http.post("/jobs", json={**body, "job_uuid": f"breaker-{name}"})
    optimizer = {"optimizer_type": "adamw", "lr": 2e-2, "weight_decay": 0.0, "num_warmup_steps": 0}
    data = {"dataset_id": "words", "batch_size": 4, "shuffle": True, "data_format": "instruct"}
    return http.post("/supervised-fine-tune", json={
        "job_uuid": f"breaker-{name}", "model": model, "hyperparam_search_config": {}, "logger_config": {},
        "training_config": {"n_epochs": 1, "data_config": data, "optimizer_config": optimizer},
        "options": {**options, "circuit_breaker": block}, **parts,
    })  # fmt: skip


@pytest.mark.parametrize("name", BREAKER_JOBS)
def test_circuit_breaker_reroutes(breakers: dict[str, dict[str, Any]], name: str) -> None:
    job = breakers[f"breaker-{name}"]
    assert job["status"] == "completed", job.get("reason")
    assert job["recipe"] == "circuit_breaker"
    progress = job["resources_allocated"]
    before, after = (progress["evaluation"][which]["metrics"] for which in ("first", "last"))
    assert before["cosine/break/1"] == pytest.approx(1, abs=1e-3)
    assert after["cosine/break/1"] < 0.9
    assert after["cosine/break/1"] < after["cosine/retain/1"]
    assert sorted(progress["routing"]["sets"]) == ["break", "retain"]
    told = job["resolved"]["circuit_breaker"]
    assert (told["target_layers"], told["lora_layers"]) == ([1], "0-1")
    assert {each["kind"] for each in job["checkpoints"]} == {"checkpoint", "adapter"}


@pytest.fixture(scope="module")
def evaluated(server: Server) -> dict[str, dict[str, Any]]:
    """The whole jobs of `safety_jobs`; a job that needs the analysis is submitted after it."""
    models = server.state_dir / "models"
    with asking(server) as http:
        found: dict[str, dict[str, Any]] = {}
        for bodies in (safety_jobs.first_jobs(models), [safety_jobs.on_the_analysis(models)]):
            for body in bodies:
                answer = http.post("/jobs", json=body)
                assert answer.status_code == 200, answer.text
            found |= ended(http, [body["job_uuid"] for body in bodies])
        return found


def downloaded(http: httpx.Client, job_id: str, kind: str) -> dict[str, bytes]:
    """Download the files of a job's only artifact of this kind, each by its URL."""
    listed = http.get(f"/jobs/{job_id}/artifacts").json()["checkpoints"]
    (name,) = [each["identifier"].partition("/")[2] for each in listed if each["kind"] == kind]
    files = http.get(f"/jobs/{job_id}/artifacts/{name}").json()["files"]
    found = {}
    for file in files:
        answer = http.get(f"/jobs/{job_id}/artifacts/{name}/{file['path']}")
        assert (answer.status_code, len(answer.content)) == (200, file["bytes"])
        found[file["path"]] = answer.content
    return found


def perplexity(model: Any, server: Server) -> float:
    """Perplexity of the garden rows, computed with plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(server.state_dir / "models" / "granitemoe")
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in safety_jobs.DATA["garden"]
    ]
    return float(torch.tensor(mean_nll(model, tokenizer, rows)).exp())


def test_an_evaluation_on_a_base_in_4_bits(evaluated: dict[str, dict[str, Any]], server: Server) -> None:
    job = evaluated["measured-4-bit"]
    assert job["status"] == "completed", job.get("reason")
    assert job["resolved"]["quantized"]["bits"] == 4
    with asking(server) as http:
        report = json.loads(downloaded(http, "measured-4-bit", "evaluation")["eval.json"])
    safety = job["resources_allocated"]["safety"]
    assert safety["measured"] == report["measured"]
    assert safety["differences"] == report["differences"]
    assert (safety["exceeded"], [each["exceeded"] for each in report["gate"]]) == ([], [False])
    before, after = (report["measured"][state] for state in ("before", "after"))
    assert {name: figure["n"] for name, figure in before.items()} == {
        "refusal_rate": 9, "perplexity": 8, "forbidden_calls_rate": 3,
    }  # fmt: skip
    in_16_bits = perplexity(AutoModelForCausalLM.from_pretrained(server.state_dir / "models" / job["model"]), server)
    assert before["perplexity"]["value"] == pytest.approx(in_16_bits, rel=0.5)
    assert before["perplexity"]["value"] != pytest.approx(in_16_bits, rel=1e-4), "it was not the quantised model"
    assert after["perplexity"]["value"] < before["perplexity"]["value"]


def test_a_gate_fails_a_job_whose_artifacts_are_kept(evaluated: dict[str, dict[str, Any]], server: Server) -> None:
    job = evaluated["gated"]
    assert job["status"] == "failed"
    assert job["reason"].startswith("eval.fail_if.capability_drop: ")
    assert job["resources_allocated"]["safety"]["exceeded"] == ["capability_drop"]
    assert {each["kind"] for each in job["checkpoints"]} == {"checkpoint", "model", "evaluation"}
    with asking(server) as http:
        assert {"config.json", "model.safetensors"} <= downloaded(http, "gated", "model").keys()
        (verdict,) = json.loads(downloaded(http, "gated", "evaluation")["eval.json"])["gate"]
    assert verdict["value"] == pytest.approx(verdict["after"] / verdict["before"] - 1)
    assert verdict["value"] > verdict["limit"] == 0.01


# peft 0.21 looks for a pattern's names among modules, and parameters are none; it applies them all the same.
@pytest.mark.filterwarnings(r"ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_an_analysis_tells_the_next_job_what_to_train_and_to_mask(
    evaluated: dict[str, dict[str, Any]], server: Server, tmp_path: Path
) -> None:
    analysis, job = evaluated["analysis"], evaluated["on-analysis"]
    assert (analysis["status"], job["status"]) == ("completed", "completed"), (analysis["reason"], job["reason"])
    with asking(server) as http:
        found = RoutingReport.model_validate_json(downloaded(http, "analysis", "analysis")["routing.json"])
        adapter = downloaded(http, "on-analysis", "adapter")
        report = json.loads(downloaded(http, "on-analysis", "evaluation")["eval.json"])
    best, masked = (
        [(each.layer, each.expert) for each in found.ranked(name) if each.is_sure] for name in ("sums", "garden")
    )
    trained = set()
    for name, tensor in load(adapter["adapter_model.safetensors"]).items():
        if ".experts." in name and "lora_A" in name:
            rows = tensor.view(found.num_experts, -1).any(dim=1)  # of one expert after another; zeros: no rank
            layer = int(name.split(".layers.")[1].split(".")[0])
            trained |= {(layer, expert) for expert in rows.nonzero().flatten().tolist()}
    assert trained == set(best[:2])
    assert len(trained) == 2
    assert report["masked_experts"] == {str(masked[0][0]): [masked[0][1]]}
    measured = {state: figures["perplexity"]["value"] for state, figures in report["measured"].items()}
    assert measured.keys() == {"before", "before_masked", "after", "after_masked"}
    assert measured["before_masked"] != measured["before"]
    # The figures in the status are those of plain transformers and PEFT, with the adapter that was downloaded.
    for name, content in adapter.items():
        (tmp_path / name).write_bytes(content)
    base = AutoModelForCausalLM.from_pretrained(server.state_dir / "models" / job["model"])
    assert measured["before"] == pytest.approx(perplexity(base, server), rel=1e-4)
    tuned = PeftModel.from_pretrained(base, tmp_path)
    status = job["resources_allocated"]["safety"]["measured"]
    assert status["after"]["perplexity"]["value"] == pytest.approx(perplexity(tuned, server), rel=1e-4)


@pytest.mark.wide
def test_a_circuit_breaker_is_cancelled_and_goes_on_to_its_end(server: Server) -> None:
    name, deadline = "breaker-cancelled", time.monotonic() + LIMIT_S
    with asking(server) as http:
        assert http.post("/jobs", json=safety_jobs.long_breaker(server.state_dir / "models")).status_code == 200
        while (http.get(f"/jobs/{name}").json()["resources_allocated"].get("step") or 0) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert http.post(f"/jobs/{name}/cancel").status_code == 200
        job = ended(http, [name])[name]
        stopped_at = job["resources_allocated"]["step"]
        assert (job["status"], job["reason"] is None or "cancel" in job["reason"]) == ("cancelled", True)
        assert 3 <= stopped_at < safety_jobs.BREAKER_STEPS
        assert http.post(f"/jobs/{name}/resume").status_code == 200
        job = ended(http, [name])[name]
        assert job["status"] == "completed", job["reason"]
        series = http.get(f"/jobs/{name}/metrics", params={"names": "reroute_coefficient,cosine/break/1"}).json()
        events = http.get(f"/jobs/{name}/events", params={"limit": 1000}).json()["events"]
    (resumed,) = [event for event in events if event["type"] == "resumed"]
    assert resumed["step"] == stopped_at, "it goes on where it was stopped"
    last = safety_jobs.BREAKER_STEPS
    assert series["steps"] == list(range(1, last + 1)), "no step is missing, none stands twice"
    assert series["metrics"]["reroute_coefficient"] == pytest.approx([10 * (1 - t / 2 / last) for t in series["steps"]])
    cosines = series["metrics"]["cosine/break/1"]
    assert cosines[0] == pytest.approx(1, abs=1e-3)
    assert max(cosines[-8:]) < 0.5


@pytest.fixture(scope="module")
def together(server: Server, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The whole jobs of `together_jobs`."""
    bodies = together_jobs.bodies(server.state_dir / "models", chosen(request, "recipe", "strategy"))
    with asking(server) as http:
        for body in bodies:
            answer = http.post("/jobs", json=body)
            assert answer.status_code == 200, answer.text
        return ended(http, [body["job_uuid"] for body in bodies])


def weights(http: httpx.Client, job_id: str) -> dict[str, torch.Tensor]:
    """Weights of the adapter that a job leaves."""
    return dict(load(downloaded(http, job_id, "adapter")["adapter_model.safetensors"]))


@pytest.mark.parametrize(("recipe", "strategy"), TOGETHER)
def test_two_processes_leave_what_one_leaves(
    together: dict[str, dict[str, Any]], server: Server, recipe: str, strategy: str
) -> None:
    alone, both = together[f"{recipe}-alone"], together[f"{recipe}-{strategy}"]
    assert (alone["status"], both["status"]) == ("completed", "completed"), (alone["reason"], both["reason"])
    assert (both["resolved"]["processes"], both["resolved"]["strategy"]) == (2, strategy)
    with asking(server) as http:
        expected, found = (weights(http, job["job_uuid"]) for job in (alone, both))
        losses = {name: http.get(f"/jobs/{name}/metrics", params={"names": "loss"}).json()["metrics"]["loss"]
                   for name in (alone["job_uuid"], both["job_uuid"])}  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in found.items() if "experts" in name and "lora_B" in name)
    assert losses[both["job_uuid"]] == pytest.approx(losses[alone["job_uuid"]], rel=1e-4, abs=1e-5)


def test_a_job_that_loses_a_process_goes_on_and_completes(server: Server) -> None:
    name, deadline = "loses-one", time.monotonic() + LIMIT_S
    steps = {"n_epochs": 12, "batch_size": 4, "max_steps_per_epoch": 4, "dtype": "fp32"}
    with asking(server) as http:
        models = server.state_dir / "models"
        job = together_jobs.body("sft", models, "fsdp", job_uuid=name, training=steps)
        assert http.post("/jobs", json=job).status_code == 200
        while (http.get(f"/jobs/{name}").json()["resources_allocated"].get("step") or 0) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        events = http.get(f"/jobs/{name}/events", params={"limit": 1000}).json()["events"]
        (rank_0,) = [event["pid"] for event in events if event["type"] == "started"]
        leader = psutil.Process(rank_0).parent()
        assert leader is not None
        (victim,) = {child.pid for child in leader.children()} - {rank_0}
        os.kill(victim, signal.SIGKILL)
        ended_job = ended(http, [name])[name]
        events = http.get(f"/jobs/{name}/events", params={"limit": 1000}).json()["events"]
        series = http.get(f"/jobs/{name}/metrics", params={"names": "loss"}).json()
    assert ended_job["status"] == "completed", ended_job["reason"]
    assert [event["step"] > 0 for event in events if event["type"] == "resumed"] == [True]
    assert series["steps"] == list(range(1, 49))


@pytest.mark.parametrize(("case", "recipe"), JOBS)
def test_job_completes_learns_and_did_what_was_asked(
    jobs: dict[str, dict[str, Any]], server: Server, case: str, recipe: str
) -> None:
    job = jobs[f"{case}-{recipe}"]
    assert job["status"] == "completed", job.get("reason")
    evaluation = job["resources_allocated"]["evaluation"]
    before, after = (evaluation[which]["metrics"]["validation_loss"] for which in ("first", "last"))
    assert after < before
    for path, expected in CASES[case][2].items():
        value: Any = job["resolved"]
        for part in path.split("."):
            value = value[part]
        assert value == expected, path
    kinds = {each["kind"] for each in job["checkpoints"]}
    assert kinds == {"checkpoint", "adapter"} | ({"merged"} if case == "4-bit" else set())


@pytest.mark.parametrize(("case", "recipe"), JOBS)
# peft 0.21 looks for a pattern's names among modules, and parameters are none; it applies them all the same.
@pytest.mark.filterwarnings(r"ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_plain_peft_loads_the_adapter(jobs: dict[str, dict[str, Any]], server: Server, case: str, recipe: str) -> None:
    (adapter,) = [each for each in jobs[f"{case}-{recipe}"]["checkpoints"] if each["kind"] == "adapter"]
    base = AutoModelForCausalLM.from_pretrained(server.state_dir / "models" / CASES[case][0])
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        untouched = base(tokens).logits
        tuned = PeftModel.from_pretrained(base, adapter["path"])
        assert (tuned(tokens).logits - untouched).abs().max() > 0.01
        with tuned.disable_adapter():
            assert torch.equal(tuned(tokens).logits, untouched)
    assert (Path(adapter["path"]) / "router_bias.safetensors").is_file() is (case == "aux-free")
