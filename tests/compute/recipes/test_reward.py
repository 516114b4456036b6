"""Laws of the reward recipe, on tiny models."""

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from llama_stack_provider_moe.compute.export.load_check import check
from llama_stack_provider_moe.compute.grading.reward_model import RewardModelGrader
from llama_stack_provider_moe.compute.methods import reward
from llama_stack_provider_moe.compute.models.classifier import load_classifier
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.graders.samples import Sample
from llama_stack_provider_moe.spec.graders import RewardModel
from tests.support.training_support import Run, Workshop, dpo_rows, workshop

__all__ = ["workshop"]

CENTER = 0.2
BATCH = 4


def rewards(model: Any, tokenizer: Any, rows: list[Any], answer: str) -> torch.Tensor:
    """The reward of each conversation, each alone in its batch, at the last token that the template writes."""
    found = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["prompt"] + row[answer], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0])
    return torch.stack(found)


def loss_of(model: Any, tokenizer: Any, rows: list[Any]) -> torch.Tensor:
    """Mean of log(1 + exp(rejected - chosen)) + CENTER * (chosen + rejected)^2."""
    chosen, rejected = (rewards(model, tokenizer, rows, answer) for answer in ("chosen", "rejected"))
    return ((1 + (rejected - chosen).exp()).log() + CENTER * (chosen + rejected).square()).mean()


def test_the_formulas_example() -> None:
    assert doctest.testmod(reward).failed == 0


def test_a_run_equals_a_loop_of_the_formula(workshop: Workshop) -> None:
    """All weights, without the balance loss: 6 pairs, whose second micro-batch is shorter, in one step an epoch."""
    rows, held_out = dpo_rows(6), dpo_rows(3, 100)
    run = workshop.run(
        "reward", "mixtral", rows, held_out, adapter=None, center_rewards=CENTER,
        data={"shuffle": False}, options={"max_grad_norm": 0, "seed": 7},
        optimizer={"lr": 1e-2, "optimizer_type": "sgd", "weight_decay": 0},
        training={"batch_size": BATCH, "gradient_accumulation_steps": 2, "n_epochs": 3},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    folder = workshop.model("mixtral")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    set_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(3):
        loss = (4 * loss_of(model, tokenizer, rows[:4]) + 2 * loss_of(model, tokenizer, rows[4:])) / 6
        assert run.steps("preference_loss")[step] == pytest.approx(loss.item(), abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    saved = run.model()
    assert "score.weight" in saved
    torch.testing.assert_close(saved["score.weight"], model.score.weight.detach(), atol=1e-6, rtol=0)
    with torch.no_grad():
        assert run.held_out("validation_loss")[-1] == pytest.approx(
            loss_of(model, tokenizer, held_out).item(), abs=1e-6
        )
    check(run.folder.root)


@pytest.fixture(scope="module")
def qwen(workshop: Workshop) -> Run:
    """LoRA on attention, experts and routers; the chosen answer is always the same."""
    return workshop.run("reward", "qwen3_moe", dpo_rows(16), dpo_rows(8, 100),
                        adapter={"apply_lora_to_mlp": True}, options={"save_merged": True},
                        moe={"train_router": True, "router_aux_loss_coef": 0.01},
                        training={"n_epochs": 6, "batch_size": BATCH})  # fmt: skip


def test_a_job_learns_the_order_of_held_out_pairs(qwen: Run) -> None:
    assert qwen.exit_code == COMPLETED, qwen.reason
    assert qwen.held_out("rewards/accuracies")[-1] == 1 > qwen.held_out("rewards/accuracies")[0]
    assert qwen.held_out("rewards/margins")[-1] > 1
    assert qwen.held_out("perplexity")[0] == pytest.approx(2, abs=0.2), "a guess between two"
    assert qwen.held_out("perplexity")[-1] < 1.4
    for step in qwen.events("step"):
        assert step.metrics["rewards/margins"] == pytest.approx(
            step.metrics["rewards/chosen"] - step.metrics["rewards/rejected"], abs=1e-5
        )
        assert step.metrics["loss"] == pytest.approx(
            step.metrics["preference_loss"] + 0.01 * step.metrics["aux_loss"], rel=1e-5
        )
    assert len(qwen.events("routing")) == len(qwen.events("step"))


def test_experts_and_the_head_train_and_are_saved(qwen: Run) -> None:
    adapter = qwen.adapter()
    moved = [name for name, weight in adapter.items() if "experts" in name and "lora_B" in name and weight.any()]
    assert len(moved) == 4, "two matrices in each of two layers"
    assert [name for name in adapter if name.endswith("score.weight")] == ["base_model.model.score.weight"]
    assert qwen.resolved["adapter"]["by_group"]["new head"] == adapter["base_model.model.score.weight"].numel()
    check(qwen.folder.root)


def graded(folder: Path) -> tuple[list[float], list[float]]:
    """The values that the grader gives to chosen and rejected answers of pairs that no job has seen."""
    grader = RewardModel.model_validate({"type": "reward_model", "name": "taste", "model": str(folder)})
    model, tokenizer = load_classifier(str(folder), "fp32", torch.device("cpu"), "model")
    made = RewardModelGrader(grader, model, tokenizer)
    found = []
    for answer in ("chosen", "rejected"):
        samples = [
            Sample(item={"messages": row["prompt"]}, output_text=row[answer][0]["content"]) for row in dpo_rows(8, 200)
        ]
        found.append([outcome.value for outcome in made.grade(samples)])
    return found[0], found[1]


def test_the_grader_ranks_with_what_was_saved(qwen: Run) -> None:
    chosen, rejected = graded(qwen.folder.artifacts / "merged")
    assert all(good > bad for good, bad in zip(chosen, rejected, strict=True))


@pytest.mark.parametrize("nested", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_a_base_in_four_bits(workshop: Workshop, nested: bool) -> None:
    """The head stays whole and trains; the adapter is checked again on codes, and merged into the 16-bit weights."""
    run = workshop.run("reward", "qwen3_moe", dpo_rows(16), dpo_rows(8, 100),
                       adapter={"apply_lora_to_mlp": True, "quantize_base": True, "quantize_scales": nested},
                       options={"save_merged": True}, training={"n_epochs": 6, "batch_size": BATCH})  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    assert run.held_out("rewards/accuracies")[-1] == 1 > run.held_out("rewards/accuracies")[0]
    adapter = run.adapter()
    assert adapter["base_model.model.score.weight"].dtype == torch.float32
    assert run.resolved["adapter"]["by_group"]["new head"] == adapter["base_model.model.score.weight"].numel()
    found = check(run.folder.root)
    assert found.rounding_of_base is not None
    chosen, rejected = graded(run.folder.artifacts / "merged")
    assert all(good > bad for good, bad in zip(chosen, rejected, strict=True))


def test_a_family_without_a_classifier_is_refused_by_name(workshop: Workshop) -> None:
    run = workshop.run("reward", "olmoe")
    assert run.exit_code == FAILED
    assert "(model_type 'olmoe') can't become a reward model" in run.reason
    assert "qwen3_moe" in run.reason
