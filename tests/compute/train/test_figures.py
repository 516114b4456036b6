"""Every figure is a mean over rows or tokens, whatever micro-batches they are in: small models, our own derivations."""

import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.compute.runtime.peers import ALONE
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.compute.train.step_figures import WeightedMeans
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.support.training_support import Row, Run, Workshop, dpo_rows, said, sft_rows, workshop

__all__ = ["workshop"]

SGD: dict[str, Any] = {"optimizer_type": "sgd", "lr": 1e-2}
# Figures of the clock and the machine are not compared.
MEASURED = ("tokens_per_s", "tflops", "memory_bytes", "mfu")


def pair(asked: str, chosen: str, rejected: str) -> Row:
    return {
        "prompt": [said("user", asked)],
        "chosen": [said("assistant", chosen)],
        "rejected": [said("assistant", rejected)],
    }


UNEQUAL = [
    pair("river stone", "light", "light river"),
    pair("query paper green seven north table river model", "paper green seven north", "paper green seven north model"),
    pair("north", "table green", "table green stone"),
    pair("seven light", "river model stone light query paper green", "river model stone light query paper green light"),
]
HELD_OUT = [
    pair("which colour is it", "blue as the sky", "red"),
    pair("and then", "red", "blue as the sky"),
    pair("the capital of France, in one word", "The capital of France is Paris, on a river.", "blue as the sky"),
]
SPLITS = {"4x1": (4, 1), "1x4": (1, 4), "3x2": (3, 2)}


def dpo(workshop: Workshop, split: str, family: str = "llama", **blocks: Any) -> Run:
    """The four pairs in one step, by pairs in a micro-batch and number of micro-batches."""
    batch, accumulated = SPLITS[split]
    options = {"max_grad_norm": 0, "precompute_ref_log_probs": False, **blocks.pop("options", {})}
    run = workshop.run(
        "dpo", family, UNEQUAL, HELD_OUT, optimizer=SGD, data={"shuffle": False}, options=options,
        training={"batch_size": batch, "gradient_accumulation_steps": accumulated, "n_epochs": 2}, **blocks,
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    return run


def figures(run: Run, kind: str, index: int) -> dict[str, float]:
    metrics = run.events(kind)[index].metrics
    return {name: value for name, value in metrics.items() if not name.startswith(MEASURED)}


LOSSES = ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "nca_pair", "bco_pair", "discopop", "apo_down"]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_preference_step_is_over_its_pairs(workshop: Workshop, loss: str) -> None:
    """Three pairs and one, four times one, and four: the same loss, gradient and figures, and the same second step."""
    whole, *others = (dpo(workshop, split, loss_type=loss) for split in SPLITS)
    for run in others:
        for step in (0, 1):
            assert figures(run, "step", step) == pytest.approx(figures(whole, "step", step), rel=2e-5, abs=2e-6)


def test_with_its_reference_computed_ahead(workshop: Workshop) -> None:
    whole = dpo(workshop, "4x1")
    ahead = dpo(workshop, "3x2", options={"precompute_ref_log_probs": True})
    for step in (0, 1):
        assert figures(ahead, "step", step) == pytest.approx(figures(whole, "step", step), rel=2e-5, abs=2e-6)
    assert figures(ahead, "evaluation", -1) == pytest.approx(figures(whole, "evaluation", -1), rel=2e-5, abs=2e-6)


def test_a_preference_gradient_is_that_of_an_own_loop(workshop: Workshop) -> None:
    """The first step's gradient of all weights, of micro-batches of 3 and 1 pairs, from the paper's eq. 7."""
    run = workshop.run(
        "dpo", "llama", UNEQUAL, HELD_OUT, optimizer=SGD, data={"shuffle": False}, adapter=None, beta=0.3,
        options={"max_grad_norm": 0}, training={"batch_size": 3, "gradient_accumulation_steps": 2},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    folder = workshop.model("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    loss = torch.zeros(())
    for row in UNEQUAL:  # policy and reference are equal, so only the policy's difference has a gradient
        margin = log_prob(model, tokenizer, row, "chosen") - log_prob(model, tokenizer, row, "rejected")
        loss = loss - logsigmoid(0.3 * (margin - margin.detach())) / 4
    loss.backward()
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert run.steps("grad_norm")[0] == pytest.approx(math.sqrt(squares), rel=1e-4)
    assert run.steps("loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def log_prob(model: Any, tokenizer: Any, row: Any, column: str) -> Tensor:
    asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    before = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    text = asked + row[column][0]["content"] + "<|im_end|>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[before - 1 :].sum()


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_balance_terms_of_unequal_micro_batches(workshop: Workshop, family: str) -> None:
    """The balance loss (the model's own, and ours) stays a mean over micro-batches; the z-loss is one over tokens."""
    moe = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "train_router": True}
    whole, single, split = (dpo(workshop, name, family, moe=moe) for name in ("4x1", "1x4", "3x2"))
    for run in (whole, single, split):
        told = run.events("step")[0].metrics
        assert told["loss"] == pytest.approx(
            math.log(2) + 0.5 * told["aux_loss"] + 0.1 * told["router_z_loss"], rel=1e-5
        )
        assert told["router_z_loss"] == pytest.approx(whole.steps("router_z_loss")[0], rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_the_gradient_of_a_z_loss_is_over_the_steps_tokens(workshop: Workshop, family: str) -> None:
    """With a z-loss as the main term: SFT and DPO, with rows of unequal length."""
    moe = {"router_aux_loss_coef": 0, "router_z_loss_coef": 10.0, "train_router": True}
    whole, *others = (dpo(workshop, name, family, moe=moe) for name in SPLITS)
    for run in others:
        assert run.steps("grad_norm")[0] == pytest.approx(whole.steps("grad_norm")[0], rel=1e-4)
    training = {"batch_size": 8, "gradient_accumulation_steps": 1}
    runs = [
        workshop.run("sft", family, sft_rows(8), moe=moe, optimizer=SGD, options={"max_grad_norm": 0}, training=each)
        for each in (training, {"batch_size": 3, "gradient_accumulation_steps": 3})
    ]
    assert runs[1].steps("grad_norm")[0] == pytest.approx(runs[0].steps("grad_norm")[0], rel=1e-4)


@pytest.mark.parametrize("recipe", ["sft", "dpo", "circuit_breaker"])
def test_held_out_figures_do_not_depend_on_the_batch(workshop: Workshop, recipe: str) -> None:
    """All runs train on the same one row a step; only evaluations have other batches."""
    rows = [pair("which colour", "blue as the sky", "red")] if recipe == "dpo" else sft_rows(1)
    held_out = HELD_OUT if recipe == "dpo" else sft_rows(7, first=100)[::2]
    runs = [
        workshop.run(recipe, "mixtral", rows, held_out, optimizer={"lr": 1e-2},
                     training={"batch_size": batch, "n_epochs": 3})
        for batch in (1, 2, 3)
    ]  # fmt: skip
    assert [run.exit_code for run in runs] == [COMPLETED] * 3, runs[0].reason
    one = figures(runs[0], "evaluation", -1)
    assert len(one) >= (4 if recipe == "sft" else 10)
    for run in runs[1:]:
        assert figures(run, "evaluation", -1) == pytest.approx(one, rel=5e-5, abs=5e-5)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "qwen3_moe"])
def test_the_held_out_balance_loss_is_of_all_rows_as_one_batch(workshop: Workshop, family: str) -> None:
    """The untrained model: transformers' aux loss over all rows in one batch; for DPO only the policy's."""
    rows = sft_rows(5, first=100)
    run = workshop.run("sft", family, sft_rows(1), rows, training={"batch_size": 2})
    assert run.exit_code == COMPLETED, run.reason
    folder = workshop.model(family)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        expected = float(model.eval()(**batch, output_router_logits=True).aux_loss)
    told = run.held_out("aux_loss")[0]
    assert told == pytest.approx(expected, rel=1e-5)


def test_held_out_preference_figures_by_hand(workshop: Workshop) -> None:
    """Rewards, log-probabilities, entropy, accuracy and mean logits of three pairs in batches of two, row by row."""
    run = workshop.run(
        "dpo", "llama", dpo_rows(4), HELD_OUT, optimizer={"lr": 1e-2}, beta=0.3, training={"batch_size": 2}
    )
    assert run.exit_code == COMPLETED, run.reason
    folder = workshop.model("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run.folder.adapter).eval()
    sums: dict[str, list[float]] = {}

    def add(name: str, total: float, weight: float) -> None:
        before = sums.get(name, [0.0, 0.0])
        sums[name] = [before[0] + total, before[1] + weight]

    for row in HELD_OUT:
        rewards = {}
        for column in ("chosen", "rejected"):
            logits_TV, ids_T = answer_logits(tuned, tokenizer, row, column)
            log_probs_TV = logits_TV.log_softmax(-1)
            logp = float(log_probs_TV.gather(-1, ids_T[:, None]).sum())
            with tuned.disable_adapter():
                base_TV, _ = answer_logits(tuned, tokenizer, row, column)
            rewards[column] = 0.3 * (logp - float(base_TV.log_softmax(-1).gather(-1, ids_T[:, None]).sum()))
            add(f"logps/{column}", logp, 1)
            add(f"rewards/{column}", rewards[column], 1)
            add("entropy", float(-(log_probs_TV.exp() * log_probs_TV).sum()), len(ids_T))
            add(f"logits/{column}", float(logits_TV.mean(-1).sum()), len(ids_T))
            if column == "chosen":
                add("mean_token_accuracy", float((logits_TV.argmax(-1) == ids_T).sum()), len(ids_T))
        add("rewards/margins", rewards["chosen"] - rewards["rejected"], 1)
        add("rewards/accuracies", float(rewards["chosen"] > rewards["rejected"]), 1)
    told = figures(run, "evaluation", -1)
    for name, (total, weight) in sums.items():
        assert told[name] == pytest.approx(total / weight, rel=1e-3, abs=1e-4), name
    assert told["perplexity"] == pytest.approx(
        math.exp(-sums["logps/chosen"][0] / sums["mean_token_accuracy"][1]), rel=1e-3
    )


@torch.no_grad()
def answer_logits(model: Any, tokenizer: Any, row: Any, column: str) -> tuple[Tensor, Tensor]:
    """Logits (T, V) that predict an answer's tokens (T,)."""
    asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    before = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    ids = tokenizer(asked + row[column][0]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return model(torch.tensor([ids])).logits[0, before - 1 : -1], torch.tensor(ids[before:])


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.1), ("sigmoid", 0.45), ("robust", 0.1)])
def test_label_smoothing_is_that_of_the_loss(workshop: Workshop, loss: str, smoothing: float) -> None:
    """Computed from each pair's margin.

    Of "sigmoid" Mitchell's note: cross entropy with a target of 1 - e. Of "robust" arXiv 2403.00409: an
    estimate without bias of the loss that labels without noise have.
    """
    run = workshop.run(
        "dpo", "llama", dpo_rows(8), HELD_OUT, optimizer={"lr": 2e-2}, beta=0.5, training={"n_epochs": 3},
        loss_type=loss, options={"label_smoothing": smoothing},
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    folder = workshop.model("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run.folder.adapter).eval()
    losses = []
    for row in HELD_OUT:
        with torch.no_grad():
            margin = log_prob(tuned, tokenizer, row, "chosen") - log_prob(tuned, tokenizer, row, "rejected")
            with tuned.disable_adapter():
                margin -= log_prob(tuned, tokenizer, row, "chosen") - log_prob(tuned, tokenizer, row, "rejected")
        right = 1 / (1 + math.exp(-0.5 * float(margin)))
        assert abs(margin) > 0.1, "otherwise every smoothing gives ln 2"
        if loss == "sigmoid":
            losses.append(-(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right))
        else:
            noisy = -(1 - smoothing) * math.log(right) + smoothing * math.log(1 - right)
            losses.append(noisy / (1 - 2 * smoothing))
    assert run.held_out("validation_loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert run.held_out("validation_loss")[-1] == pytest.approx(sum(losses) / 3, rel=2e-4)
    assert run.resolved["loss_type"] == loss


def test_a_repbend_step_weighs_pairs_of_rows(workshop: Workshop) -> None:
    """`alike` of 3 rows and 1 is that of the 3 rows' pairs, because the fourth has no partner, whatever its length."""
    block = {"variant": "repbend", "repbend": {"push": 0, "gather": 1.0, "kl": 0}}
    long = {"messages": [said("user", "Tell me."), said("assistant", "The answer is five, " * 8)]}

    def alike(rows: list[Row], batch: int, accumulated: int) -> float:
        run = workshop.run(
            "circuit_breaker", "mixtral", rows, data={"shuffle": False}, circuit_breaker=block,
            training={"batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps_per_epoch": 1},
        )  # fmt: skip
        assert run.exit_code == COMPLETED, run.reason
        return run.steps("alike")[0]

    assert alike([*sft_rows(3), long], 3, 2) == pytest.approx(alike(sft_rows(3), 3, 1), rel=1e-5)


def test_weighted_means() -> None:
    means = WeightedMeans()
    means.add({"a": 1.0, "b": 4.0}, {"a": 3, "b": 1})
    means.add({"a": 5.0, "b": math.nan}, {"a": 1, "b": 0})
    assert means.take(ALONE) == {"a": 2.0, "b": 4.0}
    assert means.take(ALONE) == {}
    means.add({"a": math.nan}, {"a": 0})
    assert means.take(ALONE) == {}, "no row, no mean"


def test_held_out_figures_are_means_of_sums() -> None:
    """Sums start at zero; a perplexity that is too large for a double is reported as the largest."""
    sums = HeldOut()
    assert (sums.loss, sums.weight, sums.nll, sums.tokens) == (0.0, 0.0, 0.0, 0.0)
    told = HeldOut(loss=6.0, weight=4.0, nll=3.0, tokens=2.0).over(ALONE).figures()
    assert told == pytest.approx({"validation_loss": 1.5, "perplexity": 4.4816890703})
    assert HeldOut(1.0, 1.0, 1e6, 2.0).figures()["perplexity"] == pytest.approx(1.0142320547350045e304)
