"""SFT or DPO over HTTP of families whose layout only the derivation finds, exported merged: a server, tiny models.

Each job completes and lowers its held-out loss, and its merged model is a whole model of its own class, whose logits
are those of base and adapter. What of this does not need a server, `compute.moe.test_every_family` tests of all types.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig

from llama_stack_provider_moe.compute.moe.layout import outside_text
from llama_stack_provider_moe.compute.moe.model_types import class_of
from tests.support import tiny_models
from tests.support.chosen import chosen
from tests.support.family_subject import Subject
from tests.support.host_harness import Server
from tests.support.shared_server import Shared
from tests.system.test_e2e import DPO_ROWS, LIMIT_S, SFT_ROWS, asking

pytestmark = pytest.mark.e2e

# Model type -> the recipe of its job.
FAMILIES = {
    "nemotron_h": "sft",  # experts without a gate; a layer is attention, Mamba, an MLP or experts
    "jamba": "dpo",  # hybrid
    "glm4v_moe": "dpo",  # composite; a bias for the choice
    "gemma4": "sft",  # a dense MLP beside the experts, which are in the layer itself; here without parts for images
    "deepseek_v32": "dpo",  # latent attention with an indexer, and groups of experts
    "mistral4": "sft",  # latent attention
}
# One of each kind of layout; `compute.moe.test_every_family` has the laws of all types.
FEW = ("nemotron_h", "glm4v_moe", "gemma4")
FEW_OR_ALL = [pytest.param(family, marks=[] if family in FEW else [pytest.mark.wide]) for family in FAMILIES]
COMPOSITE = {"glm4v_moe"}
# The load check starts two processes that import the libraries; in the others the test itself compares the logits.
LOAD_CHECKED = "gemma4"
TOKENS = torch.arange(5, 25).unsqueeze(0)


def build(family: str, folder: Path) -> None:
    Subject(family).model().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def families(request: pytest.FixtureRequest) -> list[str]:
    """Those of the run."""
    return sorted(family for (family,) in chosen(request, "family"))


@pytest.fixture(scope="module")
def server(shared: Shared, families: list[str]) -> Server:
    for family in families:
        shared.model(family, build)
    shared.rows("words", SFT_ROWS)
    shared.rows("pairs", DPO_ROWS)
    return shared.server


@pytest.fixture(scope="module")
def jobs(server: Server, families: list[str]) -> dict[str, dict[str, Any]]:
    """Every family, all at once: family -> the whole job, once its export has ended too."""
    ids = families
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + LIMIT_S
    with asking(server) as http:
        for family in families:
            recipe = FAMILIES[family]
            body = {
                "recipe": recipe, "job_uuid": family, "model": str(server.state_dir / "models" / family),
                "data": {"dataset_id": "words" if recipe == "sft" else "pairs"},
                "training": {"batch_size": 8, "dtype": "fp32"}, "optimizer": {"lr": 5e-3}, "adapter": {"rank": 4},
                "options": {"max_length": 64, "lr_scheduler": "constant"},
                "export": {"merged": True, "load_check": family == LOAD_CHECKED},
            }  # fmt: skip
            answer = http.post("/jobs", json=body)
            assert answer.status_code == 200, answer.text
        while len(found) < len(ids) and time.monotonic() < deadline:
            for job_id in set(ids) - set(found):
                job = http.get(f"/jobs/{job_id}").json()
                if job["status"] in ("scheduled", "in_progress"):
                    continue
                exports = http.get(f"/jobs/{job_id}/exports").json()["data"]
                if job["status"] != "completed" or (exports and exports[0]["completed_at"]):
                    found[job_id] = {**job, "exports": exports, **http.get(f"/jobs/{job_id}/artifacts").json()}
            time.sleep(2)
    assert set(found) == set(ids), f"not ended after {LIMIT_S} s: {set(ids) - set(found)}"
    return found


def artifact(job: dict[str, Any], name: str) -> Path:
    (found,) = [each["path"] for each in job["checkpoints"] if each["kind"] == name]
    return Path(found)


@pytest.mark.parametrize("family", FEW_OR_ALL)
def test_job_completes_learns_and_is_exported(jobs: dict[str, dict[str, Any]], family: str) -> None:
    job = jobs[family]
    assert job["status"] == "completed", job.get("reason")
    evaluation = job["resources_allocated"]["evaluation"]
    before, after = (evaluation[which]["metrics"]["validation_loss"] for which in ("first", "last"))
    assert after < before
    layout = Subject(family).layout
    assert job["resolved"]["layout"]["moe_layers"] == list(layout.moe_layers)
    (export,) = job["exports"]
    steps = ["load_check", "merged"] if family == LOAD_CHECKED else ["merged"]
    assert export["status"] == "completed"
    assert [(step["name"], step["state"]) for step in export["steps"]] == [(step, "completed") for step in steps]


@pytest.mark.parametrize("family", FEW_OR_ALL)
@pytest.mark.filterwarnings("ignore")
def test_the_merged_model_is_a_whole_model_of_its_class(
    jobs: dict[str, dict[str, Any]], server: Server, family: str
) -> None:
    job, kind = jobs[family], Subject(family).kind
    merged_at, base_at = artifact(job, "merged"), server.state_dir / "models" / family
    assert class_of(AutoConfig.from_pretrained(merged_at)) is kind
    merged, loading = kind.from_pretrained(merged_at, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert not loading["unexpected_keys"]
    base = kind.from_pretrained(base_at).eval()
    before, after = dict(base.named_parameters()), dict(merged.named_parameters())
    rest = outside_text(base)
    assert bool(rest) is (family in COMPOSITE)
    assert all(torch.equal(before[name], after[name]) for name in rest), "frozen, and saved as it was"
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    with torch.no_grad():
        untouched = base(input_ids=TOKENS, use_cache=False).logits
        tuned = PeftModel.from_pretrained(base, artifact(job, "adapter")).eval()
        expected = tuned(input_ids=TOKENS, use_cache=False).logits
        found = merged.eval()(input_ids=TOKENS, use_cache=False).logits
    assert (expected - untouched).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
