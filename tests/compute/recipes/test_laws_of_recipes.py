"""What a recipe passes to the training loop, seen before the first step; and the recipes' sums, by hand."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.data.mixture import MixtureSampler
from llama_stack_provider_moe.compute.models.backend import Transformers, Unsloth
from llama_stack_provider_moe.compute.models.hidden_states import EMBEDDINGS
from llama_stack_provider_moe.compute.models.unsloth import base as unsloth_base
from llama_stack_provider_moe.compute.planning.throughput import count_flops
from llama_stack_provider_moe.compute.recipes import circuit_breaker, distill, dpo, kto, reward, sft
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.runtime.peers import ALONE, Peers
from llama_stack_provider_moe.compute.train import fit
from llama_stack_provider_moe.compute.train.held_out import HeldOut
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.jobdir.events import EventLog
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

RECIPES: dict[str, ModuleType] = {
    "sft": sft,
    "dpo": dpo,
    "kto": kto,
    "reward": reward,
    "distill": distill,
    "circuit_breaker": circuit_breaker,
}


class Two(Peers):
    """The first of two processes with the same numbers."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=2)

    def sum(self, tensor: Tensor) -> Tensor:
        return 2 * tensor

    def sums(self, numbers: Sequence[float]) -> list[float]:
        return [2 * number for number in numbers]


@dataclass
class Made:
    """What a recipe's `run` prepared for training, and the run's folder."""

    session: Session[Any]
    base: Any
    trainer: Any
    steps: int
    run: Run


class Maker:
    """Runs recipes up to the start of training."""

    def __init__(self, workshop: Workshop, patch: pytest.MonkeyPatch) -> None:
        self._workshop, self._patch = workshop, patch

    def __call__(self, recipe: str, family: str = "mixtral", **blocks: Any) -> Made:
        model = self._workshop.model(family, num_hidden_layers=4) if recipe == "circuit_breaker" else family
        folder = self._workshop.job(recipe, model, **blocks)
        found: list[Made] = []

        def keep(session: Any, base: Any, trainer: Any, steps: int) -> None:
            found.append(Made(session, base, trainer, steps, Run(folder, 0)))

        self._patch.setattr(fit, "train_and_save", keep)
        with closing(EventLog(folder.events)) as events:
            RECIPES[recipe].run(Session(folder.read_spec(), folder, events, peers=Peers()))
        (made,) = found
        return made


@pytest.fixture
def make(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Maker:
    return Maker(workshop, monkeypatch)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trainer_has_what_was_loaded_and_decided(make: Maker, recipe: str) -> None:
    """16 rows, 4 held out; attention has a separate rate; rows longer than the model's 32 positions are counted."""
    made = make(recipe, moe={"router_z_loss_coef": 0.01}, adapter={"lr_multipliers": {"attention": 3.0}},
                options={"seed": 11, "max_length": 64})  # fmt: skip
    trainer, base, session = made.trainer, made.base, made.session
    for name in ("layout", "resolved", "shipped", "steering", "experts"):
        assert getattr(trainer, name) is getattr(base, name), name
    assert trainer.peers is session.peers
    assert trainer.spec.model_copy(update={"adapter": None}) == session.spec.model_copy(update={"adapter": None})
    assert trainer.processing_class is base.tokenizer
    assert (trainer.args.seed, trainer.args.output_dir) == (11, str(session.staging))
    trainer.create_optimizer()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {5e-3, 1.5e-2}
    assert len(trainer.train_dataset) == 16
    assert len(trainer.eval_dataset) == (7 if recipe == "circuit_breaker" else 4)
    assert made.steps == made.run.resolved["total_steps"] == (4 if recipe == "circuit_breaker" else 2)
    told = made.run.resolved
    assert (told["train_rows"], told["train_sequences"], told["positions"]) == (16, 16, 256)
    assert told["adapter"]["trainable_parameters"] == sum(
        parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad
    )
    work: dict[str, Any] = {"sft": {}, "dpo": {"references": 1}, "kto": {"references": 3}, "reward": {"head": False},
                            "distill": {}, "circuit_breaker": {"references": 1, "head": False}}[recipe]  # fmt: skip
    assert trainer.work == count_flops(trainer.model, trainer.layout, **work)


@pytest.mark.parametrize("recipe", ["sft", "dpo", "kto", "distill"])
def test_the_models_own_balance_loss_has_its_coefficient(make: Maker, recipe: str) -> None:
    assert make(recipe, moe={"router_aux_loss_coef": 0.25}).trainer.router_aux_loss_coef == 0.25
    ours = make(recipe, moe={"router_aux_loss_coef": 0.25, "moe_load_balancing": "gshard"})
    assert ours.trainer.router_aux_loss_coef == 0.0


# Supervised fine-tuning.


def test_rows_are_packed_where_asked_and_held_out_rows_never(make: Maker) -> None:
    packed = make("sft", "llama", data={"packed": True}, options={"max_length": 80})
    assert packed.run.resolved["packed_rows_differ_by"] is not None
    assert packed.run.resolved["train_sequences"] == len(packed.trainer.train_dataset) < 16
    assert len(packed.trainer.eval_dataset) == 4
    lengths = [len(row) for row in packed.trainer.train_dataset["input_ids"]]
    assert max(lengths) <= 80
    assert max(lengths) > 60, "as full as max_length allows"
    plain = make("sft", "llama", options={"max_length": 80})
    assert plain.run.resolved["packed_rows_differ_by"] is None
    assert (plain.trainer.args.max_length, plain.trainer.args.packing) == (None, False)


LABELS = torch.tensor([[5, -100, 6, 7], [-100, -100, -100, 8]])  # the first token of a row is never predicted


def test_sft_sums_are_over_tokens_with_a_label() -> None:
    trainer, held_out = sft.SFT.__new__(sft.SFT), HeldOut()
    assert trainer.figure_weights({"labels": LABELS}) == {"entropy": 3.0, "mean_token_accuracy": 3.0, "aux_loss": 1.0}
    trainer.tally(held_out, {"labels": LABELS}, 2.0)
    trainer.tally(held_out, {"labels": LABELS[:1]}, 5.0)
    assert held_out == HeldOut(loss=16.0, weight=5, nll=16.0, tokens=5)


# Preferences.

# Two pairs: chosen answers of 3 and 1 tokens, then rejected ones of 2 and 2; the first column is never predicted.
ANSWERS = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]])


def preferring(peers: Peers = ALONE) -> Any:
    trainer: Any = dpo.DPO.__new__(dpo.DPO)
    trainer.peers = peers
    return trainer


def test_dpo_sums_are_over_pairs_and_the_chosen_answers_tokens() -> None:
    trainer, held_out, batch = preferring(), HeldOut(), {"completion_mask": ANSWERS}
    trainer._metrics = {"eval": {"logps/chosen": [-9.0, -4.0]}}
    trainer.tally(held_out, batch, 0.5)
    assert held_out == HeldOut(loss=1.0, weight=2, nll=8.0, tokens=4)
    weights = trainer.figure_weights(batch)
    of_pairs = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                "logps/rejected")  # fmt: skip
    of_tokens = {"entropy": 8, "mean_token_accuracy": 4, "logits/chosen": 4, "logits/rejected": 4}
    assert weights == dict.fromkeys(of_pairs, 2) | of_tokens | {"aux_loss": 1.0}
    uneven = torch.cat([ANSWERS[:2], ANSWERS[:2] * 0])
    assert trainer.figure_weights({"completion_mask": uneven})["logits/rejected"] == 0


@pytest.mark.parametrize("peers", [ALONE, Two()], ids=["alone", "two"])
def test_a_pair_weighs_the_same_in_every_process(peers: Peers) -> None:
    """Gradients are averaged over processes: a micro-batch of 2 of a step's 5 pairs counts 2/5 times their number."""
    trainer, batch = preferring(peers), {"completion_mask": ANSWERS}
    trainer.counts = True
    loss, pairs = torch.tensor(10.0), torch.tensor(5)
    assert trainer.weigh(loss, batch, pairs).item() == pytest.approx(4.0 * peers.size)
    trainer.counts = False
    assert trainer.weigh(loss, batch, pairs).item() == 0


def test_an_epochs_end_has_no_pairs() -> None:
    trainer = preferring()
    trainer.flops, trainer.resolved, trainer.model_accepts_loss_kwargs = 0.0, SimpleNamespace(z_coef=0.0), False
    assert trainer.get_batch_samples(iter(()), 2, torch.device("cpu")) == ([], None)


# Circuit breakers.


def test_a_breakers_batches_are_mixed_as_the_job_says(make: Maker) -> None:
    """16 rows to break, 12 of each other set; an epoch ends after the steps that were asked for."""
    safe = {"dataset_id": "kept", "validation_dataset_id": "kept-held-out", "ratio": 0.25}
    retain = {"dataset_id": "kept", "validation_dataset_id": "kept-held-out", "ratio": 1.5}
    block = {"safe": safe, "retain": retain}
    shuffled = make("circuit_breaker", circuit_breaker=block, options={"seed": 5}).trainer._get_train_sampler()
    rows: Any = {"break": 16, "retain": 12, "safe": 12}
    ratios: Any = {"retain": 1.5, "safe": 0.25}
    assert list(shuffled) == list(MixtureSampler(rows, ratios, 16, shuffle=True, seed=5))
    short = make("circuit_breaker", circuit_breaker={"retain": retain}, data={"shuffle": False},
                 training={"max_steps_per_epoch": 2})  # fmt: skip
    straight = MixtureSampler({"break": 16, "retain": 12}, {"retain": 1.5}, 8, shuffle=False, seed=5)
    assert list(short.trainer._get_train_sampler()) == list(straight)
    assert list(short.trainer._get_train_sampler(short.trainer.train_dataset)) == list(straight)


@pytest.mark.parametrize("mask", ["response", "all"])
def test_a_breaker_is_made_of_its_plan(make: Maker, mask: str) -> None:
    """Blocks 0 and 1 of 4 are its targets, and only they have LoRA; its batches keep every column."""
    made = make("circuit_breaker", circuit_breaker={"mask": mask}, moe={"router_jitter": 0.0})
    trainer = made.trainer
    layers = {name.split("layers.")[1][0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert layers == {"0", "1"}
    assert trainer.spec.adapter.layers == made.session.spec.adapter.layers == "0-1"
    batch = trainer.data_collator([trainer.train_dataset[(("break", 0),)], trainer.train_dataset[(("break", 1),)]])
    assert bool((batch["counted"] == batch["attention_mask"]).all()) is (mask == "all")
    assert batch["input_ids"][batch["attention_mask"] == 0].unique().tolist() in ([], [0])
    assert trainer.args.remove_unused_columns is False
    told = made.run.resolved
    assert (told["set_rows"], told["held_in_evaluation_mode"]) == ({"break": 16, "retain": 12}, [])
    assert told["circuit_breaker"] == trainer.plan.as_json()["circuit_breaker"]


def test_a_breaker_never_takes_the_models_own_balance_loss(make: Maker) -> None:
    """Its upper blocks may not run, so a balance loss is only computed by us, and only if the job asks for it."""
    assert make("circuit_breaker").base.resolved.aux_coef == 0
    asked = make("circuit_breaker", moe={"router_aux_loss_coef": 0.02}).base.resolved
    assert (asked.aux_coef, asked.own_aux) == (0.02, True)


def test_unsloths_states_are_compared_at_every_block_that_counts(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training: Unsloth has its own forward passes, where hooks might take other values."""
    compared: list[Any] = []

    def compare(*arguments: Any) -> None:
        compared.extend(arguments)
        raise ModelError("they differ")

    monkeypatch.setattr(Unsloth, "load", Transformers.load)
    monkeypatch.setattr(unsloth_base, "require_equal_states", compare)
    block = {"target_layers": "1", "retain_layers": "all"}
    with pytest.raises(ModelError, match="they differ"):
        make("circuit_breaker", "llama", loader="unsloth", circuit_breaker=block, resources={"gpus": 1})
    model, blocks, dtype = compared
    assert (type(model).__name__, blocks, dtype) == ("LlamaForCausalLM", {EMBEDDINGS, 0, 1, 2, 4}, "fp32")
    compared.clear()
    make("circuit_breaker", "llama", circuit_breaker=block)
    assert not compared, "transformers' passes need no check"


def breaking(peers: Peers = ALONE) -> Any:
    trainer: Any = circuit_breaker.CircuitBreakerTrainer.__new__(circuit_breaker.CircuitBreakerTrainer)
    trainer.peers, trainer.experts = peers, None
    return trainer


def test_a_breakers_loss_is_its_processes_part() -> None:
    """Gradients are averaged over processes, and the loss is already this process's part of the step's."""
    assert breaking(Two()).weigh(torch.tensor(3.0), {}, None).item() == 6.0
    trainer = breaking()
    assert trainer.shared_experts is False
    trainer.experts = object()
    assert trainer.shared_experts is True


def test_routing_is_told_of_each_set_that_is_there() -> None:
    """Without padding."""
    batch = {"part": torch.tensor([0, 2, 0]), "attention_mask": torch.tensor([[1, 1], [1, 0], [1, 0]])}
    parts = breaking().parts(batch)
    assert {name: mask.tolist() for name, mask in parts.items()} == {
        "break": [[1, 1], [0, 0], [1, 0]],
        "safe": [[0, 0], [1, 0], [0, 0]],
    }
