"""Figures by domain, by hand: no model is trained."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from llama_stack_provider_moe.compute.analysis.routing_report import mutual_information
from llama_stack_provider_moe.compute.data.domains import Domains
from llama_stack_provider_moe.compute.train.by_domain import DomainLosses, figures_of, held_out_by, masks
from llama_stack_provider_moe.compute.train.held_out import HeldOut

NAMES = ("code", "chat", "law")
DOMAINS = Domains(NAMES, (4, 4, 4), (2, 0, 1), (40, 40, 40), (4, 4, 4))
ONE = SimpleNamespace(sums=lambda numbers: list(numbers))  # a single process
TWICE = SimpleNamespace(sums=lambda numbers: [2 * number for number in numbers])  # two that saw the same


class Head(nn.Module):
    """Gives what TRL's output head gives."""

    def forward(self, log_probs: torch.Tensor, label_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(log_probs=log_probs * torch.ones(1, requires_grad=True), label_mask=label_mask)


def test_losses_of_domains_by_hand() -> None:
    """Two micro-batches: code has (1 + 3 + 2) nats over 3 tokens, law 5 over 1; chat has no token, so no figure."""
    head = Head()
    losses = DomainLosses(head, DOMAINS)
    log_probs = torch.tensor([[-1.0, -3.0], [0.0, -5.0]])
    head(log_probs, torch.tensor([[True, True], [False, True]]))
    losses.add(torch.tensor([0, 2]))
    head(torch.tensor([[-9.0, -9.0]]), torch.tensor([[True, True]]))
    losses.forget()
    with torch.no_grad():  # an evaluation between two steps does not count
        head(torch.tensor([[-7.0, 0.0]]), torch.tensor([[True, False]]))
    head(torch.tensor([[-2.0, 0.0]]), torch.tensor([[True, False]]))
    losses.add(torch.tensor([0]))
    assert losses.take(ONE) == {"loss/code": 2.0, "loss/law": 5.0}  # type: ignore[arg-type]
    assert losses.take(ONE) == {}, "the next step begins with nothing"  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="ran with gradients"):
        losses.add(torch.tensor([0]))


def test_masks_leave_out_padding_and_other_domains() -> None:
    """Of pairs, the chosen answers come first and the rejected ones after them, in the same order."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    found = masks(NAMES, torch.tensor([2, 0]), mask)
    assert [*found] == ["code", "law"]
    assert found["code"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert found["law"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_figures_are_of_all_processes_and_named_by_domain() -> None:
    assert held_out_by(None) == {}
    assert [*held_out_by(DOMAINS)] == ["code", "law"], "chat has no held-out row"
    both, code = HeldOut(loss=6.0, weight=4.0, nll=6.0, tokens=4), HeldOut(loss=2.0, weight=2.0, nll=2.0, tokens=2)
    for peers in (ONE, TWICE):
        found = figures_of(both, {"code": code}, peers)  # type: ignore[arg-type]
        assert found == pytest.approx({
            "validation_loss": 1.5, "perplexity": math.exp(1.5), "validation_loss/code": 1.0,
            "perplexity/code": math.e})  # fmt: skip


def test_mutual_information_by_hand() -> None:
    """Rates (sets, layers, experts). Nothing shared: ln 2. Alike: 0. A quarter: by the definition."""
    apart = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    alike = np.array([[[0.7, 0.3]], [[0.7, 0.3]]])
    assert mutual_information(apart)[0] == pytest.approx(math.log(2))
    assert mutual_information(alike)[0] == pytest.approx(0, abs=1e-12)
    some = np.array([[[0.75, 0.25]], [[0.25, 0.75]]])
    by_definition = 2 * (0.375 * math.log(0.75 / 0.5) + 0.125 * math.log(0.25 / 0.5))
    assert mutual_information(some)[0] == pytest.approx(by_definition)
