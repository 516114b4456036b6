"""Laws of the KTO recipe, on tiny models."""

import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from tests.support.training_support import Run, Workshop, kto_rows, workshop

__all__ = ["workshop"]

BETA, UP, DOWN = 0.3, 6.0, 0.5
BATCH = 4


def log_probs(model: Any, tokenizer: Any, pairs: list[tuple[Any, Any]]) -> torch.Tensor:
    """Log-probability of each answer behind a prompt, each alone in its batch."""
    found = []
    for prompt, answer in pairs:
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        before = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        text = asked + answer[0]["content"] + "<|im_end|>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        log_probs_TV = model(ids).logits[0, :-1].log_softmax(-1)
        found.append(log_probs_TV.gather(-1, ids[0, 1:, None])[before - 1 :].sum())
    return torch.stack(found)


def loss_of(policy: Any, reference: Any, tokenizer: Any, rows: list[Any]) -> torch.Tensor:
    """Eq. 7 of arXiv 2402.01306 over one micro-batch, by hand."""
    own = [(row["prompt"], row["completion"]) for row in rows]
    mismatched = [(row["prompt"], rows[index - 1]["completion"]) for index, row in enumerate(rows)]
    with torch.no_grad():
        kl = (
            (log_probs(policy, tokenizer, mismatched) - log_probs(reference, tokenizer, mismatched)).mean().clamp(min=0)
        )
        base = log_probs(reference, tokenizer, own)
    margins = BETA * (log_probs(policy, tokenizer, own) - base - kl)
    up = torch.tensor([row["label"] for row in rows])
    return torch.where(up, UP * (1 - margins.sigmoid()), DOWN * (1 - (-margins).sigmoid())).mean()


def test_a_run_equals_a_loop_of_the_papers_formula(workshop: Workshop) -> None:
    """All weights, without the balance loss: 6 rows, whose second micro-batch is shorter, in one step an epoch."""
    rows, held_out = kto_rows(6), kto_rows(5, 100)
    run = workshop.run(
        "kto", "granitemoe", rows, held_out, adapter=None, beta=BETA, desirable_weight=UP, undesirable_weight=DOWN,
        data={"shuffle": False}, moe={"router_aux_loss_coef": 0}, options={"max_grad_norm": 0},
        optimizer={"lr": 2e-3, "optimizer_type": "sgd", "weight_decay": 0},
        training={"batch_size": BATCH, "gradient_accumulation_steps": 2, "n_epochs": 3},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["reference"] == "a second copy"
    folder = workshop.model("granitemoe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    optimizer = torch.optim.SGD(policy.parameters(), lr=2e-3)
    for step in range(3):
        loss = (4 * loss_of(policy, reference, tokenizer, rows[:4])
                + 2 * loss_of(policy, reference, tokenizer, rows[4:])) / 6  # fmt: skip
        # Sums of log-probabilities are some -400 nats, whose spacing in fp32 is 3e-5: processors differ by some 1e-6.
        assert run.steps("preference_loss")[step] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert run.steps("kl")[-1] > 0, "a KL term of 0 would hide wrong pairs"
    for name, weight in policy.state_dict().items():
        if name in run.model():
            torch.testing.assert_close(run.model()[name], weight, atol=1e-6, rtol=0)
    with torch.no_grad():  # five rows are one micro-batch: a last one of one row has no KL term
        assert run.held_out("validation_loss")[-1] == pytest.approx(
            loss_of(policy, reference, tokenizer, held_out).item(), abs=1e-5
        )


@pytest.fixture(scope="module")
def qwen(workshop: Workshop) -> Run:
    return workshop.run("kto", "qwen3_moe", kto_rows(17), moe={"train_router": True},
                        training={"n_epochs": 4, "batch_size": BATCH, "gradient_accumulation_steps": 2})  # fmt: skip


def test_a_job_learns_to_prefer_what_has_a_thumb_up(qwen: Run) -> None:
    assert qwen.exit_code == COMPLETED, qwen.reason
    assert qwen.resolved["reference"] == "the adapter off"
    assert (qwen.resolved["thumbs_up"], qwen.resolved["thumbs_down"]) == (9, 8)
    assert qwen.resolved["train_sequences"] == 16, "a lone last row has no KL term"
    assert qwen.held_out("validation_loss")[0] == pytest.approx(0.5, abs=1e-5)
    assert qwen.held_out("validation_loss")[-1] < 0.48
    assert qwen.held_out("rewards/margins")[-1] > 0.05
    assert not [name for name in qwen.adapter() if "ref" in name.split(".")]


def test_every_step_tells_rewards_kl_and_routers(qwen: Run) -> None:
    for step in qwen.events("step"):
        wanted = {"rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "aux_loss", "grad_norm"}
        assert wanted <= step.metrics.keys()
        assert step.metrics["rewards/margins"] == pytest.approx(
            step.metrics["rewards/chosen"] - step.metrics["rewards/rejected"]
        )
        assert step.metrics["loss"] == pytest.approx(
            step.metrics["preference_loss"] + 0.001 * step.metrics["aux_loss"], rel=1e-5
        )
    assert [event.step for event in qwen.events("routing")] == [*range(1, 9)]


def test_perplexity_is_of_answers_with_a_thumb_up(qwen: Run, workshop: Workshop) -> None:
    folder = workshop.model("qwen3_moe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    tuned = PeftModel.from_pretrained(base, qwen.folder.adapter).eval()
    up = [row for row in kto_rows(4, 100) if row["label"]]
    with torch.no_grad():
        total = log_probs(tuned, tokenizer, [(row["prompt"], row["completion"]) for row in up]).sum().item()
    tokens = sum(
        len(tokenizer(row["completion"][0]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"])
        for row in up
    )
    assert qwen.held_out("perplexity")[-1] == pytest.approx(math.exp(-total / tokens), rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.5}, {"desirable_weight": 3.0}, {"undesirable_weight": 3.0}, {"moe": {"router_aux_loss_coef": 1.0}}],
    ids=lambda changes: next(iter(changes)),
)
def test_no_setting_is_read_by_nobody(workshop: Workshop, changes: dict[str, Any]) -> None:
    first, changed = (
        workshop.run("kto", "mixtral", kto_rows(8), training={"n_epochs": 2}, **each) for each in ({}, changes)
    )
    assert changed.exit_code == COMPLETED, changed.reason
    assert changed.steps("loss")[-1] != pytest.approx(first.steps("loss")[-1], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "olmoe", "phimoe", "llama4_text", "glm4_moe", "gpt_oss"])
def test_families_prefer_what_has_a_thumb_up(workshop: Workshop, family: str) -> None:
    run = workshop.run("kto", family, kto_rows(8), training={"n_epochs": 2})
    assert run.exit_code == COMPLETED, run.reason
    assert run.held_out("validation_loss")[-1] < run.held_out("validation_loss")[0]


def test_classes_are_held_out_both(workshop: Workshop) -> None:
    rows = [{**row, "label": index == 1 or index == 2} for index, row in enumerate(kto_rows(12))]
    run = workshop.run("kto", "llama", rows, data={"validation_dataset_id": None}, options={"validation_split": 0.1})
    assert run.exit_code == COMPLETED, run.reason
    assert (run.resolved["train_rows"], run.resolved["validation_rows"]) == (10, 2)
    assert run.resolved["thumbs_up"] == 1
    assert "desirable_weight x 1 thumbs up / (undesirable_weight x 9 thumbs down) is 0.111" in "".join(
        event.text for event in run.events("message")
    )


def test_a_class_that_is_missing_among_the_evaluated_rows_is_named(workshop: Workshop) -> None:
    run = workshop.run("kto", "llama", None, kto_rows(1))
    assert run.exit_code == FAILED
    assert "of the rows that are evaluated, 1 have a thumb up and 0 a thumb down" in run.reason
