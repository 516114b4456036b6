"""GRPO over HTTP of eight families, with LoRA on experts and with all weights: a server, tiny models, four steps.

An epoch has two generations, and two steps learn from each. Answers of the first have unequal rewards; those of the
second all have 0, so that its steps learn from the balance loss alone. What a job says of the answers to held-out
prompts, before and after, must be what plain transformers and PEFT find, without a cache and with transformers' own
experts: then the job generated with the model that it trained, and its result is that model.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support import tiny_models
from tests.support.chosen import chosen
from tests.support.host_harness import Server
from tests.support.shared_server import Shared
from tests.support.training_support import Run

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

LIMIT_S = 800  # jobs of other modules may be before it
ANSWER = 4  # tokens
END = 1  # the tokenizer's id of <|im_end|>
AUX = 0.1
FAMILIES = (
    "granitemoehybrid",  # Mamba beside attention, a shared expert, a router in a module of its own
    "mixtral",
    "phimoe",  # SparseMixer
    "llama4_text",  # one expert of a token; layers without experts
    "deepseek_v3",  # latent attention, groups of experts, a bias for the choice; no balance loss of its own
    "gpt_oss",  # experts with biases, stored transposed; sliding windows
    "qwen3_5_moe",  # linear attention
    "lfm2_moe",  # convolutions
)
FEW = ("granitemoehybrid", "deepseek_v3")
WAYS = {"lora": {"rank": 4, "alpha": 8, "plan": "all_experts"}, "whole": None}
EACH = [
    pytest.param(family, way, marks=[] if family in FEW else [pytest.mark.slow]) for family in FAMILIES for way in WAYS
]
# No answer has a letter of the second reference.
ROWS = [
    {"prompt": f"Write {at} words.", "like": "the answer is in the garden" if at < 2 else "\N{SNOWMAN}"}
    for at in range(4)
]
HELD_OUT = [{"prompt": f"Say {at} words of France.", "like": "the answer is in the garden"} for at in range(3)]
JOB: dict[str, Any] = {
    "recipe": "grpo",
    "data": {"dataset_id": "rl-words", "validation_dataset_id": "rl-held-out", "shuffle": False},
    "training": {"batch_size": 8, "gradient_accumulation_steps": 1, "dtype": "fp32"}, "optimizer": {"lr": 2e-2},
    "options": {"max_length": 64, "lr_scheduler": "constant"},
    "moe": {"train_router": True, "router_aux_loss_coef": AUX},
    "rl": {"n_generations": 4, "n_iterations": 2, "max_completion_length": ANSWER},
    "reward": [
        {"grader": {"type": "text_similarity", "name": "alike", "reference": "{{item.like}}",
                    "evaluation_metric": "fuzzy_match"}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(shared: Shared, request: pytest.FixtureRequest) -> Server:
    for family in {family for family, _ in chosen(request, "family", "way")}:
        shared.model(family)
    shared.rows("rl-words", ROWS)
    shared.rows("rl-held-out", HELD_OUT)
    return shared.server


@pytest.fixture(scope="module")
def runs(server: Server, request: pytest.FixtureRequest) -> dict[tuple[str, str], Run]:
    """All jobs, submitted at once: family and what trains -> its run, which has ended."""
    wanted = sorted(chosen(request, "family", "way"))
    deadline, ended = time.monotonic() + LIMIT_S, {}
    with server.http() as http:
        http.headers["Connection"] = "close"
        for family, way in wanted:
            model = str(server.state_dir / "models" / family)
            body = {**JOB, "job_uuid": f"rl-{family}-{way}", "model": model, "adapter": WAYS[way]}
            answer = http.post("/jobs", json=body)
            assert answer.status_code in (200, 201), answer.text
        while len(ended) < len(wanted):
            for family, way in set(wanted) - ended.keys():
                job_id = f"rl-{family}-{way}"
                found = http.get(f"/jobs/{job_id}").json()
                if found["status"] not in ("scheduled", "in_progress"):
                    ended[family, way] = Run(JobFolder(server.state_dir / "jobs" / job_id), found["status"])
            assert time.monotonic() < deadline, sorted(set(wanted) - ended.keys())
            time.sleep(2)
    return ended


def said(model: PreTrainedModel) -> dict[str, float]:
    """What an evaluation says of the likeliest answers to the held-out prompts."""
    tokenizer, entropies, lengths = tiny_models.tokenizer(), [], []
    for row in HELD_OUT:
        prompt = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        before = len(ids)
        while len(ids) < before + ANSWER and ids[-1] != END:
            with torch.no_grad():
                logits_V = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            entropies.append(float(torch.special.entr(logits_V.softmax(dim=-1)).sum()))
            ids.append(int(logits_V.argmax()))
        lengths.append(len(ids) - before)
    return {"entropy": sum(entropies) / len(entropies), "completions/mean_length": sum(lengths) / len(lengths)}


def loaded(run: Run, base_at: Path, way: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The base, and the job's result, in plain transformers and PEFT."""
    base = AutoModelForCausalLM.from_pretrained(base_at, dtype=torch.float32, experts_implementation="eager").eval()
    if way == "whole":
        tuned = AutoModelForCausalLM.from_pretrained(run.folder.model, experts_implementation="eager").eval()
        return base, tuned
    again = AutoModelForCausalLM.from_pretrained(base_at, dtype=torch.float32, experts_implementation="eager").eval()
    return base, PeftModel.from_pretrained(again, run.folder.adapter).eval()


def unchanged(layout: ExpertLayout, before: PreTrainedModel, after: PreTrainedModel) -> list[str]:
    """The matrices of experts and routers that are as they were."""
    merged = after.merge_and_unload() if isinstance(after, PeftModel) else after
    parts = [(layout.experts_path, layout.gate_up), (layout.experts_path, layout.down),
             (layout.router_path, layout.router_weight)]  # fmt: skip
    return [
        f"{layer}.{path}.{name}"
        for layer in layout.moe_layers
        for path, name in parts
        if torch.equal(*(layout.submodule(each, layer, path).get_parameter(name) for each in (before, merged)))
    ]


@pytest.mark.parametrize(("family", "way"), EACH)
def test_a_family_learns_with_the_model_that_wrote(
    runs: dict[tuple[str, str], Run], server: Server, family: str, way: str
) -> None:
    run = runs[family, way]
    assert run.exit_code == "completed", run.reason
    first, last = run.events("evaluation")
    base, tuned = loaded(run, server.state_dir / "models" / family, way)
    layout = find_layout(base)
    assert layout is not None
    for model, event in ((base, first), (tuned, last)):
        wanted = said(model)
        assert {name: event.metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert first.metrics["entropy"] != pytest.approx(last.metrics["entropy"], abs=5e-4), "it has learnt"
    equal = [event.metrics.get("frac_reward_zero_std") for event in run.events("step")]
    assert equal[0] < 1 == equal[2]
    assert min(run.steps("grad_norm")) > 1e-4, "the balance loss, which is all that the last steps have, is learnt from"
    assert run.steps("policy_loss")[2:] == pytest.approx([0, 0], abs=1e-6)
    assert run.steps("loss") == pytest.approx(
        [a + AUX * b for a, b in zip(run.steps("policy_loss"), run.steps("aux_loss"), strict=True)], abs=1e-5
    )
    assert not unchanged(layout, base, tuned), "the last layer's experts learn from the policy loss alone"
