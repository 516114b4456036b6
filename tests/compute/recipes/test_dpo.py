"""Laws of the DPO recipe, on tiny models."""

import math
import re
import shutil
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.spec import DPOLoss
from tests.support import tiny_models
from tests.support.template_tokenizers import published
from tests.support.training_support import Run, Workshop, dpo_rows, said, workshop

__all__ = ["workshop"]

# Each loss before the first step, when policy and reference are equal, so every log-ratio is 0; beta 0.1.
FIRST_LOSS = {
    "sigmoid": math.log(2), "hinge": 1.0, "ipo": (1 / (2 * 0.1)) ** 2, "robust": math.log(2),
    "bco_pair": 2 * math.log(2), "sppo_hard": 2 * (0.5 / 0.1) ** 2, "apo_zero": 1.0, "sigmoid_norm": math.log(2),
}  # fmt: skip


def log_prob(model: Any, tokenizer: Any, row: Any, column: str) -> float:
    """Log-probability of one answer, alone in its batch."""
    asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    before = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    text = asked + row[column][0]["content"] + "<|im_end|>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(log_probs.gather(-1, ids[0, 1:, None])[before - 1 :].sum())


@pytest.fixture(scope="module")
def qwen(workshop: Workshop) -> Run:
    return workshop.run("dpo", "qwen3_moe", training={"n_epochs": 2}, beta=0.3, moe={"train_router": True})


def test_loss_and_rewards_are_those_of_the_paper(qwen: Run, workshop: Workshop) -> None:
    """Held-out figures compared with eq. 7 of arXiv 2305.18290, computed a row at a time from the saved adapter."""
    assert qwen.exit_code == COMPLETED, qwen.reason
    folder = workshop.model("qwen3_moe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    tuned = PeftModel.from_pretrained(base, qwen.folder.adapter).eval()
    losses, margins = [], []
    for row in dpo_rows(4, first=100):
        policy = log_prob(tuned, tokenizer, row, "chosen") - log_prob(tuned, tokenizer, row, "rejected")
        with tuned.disable_adapter():
            reference = log_prob(tuned, tokenizer, row, "chosen") - log_prob(tuned, tokenizer, row, "rejected")
        margins.append(0.3 * (policy - reference))
        losses.append(-logsigmoid(torch.tensor(margins[-1])).item())
    assert qwen.held_out("validation_loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert qwen.held_out("validation_loss")[-1] == pytest.approx(sum(losses) / 4, abs=1e-4)
    assert qwen.held_out("rewards/margins")[-1] == pytest.approx(sum(margins) / 4, abs=1e-3)
    assert qwen.held_out("validation_loss")[-1] < 0.95 * math.log(2)


def test_every_step_tells_rewards_and_routers(qwen: Run) -> None:
    for step in qwen.events("step"):
        wanted = {
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "aux_loss",
            "grad_norm",
        }
        assert wanted <= step.metrics.keys()
        assert step.metrics["loss"] == pytest.approx(
            step.metrics["preference_loss"] + 0.001 * step.metrics["aux_loss"], rel=1e-5
        )
    assert qwen.steps("preference_loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert [event.step for event in qwen.events("routing")] == [1, 2, 3, 4]


def test_an_adapters_reference_is_the_adapter_off(qwen: Run) -> None:
    assert qwen.resolved["reference"] == "the adapter off"
    assert qwen.resolved["reference_computed_ahead"] is True  # an epoch repeats
    assert not [name for name in qwen.adapter() if "ref" in name.split(".")]


@pytest.mark.parametrize("loss", get_args(DPOLoss))
def test_every_loss_trains_and_starts_where_it_should(workshop: Workshop, loss: str) -> None:
    options = {"label_smoothing": 0.1} if loss in ("exo_pair", "robust") else {}
    run = workshop.run("dpo", "llama", dpo_rows(8), loss_type=loss, options=options)
    assert run.exit_code == COMPLETED, run.reason
    (first,) = run.steps("preference_loss")
    assert math.isfinite(first)
    assert run.steps("grad_norm")[0] > 0
    if loss in FIRST_LOSS:
        assert first == pytest.approx(FIRST_LOSS[loss], rel=1e-3)


def test_reference_computed_ahead_changes_nothing(workshop: Workshop) -> None:
    runs = [
        workshop.run("dpo", "mixtral", options={"precompute_ref_log_probs": ahead}, training={"batch_size": 4})
        for ahead in (True, False)
    ]
    assert runs[0].steps("loss") == pytest.approx(runs[1].steps("loss"), abs=1e-5)
    assert runs[0].held_out("validation_loss") == pytest.approx(runs[1].held_out("validation_loss"), abs=1e-5)


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "together"])
@pytest.mark.parametrize("adapter", [{"rank": 2}, None], ids=["lora", "whole"])
def test_a_model_whose_backbone_is_not_found_has_a_reference(
    workshop: Workshop, adapter: dict[str, Any] | None, ahead: bool
) -> None:
    """Llama 4: TRL's head finds no hidden states, neither of the policy nor of the reference, whenever that runs."""
    run = workshop.run("dpo", "llama4_text", dpo_rows(4), dpo_rows(2, 50), adapter=adapter,
                       options={"precompute_ref_log_probs": ahead}, training={"max_steps_per_epoch": 1})  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    assert run.held_out("validation_loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert run.held_out("validation_loss")[1] != run.held_out("validation_loss")[0]


@pytest.mark.parametrize("ahead", [True, False])
def test_full_training_has_a_reference_that_stays(workshop: Workshop, ahead: bool) -> None:
    """Two batches, so that the second step's rewards are from a model that has changed."""
    run = workshop.run("dpo", "granitemoe", adapter=None, options={"precompute_ref_log_probs": ahead},
                       optimizer={"lr": 1e-3}, training={"n_epochs": 2})  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    assert run.resolved["reference"] == ("the untrained model" if ahead else "a second copy")
    assert run.steps("rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    assert run.steps("rewards/margins")[-1] > 0.05
    assert run.manifest.artifacts[-1].kind == "model"


@pytest.fixture(scope="module")
def robust(workshop: Workshop) -> Run:
    return workshop.run("dpo", "mixtral", loss_type="robust", training={"batch_size": 4})


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.5},
        {"options": {"label_smoothing": 0.3}},
        {"loss_type": "ipo"},
        {"moe": {"router_aux_loss_coef": 1.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_no_setting_is_read_by_nobody(workshop: Workshop, robust: Run, changes: dict[str, Any]) -> None:
    asked = {"loss_type": "robust", **changes}
    changed = workshop.run("dpo", "mixtral", training={"batch_size": 4}, **asked)
    assert changed.exit_code == COMPLETED, changed.reason
    assert changed.steps("loss")[-1] != pytest.approx(robust.steps("loss")[-1], rel=1e-3)


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES])
def test_every_family_prefers_what_was_chosen(workshop: Workshop, family: str) -> None:
    run = workshop.run("dpo", family, dpo_rows(8), dpo_rows(2, 50))
    assert run.exit_code == COMPLETED, run.reason
    before, after = run.held_out("validation_loss")
    assert after < before


def tool_pairs(count: int, first: int = 0) -> list[Any]:
    """Pairs whose answers are a call, its result, and an answer."""

    def answer(port: str, result: str, text: str) -> list[dict[str, Any]]:
        made = {"type": "function", "function": {"name": "tide", "arguments": {"port": port}}}
        return [
            {"role": "assistant", "content": None, "tool_calls": [made]}, said("tool", result), said("assistant", text)
        ]  # fmt: skip

    return [
        {
            "prompt": [said("user", f"Tide {number}?")],
            "chosen": answer("Brest", "qresultq five", "The answer is five."),
            "rejected": answer("Kiel", "qresultq", "No.") if number % 2 else [said("assistant", "With care.")],
        }
        for number in range(first, first + count)
    ]


def answers_log_prob(model: Any, tokenizer: Any, row: Any, column: str) -> float:
    """Log-probability of the assistant's turns of an answer, given all before each."""
    asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([*row["prompt"], *row[column]], tokenize=False)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([found["input_ids"]])
    turns = re.compile(r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>", re.DOTALL)
    spans = [match.span() for match in turns.finditer(text) if match.start() >= len(asked)]
    assert not any("qresultq" in text[start:end] for start, end in spans)
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    offsets = found["offset_mapping"][1:]
    learnt = torch.tensor([any(start <= begin < end for start, end in spans) for begin, _ in offsets])
    return float(log_probs[learnt].sum())


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "together"])
def test_answers_of_several_messages_are_compared_without_the_results_of_tools(workshop: Workshop, ahead: bool) -> None:
    folder = workshop.root / "models" / "with tools"
    if not folder.is_dir():
        shutil.copytree(workshop.model("llama"), folder)
        tokenizer = tiny_models.tokenizer()
        tokenizer.chat_template = published()["qwen2_5"]
        tokenizer.save_pretrained(folder)
    run = workshop.run("dpo", folder, tool_pairs(8), tool_pairs(4, 100), options={
        "max_length": 512, "precompute_ref_log_probs": ahead}, training={"n_epochs": 2})  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder).eval(), run.folder.adapter).eval()
    margins = []
    for row in tool_pairs(4, 100):
        policy, reference = 0.0, 0.0
        for column, sign in (("chosen", 1), ("rejected", -1)):
            policy += sign * answers_log_prob(tuned, tokenizer, row, column)
            with tuned.disable_adapter():
                reference += sign * answers_log_prob(tuned, tokenizer, row, column)
        margins.append(0.1 * (policy - reference))
    assert run.held_out("rewards/margins")[-1] == pytest.approx(sum(margins) / 4, abs=1e-3)
    assert run.held_out("validation_loss")[-1] < run.held_out("validation_loss")[0]
