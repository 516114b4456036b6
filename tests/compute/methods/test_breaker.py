"""Losses of circuit breakers by hand, their gradients and schedules, and how the official formulas differ."""

import doctest
import math

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.methods import preference
from llama_stack_provider_moe.compute.methods.breaker import (
    bend_losses,
    cosines,
    distances,
    gathered,
    kl_from_base,
    layer_means,
    reroute_loss,
    retain_loss,
    token_mean,
)
from llama_stack_provider_moe.compute.methods.preference import as_robust
from llama_stack_provider_moe.compute.methods.schedules import Coefficients, between, paper, rise
from tests.support import official_breaker as official

E0, E1 = [1.0, 0.0], [0.0, 1.0]


def rows(*tokens: list[float]) -> Tensor:
    """One row: (1, T, D)."""
    return torch.tensor([list(tokens)])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rerouting_by_hand() -> None:
    """Cosines 1, 0.6 and -1 of three tokens; the negative one counts as 0, and no length matters."""
    hidden, base = rows([2.0, 0.0], [3.0, 4.0], [0.0, -5.0]), rows(E0, E0, E1)
    all_three = torch.ones(1, 3)
    assert reroute_loss([hidden], [base], all_three).item() == pytest.approx((1 + 0.6 + 0) / 3)
    assert reroute_loss([hidden], [base], torch.tensor([[0, 1, 0]])).item() == pytest.approx(0.6)
    assert [each.tolist() for each in cosines([hidden], [base])] == [[pytest.approx([1.0, 0.6, -1.0])]]
    # A second layer with cosines 1, 1, 1: the mean over both.
    two = reroute_loss([hidden, base], [base, base], all_three)
    assert two.item() == pytest.approx((1.6 + 3) / 6)
    assert layer_means(cosines([hidden, base], [base, base]), all_three).tolist() == pytest.approx([0.2, 1.0])


def test_gradient_of_rerouting_by_hand() -> None:
    """d cos(h, e) / dh = (e - cos h/|h|) / |h|: at h = (3, 4), e = (1, 0) it is (0.64, -0.48) / 5; 0 below cosine 0."""
    hidden = rows([3.0, 4.0], [-3.0, 4.0]).requires_grad_()
    reroute_loss([hidden], [rows(E0, E0)], torch.ones(1, 2)).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert hidden.grad[0, 0].tolist() == pytest.approx([0.64 / 5 / 2, -0.48 / 5 / 2], rel=1e-5)
    assert hidden.grad[0, 1].tolist() == [0.0, 0.0]


def test_retaining_by_hand() -> None:
    """Distances 5, 0 and 1."""
    hidden, base = rows([3.0, 4.0], E0, E1), rows([0.0, 0.0], E0, [0.0, 0.0])
    assert retain_loss([hidden], [base], torch.ones(1, 3)).item() == pytest.approx(2.0)
    assert retain_loss([hidden], [base], torch.tensor([[1, 1, 0]])).item() == pytest.approx(2.5)
    assert retain_loss([hidden, base], [base, base], torch.ones(1, 3)).item() == pytest.approx(1.0)


def test_gradient_of_retaining_by_hand() -> None:
    """d |h - b| / dh = (h - b) / |h - b|, and 0 where nothing has moved yet, which is everywhere at the first step."""
    hidden = rows([3.0, 4.0], E0).requires_grad_()
    retain_loss([hidden], [rows([0.0, 0.0], E0)], torch.ones(1, 2)).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert hidden.grad[0].tolist() == [pytest.approx([0.3, 0.4]), [0.0, 0.0]]


def test_gradients_against_finite_differences() -> None:
    hidden = noise(2, 3, 4).double().requires_grad_()
    base, mask = noise(2, 3, 4, seed=1).double(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    step = 1e-3  # everything is computed in fp32
    for loss in (reroute_loss, retain_loss):
        (gradient,) = torch.autograd.grad(loss([hidden], [base], mask), hidden)
        for index in [(0, 0, 1), (0, 1, 2), (1, 0, 3), (0, 2, 0)]:
            moved = torch.zeros_like(hidden)
            moved[index] = step
            rise_ = loss([hidden + moved], [base], mask) - loss([hidden - moved], [base], mask)
            assert gradient[index].item() == pytest.approx(rise_.item() / (2 * step), abs=2e-4)


@pytest.mark.parametrize("loss", [reroute_loss, retain_loss])
def test_micro_batches_add_up_to_the_step(loss: object) -> None:
    """Rows of unequal lengths: a mean of micro-batches' means would weigh the short row's tokens more."""
    hidden, base = noise(2, 5, 4).abs(), noise(2, 5, 4, seed=1).abs()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    whole = loss([hidden], [base], mask)  # type: ignore[operator]
    parts = [loss([hidden[i : i + 1]], [base[i : i + 1]], mask[i : i + 1], mask.sum()) for i in (0, 1)]  # type: ignore[operator]
    assert sum(parts).item() == pytest.approx(whole.item())
    means = [loss([hidden[i : i + 1]], [base[i : i + 1]], mask[i : i + 1]) for i in (0, 1)]  # type: ignore[operator]
    assert abs(sum(means).item() / 2 - whole.item()) > 0.01


def test_no_token_is_no_loss_and_no_gradient() -> None:
    hidden = noise(1, 2, 3).requires_grad_()
    loss = reroute_loss([hidden], [noise(1, 2, 3)], torch.zeros(1, 2)) + retain_loss(
        [hidden], [noise(1, 2, 3)], torch.zeros(1, 2)
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_values_in_padding_do_not_matter() -> None:
    hidden = noise(1, 3, 4)
    hidden[0, 2] = math.nan
    mask = torch.tensor([[1, 1, 0]])
    base = noise(1, 3, 4, seed=1)
    assert retain_loss([hidden], [base], mask).isfinite()
    assert token_mean(hidden[..., 0], mask).item() == pytest.approx(hidden[0, :2, 0].mean().item())


def test_trap_1_the_official_mean_counts_padding() -> None:
    """At a fill of 20 % its retain loss is a fifth of the distance that tokens have moved by."""
    hidden, base = noise(4, 50, 8), noise(4, 50, 8, seed=1)
    mask = torch.zeros(4, 50)
    mask[:, :10] = 1
    ours, theirs = retain_loss([hidden], [base], mask).item(), official.retain_loss([hidden], [base], mask).item()
    assert ours == pytest.approx(distances([hidden], [base])[0][:, :10].mean().item())
    assert theirs == pytest.approx(0.2 * ours)
    # Ours does not change with the padding that a batch happens to have; theirs does.
    short = retain_loss([hidden[:, :10]], [base[:, :10]], mask[:, :10]).item()
    assert short == pytest.approx(ours)
    assert official.retain_loss([hidden[:, :10]], [base[:, :10]], mask[:, :10]).item() == pytest.approx(5 * theirs)
    assert reroute_loss([hidden], [base], mask).item() == pytest.approx(
        official.reroute_loss([hidden], [base], mask).item(), rel=1e-5
    ), "the rerouting loss is the same"


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trap_2_the_schedule_goes_by_optimiser_steps(accumulation: int) -> None:
    """150 steps: ours ends at half of alpha each, however many micro-batches a step has."""
    ours, theirs = [], []
    for micro_batch in range(1, 150 * accumulation + 1):
        step = (micro_batch - 1) // accumulation + 1
        ours.append(paper(step, 150, 10.0))
        theirs.append(official.coefficients(micro_batch, 10.0))
    by_step = ours[::accumulation]
    assert all(ours[i] == by_step[i // accumulation] for i in range(len(ours))), "it stands still within a step"
    assert by_step[0] == pytest.approx((10 * (1 - 1 / 300), 10 / 300))
    assert by_step[-1] == pytest.approx((5.0, 5.0))
    assert theirs[-1] == pytest.approx((5.0, 5.0) if accumulation == 1 else (-10.0, 20.0))
    assert min(each.reroute for each in ours) >= 5
    if accumulation == 1:
        assert ours == [pytest.approx(each) for each in theirs]


def test_paper_schedule_step_by_step() -> None:
    linear = [paper(t, 2, 8.0) for t in (1, 2, 3, 4, 5)]
    assert linear == [
        Coefficients(6, 2),
        Coefficients(4, 4),
        Coefficients(2, 6),
        Coefficients(0, 8),
        Coefficients(0, 8),
    ]
    cosine = [paper(t, 2, 8.0, "cosine") for t in (1, 2, 3, 4, 5)]
    quarter = (1 - math.cos(math.pi / 4)) / 2
    assert [each.retain for each in cosine] == pytest.approx([8 * quarter, 4, 8 * (1 - quarter), 8, 8])
    assert all(each.reroute + each.retain == pytest.approx(8) for each in cosine)


def test_dual_schedules_step_by_step() -> None:
    assert [between(t, 4, 10.0, 2.0) for t in (0, 1, 2, 3, 4, 9)] == [10, 8, 6, 4, 2, 2]
    assert [between(t, 4, 0.0, 8.0, "cosine") for t in (0, 2, 4, 5)] == pytest.approx([0, 4, 8, 8])
    # The paper's schedule is dual, with alpha -> alpha / 2 and 0 -> alpha / 2.
    for t in range(1, 8):
        assert paper(t, 7, 10.0) == pytest.approx((between(t, 7, 10.0, 5.0), between(t, 7, 0.0, 5.0)))
    assert rise(-1.0, "cosine") == 0


def test_gathered_by_hand() -> None:
    """Rows' states at tokens 1, 0, 1: (1, 0), (0, 2), (3, 4); cosines 0, 0.6 and 0.8 of the three pairs."""
    hidden = torch.tensor([[[9.0, 9.0], [1.0, 0.0]], [[0.0, 2.0], [9.0, 9.0]], [[9.0, 9.0], [3.0, 4.0]]])
    assert gathered([hidden], torch.tensor([1, 0, 1])).item() == pytest.approx((0 + 0.6 + 0.8) / 3)
    assert gathered([hidden[:1]], torch.tensor([1])).item() == 0, "one row has no pair"


def test_kl_by_hand() -> None:
    """Base (1/2, 1/2), model (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3) nats; a token that does not count adds nothing."""
    base, model = torch.zeros(1, 2, 2), torch.tensor([[[0.0, math.log(3)], [5.0, -5.0]]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_from_base(model, base, torch.tensor([[1, 0]])).item() == pytest.approx(expected)
    assert kl_from_base(base, base, torch.tensor([[1, 1]])).item() == 0


def test_repbend_by_hand() -> None:
    parts = [torch.tensor(value) for value in (2.0, 3.0, 0.5, 0.25)]
    of_break, of_retain = bend_losses(*parts, push=0.5, gather=0.1, kl_weight=0.3)
    assert of_break.item() == pytest.approx(-0.5 * 3 - 0.1 * 0.5)
    assert of_retain.item() == pytest.approx(2 / 2 + 0.3 * 0.25)


def test_gathered_of_two_rows_and_of_short_states() -> None:
    """One pair is a pair, a cosine knows no length, and the answer is fp32 whatever the states are in."""
    hidden = torch.tensor([[[0.3, 0.0]], [[0.0, 0.2]], [[0.03, 0.04]]])
    assert gathered([hidden], torch.zeros(3, dtype=torch.long)).item() == pytest.approx((0 + 0.6 + 0.8) / 3)
    assert gathered([hidden[1:]], torch.zeros(2, dtype=torch.long)).item() == pytest.approx(0.8)
    for rows in (1, 2):
        assert gathered([hidden[:rows].bfloat16()], torch.zeros(rows, dtype=torch.long)).dtype == torch.float32


def test_kl_is_over_the_vocabulary_and_over_the_steps_tokens() -> None:
    """Against torch's own, token by token; and two micro-batches add up to the step."""
    model, base, mask = noise(2, 3, 5), noise(2, 3, 5, seed=1), torch.tensor([[1, 1, 1], [1, 0, 0]])
    by_token = [
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=base[row, at]),
            torch.distributions.Categorical(logits=model[row, at]),
        )
        for row, at in mask.nonzero().tolist()
    ]
    whole = kl_from_base(model, base, mask)
    assert whole.item() == pytest.approx(torch.stack(by_token).mean().item(), rel=1e-5)
    parts = [kl_from_base(model[i : i + 1], base[i : i + 1], mask[i : i + 1], mask.sum()) for i in (0, 1)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("x", [-3.0, 0.0, 0.7])
def test_conservative_dpo_by_its_definition(smoothing: float, x: float) -> None:
    """Robust DPO's formula with `as_robust` gives cDPO's: cross entropy with a target of 1 - e."""
    right, wrong = math.log(1 / (1 + math.exp(-x))), math.log(1 / (1 + math.exp(x)))
    robust = as_robust(smoothing)
    found = (-(1 - robust) * right + robust * wrong) / (1 - 2 * robust)
    assert found == pytest.approx(-(1 - smoothing) * right - smoothing * wrong, rel=1e-12)
    assert doctest.testmod(preference).failed == 0
