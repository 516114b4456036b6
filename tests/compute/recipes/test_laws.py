"""The figures of jobs, computed a second time by hand: a row at a time, from the adapters that a job saved.

Most need steps of several micro-batches, evaluations of several batches, or a policy that has left its reference: where
there is one batch, or the policy is the reference still, a wrong mean or a missing term looks right.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.planning.throughput import StepFlops, count_flops
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.compute.planning.test_throughput import mixtral
from tests.compute.recipes.test_dpo import log_prob
from tests.compute.recipes.test_sft import mean_nll
from tests.support.training_support import Row, Run, Workshop, _write, dpo_rows, said, workshop

__all__ = ["workshop"]

KEPT = {"dataset_id": "kept", "validation_dataset_id": "kept-held-out"}
LINES = (
    "Yes.",
    "A letter to a friend, about the garden in spring.",
    "Five and three, in one word.",
    "Paris, in France.",
)


def uneven(count: int, first: int, topic: str) -> list[Row]:
    """Rows of very different lengths, so that a mean of means is wrong."""
    return [
        {
            "messages": [
                said("user", f"{topic} {i}" + ", please" * (i % 4)),
                said("assistant", LINES[i % 4] * (i % 3 + 1)),
            ]
        }
        for i in range(first, first + count)
    ]


def loaded(folder: Path, adapter: Path | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model as any user would load it, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return PeftModel.from_pretrained(model, adapter).eval() if adapter else model, AutoTokenizer.from_pretrained(folder)


def completed(run: Run) -> Run:
    assert run.exit_code == COMPLETED, run.reason
    return run


# The balance terms' weight in a step of several micro-batches.

BALANCE: list[tuple[str, str, dict[str, Any]]] = [
    ("sft", "mixtral", {"router_z_loss_coef": 0.5, "router_aux_loss_coef": 0.0}),
    ("sft", "llama4_text", {"router_aux_loss_coef": 0.5}),  # it computes none, so ours
    ("sft", "mixtral", {"router_aux_loss_coef": 0.5, "moe_load_balancing": "gshard"}),
    ("sft", "mixtral", {"router_aux_loss_coef": 0.5}),  # the model's
    ("dpo", "mixtral", {"router_z_loss_coef": 0.5, "router_aux_loss_coef": 0.0}),
    ("dpo", "mixtral", {"router_aux_loss_coef": 0.5, "moe_load_balancing": "gshard"}),
    ("dpo", "mixtral", {"router_aux_loss_coef": 0.5}),
    ("circuit_breaker", "mixtral", {"router_z_loss_coef": 0.5}),
    ("circuit_breaker", "mixtral", {"router_aux_loss_coef": 0.5}),
]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("recipe", "family", "moe"), BALANCE)
def test_a_steps_loss_is_its_parts(
    workshop: Workshop, recipe: str, family: str, moe: dict[str, Any], accumulation: int
) -> None:
    """The loss without balance terms is measured separately: it equals that of the same step with no balance term."""
    rows = dpo_rows(8) if recipe == "dpo" else uneven(8, 0, "Tell of")
    common: dict[str, Any] = {
        "data": {"shuffle": False, "validation_dataset_id": None}, "options": {"validation_split": 0},
        "training": {"batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation},
    }  # fmt: skip
    bare = {"sft": "ce", "dpo": "preference_loss", "circuit_breaker": "breaker_loss"}[recipe]
    kept = {"circuit_breaker": {"retain": {"dataset_id": "kept"}}} if recipe == "circuit_breaker" else {}
    run = completed(workshop.run(recipe, family, rows, moe={"train_router": True, **moe}, **common, **kept))
    (step,) = [event.metrics for event in run.events("step")]
    terms = [("aux_loss", moe.get("router_aux_loss_coef", 0)), ("router_z_loss", moe.get("router_z_loss_coef", 0))]
    balance = sum(coefficient * step[name] for name, coefficient in terms if coefficient)
    assert balance > 0.05
    assert step["loss"] == pytest.approx(step[bare] + balance, rel=1e-5)
    if recipe == "sft":
        assert step["ce"] == pytest.approx(mean_nll(*loaded(workshop.model(family)), rows), abs=2e-5)
    else:
        # The breaker's coefficient of rerouting in step 1 of 1 is half of alpha; its cosines are 1, its distances 0.
        assert step[bare] == pytest.approx(math.log(2) if recipe == "dpo" else 5.0, abs=1e-4)


def test_a_dense_models_step_is_over_all_its_tokens(workshop: Workshop) -> None:
    """Without routers, where the loss takes another path through the trainer: 8 rows in micro-batches of 2."""
    rows = uneven(8, 0, "Tell of")
    training = {"batch_size": 2, "gradient_accumulation_steps": 4}
    run = completed(workshop.run("sft", "llama", rows, training=training))
    assert run.steps("loss") == pytest.approx([mean_nll(*loaded(workshop.model("llama")), rows)], abs=2e-5)


# Held-out figures over several batches, the last of them smaller.


def test_held_out_loss_is_over_all_tokens_of_all_batches(workshop: Workshop) -> None:
    held_out = uneven(5, 40, "What of")
    run = completed(workshop.run("sft", "mixtral", validation=held_out, training={"batch_size": 2}))
    folder = workshop.model("mixtral")
    for figure, adapter in ((0, None), (-1, run.folder.adapter)):
        nll = mean_nll(*loaded(folder, adapter), held_out)
        assert run.held_out("validation_loss")[figure] == pytest.approx(nll, abs=2e-5)
        assert run.held_out("perplexity")[figure] == pytest.approx(math.exp(nll), rel=1e-4)


def test_held_out_preferences_are_over_all_pairs_and_perplexity_is_of_the_chosen_answers(workshop: Workshop) -> None:
    held_out: list[Row] = [
        {
            "prompt": [said("user", f"What of {i}?")],
            "chosen": [said("assistant", LINES[i % 4] * (i % 3 + 1))],
            "rejected": [said("assistant", LINES[(i + 1) % 4])],
        }
        for i in range(5)
    ]
    run = completed(workshop.run("dpo", "mixtral", validation=held_out, beta=0.3, training={"batch_size": 2}))
    model, tokenizer = loaded(workshop.model("mixtral"), run.folder.adapter)
    losses, chosen, tokens = [], 0.0, 0
    for row in held_out:
        policy = [log_prob(model, tokenizer, row, column) for column in ("chosen", "rejected")]
        with model.disable_adapter():
            reference = [log_prob(model, tokenizer, row, column) for column in ("chosen", "rejected")]
        margin = 0.3 * (policy[0] - reference[0] - policy[1] + reference[1])
        losses.append(math.log1p(math.exp(-margin)))
        chosen += policy[0]
        tokens += len(tokenizer(row["chosen"][0]["content"], add_special_tokens=False)["input_ids"]) + 1  # its end
    assert max(losses) > min(losses) + 0.02
    assert run.held_out("validation_loss")[-1] == pytest.approx(sum(losses) / 5, abs=1e-4)
    assert run.held_out("perplexity")[-1] == pytest.approx(math.exp(-chosen / tokens), rel=1e-4)


# A circuit breaker's losses once it has moved.


def distance_of(one: Tensor, other: Tensor, relative: bool = False) -> Tensor:
    """(T, D), (T, D) -> (T,)."""
    far = (one - other).norm(dim=-1)
    return far / other.norm(dim=-1) if relative else far


class Moved:
    """States of a model with and without an adapter, a row at a time: without padding, by `output_hidden_states`."""

    def __init__(self, folder: Path, adapter: Path, blocks: Sequence[int]) -> None:
        self.model, self.tokenizer = loaded(folder, adapter)
        self.blocks = blocks

    def states(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(T, D) of each block, with the adapter and without."""
        with torch.no_grad():
            mine = self.model(ids, output_hidden_states=True).hidden_states
            with self.model.disable_adapter():
                base = self.model(ids, output_hidden_states=True).hidden_states
        return [mine[block + 1][0] for block in self.blocks], [base[block + 1][0] for block in self.blocks]

    def reroute(self, rows: list[Row]) -> float:
        """Mean of relu(cosine) over blocks and the answers' tokens."""
        return torch.stack(self.cosines(rows)).relu().mean().item()

    def cosines(self, rows: list[Row]) -> list[Tensor]:
        """Of the answers' tokens, (T,) for each block."""
        return [torch.cosine_similarity(one, other, dim=-1) for one, other in self.answers(rows)]

    def answers(self, rows: list[Row]) -> list[tuple[Tensor, Tensor]]:
        """States (T, D) of all answers' tokens for each block, with the adapter and without."""
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.blocks]
        for row in rows:
            asked = self.tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
            before = len(self.tokenizer(asked, add_special_tokens=False)["input_ids"])
            mine, base = self.states(self.ids(self.answered(row)))
            for its, one, other in zip(found, mine, base, strict=True):
                its.append((one[before:], other[before:]))
        return [(torch.cat([one for one, _ in its]), torch.cat([other for _, other in its])) for its in found]

    def answered(self, row: Row) -> str:
        """A break row, up to its answer's end."""
        asked = self.tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        return f"{asked}{row['messages'][1]['content']}<|im_end|>"

    def distance(self, rows: list[Row], relative: bool = False) -> float:
        """Mean distance over all tokens; relative: of each token in lengths of its base state."""
        found = []
        for row in rows:
            mine, base = self.states(self.ids(self.tokenizer.apply_chat_template(row["messages"], tokenize=False)))
            found += [distance_of(one, other, relative) for one, other in zip(mine, base, strict=True)]
        return torch.cat(found).mean().item()

    def kl(self, rows: list[Row]) -> float:
        """Mean over all tokens of KL(base || model)."""
        found = []
        for row in rows:
            ids = self.ids(str(self.tokenizer.apply_chat_template(row["messages"], tokenize=False)))
            with torch.no_grad():
                mine = self.model(ids).logits[0].log_softmax(-1)
                with self.model.disable_adapter():
                    base = self.model(ids).logits[0].log_softmax(-1)
            found.append((base.exp() * (base - mine)).sum(-1))
        return torch.cat(found).mean().item()

    def lengths(self, breaks: list[Row], kept: list[Row]) -> list[int]:
        """Tokens of each row, the question's too."""
        texts = [self.answered(row) for row in breaks]
        texts += [str(self.tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in kept]
        return [self.ids(text).shape[1] for text in texts]

    def ids(self, text: str) -> Tensor:
        """(1, T)."""
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])


def breaker_on(
    workshop: Workshop, sets: dict[str, list[Row]], block: dict[str, Any] | None = None, **blocks: Any
) -> Run:
    """A job over its own sets of rows; `block` overrides its `circuit_breaker` block."""
    block = block or {}
    folder: JobFolder = workshop.job(
        "circuit_breaker", workshop.model("mixtral", num_hidden_layers=4), optimizer={"lr": 2e-2},
        data={"shuffle": False}, circuit_breaker={"safe": {**KEPT, "ratio": 0.5}, **block}, **blocks,
    )  # fmt: skip
    for name, rows in sets.items():
        path = {"break": folder.train_rows, "break-validation": folder.validation_rows}.get(name) or folder.rows(name)
        _write(path, rows)
    return completed(workshop.again(Run(folder, 0)))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_breakers_second_step_by_hand(workshop: Workshop, accumulation: int) -> None:
    """Epochs of one step, of 4 break rows, 4 to retain and 2 safe ones; the first epoch's checkpoint is its policy."""
    rows = {"break": uneven(4, 0, "Break"), "retain": uneven(8, 10, "Keep this one"), "safe": uneven(4, 31, "Say")}
    training = {"batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation, "n_epochs": 2}
    run = breaker_on(workshop, rows, training=training)
    step = run.events("step")[1].metrics
    moved = Moved(
        workshop.model("mixtral", num_hidden_layers=4), run.folder.root / "checkpoints" / "epoch-1", blocks=(0, 1)
    )
    reroute = moved.reroute(rows["break"])
    retain = moved.distance(rows["retain"][4:] + rows["safe"][2:])
    assert retain > 0.05
    assert abs(retain - moved.distance(rows["retain"][4:])) > 1e-2 * retain, "safe rows would make a difference"
    assert step["reroute_loss"] == pytest.approx(reroute, abs=1e-4)
    assert step["retain_loss"] == pytest.approx(retain, rel=1e-4)
    assert step["loss"] == pytest.approx(5 * reroute + 5 * retain, rel=1e-4)
    halves = ((slice(0, 4), slice(0, 2)), (slice(4, 8), slice(2, 4)))
    steps = [moved.lengths(rows["break"], rows["retain"][kept] + rows["safe"][safe]) for kept, safe in halves]
    assert_counted(run, count_flops(*mixtral(4), references=1, head=False, layers=2), steps)  # the upper two never run


def test_a_breakers_held_out_figures_by_hand(workshop: Workshop) -> None:
    """9 rows in batches of 4."""
    rows = {"break": uneven(8, 0, "Break"), "retain": uneven(8, 10, "Keep"), "safe": uneven(4, 31, "Say")}
    held_out = {name: uneven(3, 60 + at, f"{name} it") for at, name in enumerate(rows)}
    run = breaker_on(workshop, {**rows, **{f"{name}-validation": its for name, its in held_out.items()}})
    folder = workshop.model("mixtral", num_hidden_layers=4)
    moved = Moved(folder, run.folder.adapter, blocks=(0, 1))
    kept = held_out["retain"] + held_out["safe"]
    assert run.held_out("positive_cosine/break")[-1] == pytest.approx(moved.reroute(held_out["break"]), abs=1e-4)
    for block, cosines in zip(moved.blocks, moved.cosines(held_out["break"]), strict=True):
        assert run.held_out(f"cosine/break/{block}")[-1] == pytest.approx(cosines.mean().item(), abs=1e-4)
    for part in ("retain", "safe"):
        assert run.held_out(f"distance/{part}")[-1] == pytest.approx(moved.distance(held_out[part]), rel=1e-4)
        in_lengths = moved.distance(held_out[part], relative=True)
        assert run.held_out(f"relative_distance/{part}")[-1] == pytest.approx(in_lengths, rel=1e-4)
    answers = moved.answers(held_out["break"])
    for name, relative in (("distance", False), ("relative_distance", True)):
        far = torch.stack([distance_of(one, other, relative) for one, other in answers]).mean().item()
        assert run.held_out(f"{name}/break")[-1] == pytest.approx(far, rel=1e-4)
    loss = 5 * moved.reroute(held_out["break"]) + 5 * moved.distance(kept)
    assert run.held_out("validation_loss")[-1] == pytest.approx(loss, rel=1e-4)
    nll = mean_nll(moved.model, moved.tokenizer, kept)
    assert run.held_out("perplexity")[-1] == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_repbends_second_step_by_hand(workshop: Workshop, accumulation: int) -> None:
    """As above: each of its parts is over the whole step's tokens."""
    rows = {"break": uneven(4, 0, "Break"), "retain": uneven(8, 10, "Keep this one"), "safe": uneven(4, 31, "Say")}
    block = {"variant": "repbend", "repbend": {"push": 0.7, "gather": 0.2, "kl": 0.1}}
    training = {"batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation, "n_epochs": 2}
    run = breaker_on(workshop, rows, block, training=training)
    step = run.events("step")[1].metrics
    moved = Moved(
        workshop.model("mixtral", num_hidden_layers=4), run.folder.root / "checkpoints" / "epoch-1", blocks=(0, 1)
    )
    kept = rows["retain"][4:] + rows["safe"][2:]
    pushed = torch.stack([distance_of(one, other) for one, other in moved.answers(rows["break"])]).mean().item()
    expected = {"push_distance": pushed, "retain_distance": moved.distance(kept), "kl": moved.kl(kept)}
    assert min(expected.values()) > 1e-4
    for name, value in expected.items():
        assert step[name] == pytest.approx(value, rel=1e-3), name


def test_repbends_held_out_loss_is_of_its_distances(workshop: Workshop) -> None:
    """1/2 ||v_s|| - alpha ||v_u||, alike for all evaluations; coefficients are 1 from the first step to the last."""
    block = {"variant": "repbend", "repbend": {"push": 0.7, "gather": 0.2, "kl": 0.1}, "retain": KEPT}
    run = completed(workshop.run("circuit_breaker", "mixtral", circuit_breaker=block, optimizer={"lr": 2e-2}))
    kept, broken = (run.held_out(f"distance/{part}")[-1] for part in ("retain", "break"))
    assert min(kept, broken) > 1e-3
    assert run.held_out("validation_loss")[-1] == pytest.approx(kept / 2 - 0.7 * broken, rel=1e-4)
    for name in ("reroute_coefficient", "retain_coefficient"):
        assert set(run.steps(name)) == {1.0}
    last = run.events("step")[-1].metrics
    assert last["loss"] == pytest.approx(
        last["retain_distance"] / 2 + 0.1 * last["kl"] - 0.7 * last["push_distance"] - 0.2 * last["alike"], rel=1e-4
    )


# Tokens and operations of a step.


def assert_counted(run: Run, work: StepFlops, steps: Sequence[Sequence[int]]) -> None:
    """Operations per token, without a clock, match each step's rows; lengths are in tokens."""
    for event, lengths in zip(run.events("step"), steps, strict=True):
        told = event.metrics["tflops_per_device"] * 1e12 / event.metrics["tokens_per_s"]
        assert told == pytest.approx(work.of(lengths) / sum(lengths), rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_a_steps_tokens_and_operations_are_its_rows(workshop: Workshop, recipe: str, accumulation: int) -> None:
    """Questions count too, padding does not; for a preference both answers count, and the reference's pass."""
    rows = dpo_rows(8) if recipe == "dpo" else uneven(8, 0, "Tell of")
    training = {"batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    run = completed(workshop.run(recipe, "mixtral", rows, data={"shuffle": False}, training=training))
    _, tokenizer = loaded(workshop.model("mixtral"))

    def lengths(row: Row) -> list[int]:
        if recipe == "sft":
            texts = [str(tokenizer.apply_chat_template(row["messages"], tokenize=False))]
        else:
            asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            texts = [f"{asked}{row[column][0]['content']}<|im_end|>" for column in ("chosen", "rejected")]
        return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    steps = [[length for row in part for length in lengths(row)] for part in (rows[:4], rows[4:])]
    assert_counted(run, count_flops(*mixtral(4), references=int(recipe == "dpo")), steps)


# Schedules.


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_cosine_learning_rate_is_a_cosine(workshop: Workshop, warmup: int) -> None:
    """Half a wave from the peak to 0 over the steps after the warm-up: 1/2 (1 + cos(pi t / T))."""
    run = completed(
        workshop.run(
            "sft", "llama", training={"batch_size": 2}, optimizer={"lr": 0.01, "num_warmup_steps": warmup},
            options={"lr_scheduler": "cosine"},
        )
    )  # fmt: skip
    rising = [0.01 * step / warmup for step in range(warmup)]
    falling = [0.005 * (1 + math.cos(math.pi * t / (8 - warmup))) for t in range(8 - warmup)]
    assert run.steps("learning_rate") == pytest.approx(rising + falling)


def test_a_breakers_cosine_schedules_are_cosines(workshop: Workshop) -> None:
    """At the quarters of a wave, where a line would have other values."""
    paper = breaker_on(workshop, {"break": uneven(16, 0, "Break")})
    assert paper.steps("reroute_coefficient") == pytest.approx([10 * (1 - t / 8) for t in (1, 2, 3, 4)])
    risen = [(1 - math.cos(math.pi * t / 8)) / 2 for t in (1, 2, 3, 4)]
    common = {"retain": KEPT, "alpha": 8}
    curved = completed(workshop.run("circuit_breaker", "mixtral", circuit_breaker={**common, "schedule": "cosine"}))
    assert curved.steps("reroute_coefficient") == pytest.approx([8 * (1 - p) for p in risen])
    assert curved.steps("retain_coefficient") == pytest.approx([8 * p for p in risen])
    curves = {"reroute_curve": {"start": 8, "end": 4, "schedule": "cosine"}, "retain_curve": {"start": 1, "end": 5}}
    dual = completed(
        workshop.run("circuit_breaker", "mixtral", circuit_breaker={"retain": KEPT, "weighting": "dual", **curves})
    )
    whole = [(1 - math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3, 4)]
    assert dual.steps("reroute_coefficient") == pytest.approx([8 - 4 * p for p in whole])
    assert dual.steps("retain_coefficient") == pytest.approx([2, 3, 4, 5])


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_a_model_whose_config_asks_for_router_logits_trains_the_same(workshop: Workshop, family: str) -> None:
    """The job decides whether a model returns router logits: some compute no balance loss, and fail in forward."""
    runs = [
        completed(
            workshop.run("sft", workshop.model(family, output_router_logits=asked), moe={"router_aux_loss_coef": 0})
        )
        for asked in (False, True)
    ]
    for name in ("loss", "ce"):
        assert runs[1].steps(name) == runs[0].steps(name)
