"""Laws of a step's figures, with a trainer in TRL's place that logs its input: no model, no job."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn
from transformers import Trainer

from llama_stack_provider_moe.compute.runtime.peers import ALONE, Peers
from llama_stack_provider_moe.compute.train.step_figures import StepFigures


class Telling(Trainer):  # type: ignore[misc]  # transformers ships no types
    """Keeps a micro-batch's figures as TRL does, and logs their mean."""

    def __init__(self, model: nn.Module, tokens: float = 0.0) -> None:
        self.model = model
        self._total_train_tokens = tokens
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        self.told: list[tuple[dict[str, float], float | None]] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        for name, figure in inputs["figures"].items():
            self._metrics["train" if self.model.training else "eval"].setdefault(name, []).append(figure)
        return model, arguments, keywords

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        found = self._metrics["train" if self.model.training else "eval"]
        self.told.append(({name: sum(values) / len(values) for name, values in found.items()} | logs, start_time))
        found.clear()


class Weighed(StepFigures, Telling):
    def figure_weights(self, inputs: dict[str, Any]) -> dict[str, float]:
        weights: dict[str, float] = inputs["weights"]
        return weights


class Twice(Peers):
    """Two processes that add the same numbers."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=2)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        return [2 * number for number in numbers]


def weighed(training: bool = True, peers: Peers = ALONE) -> Weighed:
    trainer = Weighed(model=nn.Identity().train(training), tokens=21.0)
    trainer.peers = peers
    return trainer


def give(trainer: Weighed, rows: float, **figures: float) -> None:
    """A micro-batch whose figures are means over its rows; the aux loss is a mean over micro-batches."""
    trainer.compute_loss(None, {"figures": figures, "weights": dict.fromkeys(figures, rows) | {"aux_loss": 1.0}})


@pytest.mark.parametrize("peers", [ALONE, Twice()], ids=["alone", "two"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_logged_figure_is_a_mean_over_rows(training: bool, peers: Peers) -> None:
    """3 rows and 1; tokens are a count, over all processes. `RecordingTrainer` tells the others' balance loss."""
    trainer = weighed(training, peers)
    give(trainer, 3, margin=1.0, aux_loss=2.0, num_tokens=10.0)
    give(trainer, 1, margin=5.0, aux_loss=4.0, num_tokens=21.0)
    trainer.log({"loss": 7.0}, 0.5)
    expected = {"margin": 2.0, "num_tokens": 21.0 * peers.size, "loss": 7.0}
    expected |= {"aux_loss": 3.0} if training and peers is ALONE else {}
    assert trainer.told == [(expected, 0.5)]
    trainer.log({"loss": 1.0})
    assert trainer.told[1] == ({"loss": 1.0}, None), "nothing of the previous step, and no count that TRL did not make"


def test_an_evaluation_and_a_step_are_kept_apart() -> None:
    trainer = weighed()
    give(trainer, 3, margin=1.0)
    trainer.model.eval()
    give(trainer, 1, margin=5.0)
    trainer.log({})
    trainer.model.train()
    trainer.log({})
    assert [told for told, _ in trainer.told] == [{"margin": 5.0}, {"margin": 1.0}]


def test_ballast_counts_for_nothing() -> None:
    """A micro-batch that only keeps processes in step has no weight, and its figures are ignored."""
    trainer = weighed()
    give(trainer, 2, margin=1.5)
    trainer.counts = False
    trainer.compute_loss(None, {"figures": {"margin": math.nan}})
    trainer.log({})
    assert trainer.told[0][0] == {"margin": 1.5}


def test_trls_loss_gets_what_ours_was_given() -> None:
    model = object()
    passed = weighed().compute_loss(model, {"figures": {}, "weights": {}}, True, num_items_in_batch=4)
    assert passed == (model, (True,), {"num_items_in_batch": 4})
