"""Laws of directional ablation on random weights: what is gone, what is kept, and what is left untouched."""

import doctest
import math

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.methods import ablation
from llama_stack_provider_moe.compute.methods.ablation import (
    NoDirection,
    direction,
    read_direction,
    remove_from_bias,
    remove_input,
    remove_output,
    share_along,
    sparse,
    untouched,
    without,
)
from llama_stack_provider_moe.spec.ablation import DirectionKind, NormPreserving

WIDTH, INPUTS, EXPERTS = 96, 160, 8


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(seed: int = 1, sparsity: float = 0.0) -> Tensor:
    drawn = noise(WIDTH, seed=seed, dtype=torch.float64)
    return sparse(drawn / drawn.norm(), sparsity)


def columns(weight_HI: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight_HI, dim=0)
    return norms


def test_a_direction_by_hand() -> None:
    """Means (5, 4, 0) and (2, 0, 0): the difference is (3, 4, 0), and 3 of it is along the baseline's mean."""
    target, baseline = torch.tensor([5.0, 4.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])
    assert direction(target, baseline, "plain").tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert direction(target, baseline, "projected").tolist() == pytest.approx([0.0, 1.0, 0.0])
    at_layer = torch.tensor([1.0, 1.0, 1.0])
    both = direction(target, baseline, "biprojected", at_layer)
    assert both.tolist() == pytest.approx([0.0, math.sqrt(0.5), -math.sqrt(0.5)])


def test_a_projected_direction_has_nothing_of_the_means() -> None:
    """Also where a mean is a million times longer than the difference, as in real models."""
    common = noise(WIDTH, seed=3, dtype=torch.float64)
    target, baseline = 1e6 * common + noise(WIDTH, seed=4), 1e6 * common + noise(WIDTH, seed=5)
    at_layer = noise(WIDTH, seed=6)
    one, two = direction(target, baseline, "projected"), direction(target, baseline, "biprojected", at_layer)
    for found in (one, two):
        assert float(found @ (baseline / baseline.norm())) == pytest.approx(0, abs=1e-9)
        assert float(found.norm()) == pytest.approx(1)
    assert float(two @ (at_layer.double() / at_layer.double().norm())) == pytest.approx(0, abs=1e-9)
    assert abs(float(one @ (at_layer.double() / at_layer.double().norm()))) > 1e-3
    # The same vector twice spans one direction, not two.
    assert torch.allclose(without(target, baseline, 2 * baseline), without(target, baseline))


@pytest.mark.parametrize("kind", ["plain", "projected"])
def test_means_that_do_not_differ_have_no_direction(kind: DirectionKind) -> None:
    mean = noise(WIDTH)
    with pytest.raises(NoDirection, match="the two means are equal"):
        direction(mean, mean.clone(), kind)


def test_a_difference_along_the_mean_alone_is_no_projected_direction() -> None:
    mean = noise(WIDTH)
    assert float(direction(2 * mean, mean, "plain") @ (mean.double() / mean.double().norm())) == pytest.approx(1)
    with pytest.raises(NoDirection):
        direction(2 * mean, mean, "projected")


@pytest.mark.parametrize("norms", ["column", "off"])
def test_nothing_of_the_direction_is_written(norms: NormPreserving) -> None:
    weight, r = noise(WIDTH, INPUTS), unit()
    edited = remove_output(weight, r, 1.0, norms)
    assert edited.dtype == torch.float32
    assert share_along(weight, r) > 0.05
    assert share_along(edited, r) < 1e-6
    assert torch.equal(weight, noise(WIDTH, INPUTS)), "the weight itself is not changed"
    state = noise(INPUTS, seed=9)
    assert abs(float(r.float() @ (edited @ state))) < 1e-6 * float((weight @ state).norm())


def test_norms_are_kept() -> None:
    weight, r = noise(WIDTH, INPUTS), unit()
    by_column, by_row = (remove_output(weight, r, 1.0, norms) for norms in ("column", "row"))
    assert torch.allclose(columns(by_column), columns(weight), rtol=1e-6)
    assert torch.allclose(columns(by_row.mT), columns(weight.mT), rtol=1e-6)
    assert bool((columns(remove_output(weight, r, 1.0, "off")) < columns(weight)).all())
    assert 1e-4 < share_along(by_row, r) < share_along(weight, r), "norms of rows bring some of it back"


def test_half_the_scale_removes_half() -> None:
    weight, r = noise(WIDTH, INPUTS), unit()
    half = remove_output(weight, r, 0.5, "off")
    assert torch.allclose(r.float() @ half, 0.5 * (r.float() @ weight), atol=1e-6)
    assert torch.allclose(remove_output(half, r, 1.0, "off"), remove_output(weight, r, 1.0, "off"), atol=1e-6)


def test_a_column_along_the_direction_becomes_zero() -> None:
    """It has no remainder that could be made as long as it was; its neighbour is kept."""
    r = torch.tensor([0.6, 0.8])
    edited = remove_output(torch.tensor([[3.0, 8.0], [4.0, -6.0]]), r, 1.0, "column")
    assert edited[:, 0].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert edited[:, 1].tolist() == pytest.approx([8.0, -6.0])


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("norms", ["column", "row", "off"])
def test_sparsity_leaves_its_share_untouched(sparsity: float, norms: NormPreserving) -> None:
    weight, r = noise(WIDTH, INPUTS), unit(sparsity=sparsity)
    edited = remove_output(weight, r, 1.0, norms)
    same = (edited == weight).all(dim=1)
    assert int(same.sum()) == untouched(WIDTH, sparsity) == round(WIDTH * sparsity)
    assert float(r.norm()) == pytest.approx(1)
    if norms != "row":
        assert share_along(edited, r) < 1e-6
    if norms == "column":
        assert torch.allclose(columns(edited), columns(weight), rtol=1e-6)
    whole = unit()
    assert float(whole[same].abs().max()) < float(whole[~same].abs().min()), "the smallest are left out"


def test_a_bias_writes_nothing_of_it() -> None:
    bias, r = noise(WIDTH), unit()
    assert abs(float(r.float() @ remove_from_bias(bias, r, 1.0))) < 1e-6
    assert float(r.float() @ remove_from_bias(bias, r, 0.5)) == pytest.approx(0.5 * float(r.float() @ bias), abs=1e-6)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_a_router_reads_as_if_the_direction_were_out_of_its_input(scale: float) -> None:
    """The norm before it multiplies by g, so what it reads of r is along g * r."""
    gate, g, states = noise(EXPERTS, WIDTH), noise(WIDTH, seed=2).abs() + 0.1, noise(50, WIDTH, seed=3)
    r = unit()
    q = read_direction(r, g)
    edited = remove_input(gate, q, scale)
    normed = g * states / states.pow(2).mean(-1, keepdim=True).sqrt()
    out_of_it = normed - scale * (normed @ q.float())[:, None] * q.float()
    assert torch.allclose(normed @ edited.mT, out_of_it @ gate.mT, atol=1e-5)
    assert torch.allclose(edited @ (g * r.float()), (1 - scale) * (gate @ (g * r.float())), atol=1e-6)
    half, whole = (remove_input(gate, q, each) - gate for each in (0.5, 1.0))
    assert torch.allclose(2 * half, whole, atol=1e-6)
    # What is orthogonal to it is read as before.
    other = without(noise(WIDTH, seed=7), q).float()
    assert torch.allclose(edited @ other, gate @ other, atol=1e-5)


def test_a_norm_that_hides_the_direction_is_refused() -> None:
    with pytest.raises(NoDirection, match="weight is 0"):
        read_direction(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))


def test_examples() -> None:
    assert doctest.testmod(ablation).failed == 0
