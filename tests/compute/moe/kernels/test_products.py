"""The ragged products against a loop over rows, for all shapes of groups; gradients against finite differences."""

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import groups as groups_module
from llama_stack_provider_moe.compute.moe.kernels import linear, reference
from llama_stack_provider_moe.compute.moe.kernels.drop import UP, Drop
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups, bucket, sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.linear import Lora, grouped_linear
from llama_stack_provider_moe.compute.moe.kernels.permute import combine, dispatch
from llama_stack_provider_moe.compute.moe.kernels.reference import (
    experts_of_rows,
    rows_by_rows,
    sums_of_rows,
    times_weights,
)

INPUTS, OUTPUTS, RANK = 5, 7, 2
# Rows of each expert: of all, of some, of one, of none.
SIZES = [(3, 4, 2), (0, 5, 0), (0, 0, 9), (1, 0, 1), (0, 0, 0)]
STRAYS = 3  # rows of no expert


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grouped(sizes: tuple[int, ...], partial: bool = False) -> tuple[Groups, list[int]]:
    """Groups, and the expert of each row."""
    owners = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    return Groups(torch.tensor(sizes).cumsum(0).int(), partial), owners


class Kept:
    """A `Stored` that simply keeps its weights, and counts how often one was decoded."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype, self.shape, self._weight, self.decoded = weight.dtype, tuple(weight.shape), weight, 0

    def expert(self, number: int) -> Tensor:
        self.decoded += 1
        return self._weight[number]

    def whole(self) -> Tensor:
        return self._weight


@pytest.mark.parametrize("module", [groups_module, linear, reference])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_times_weights(sizes: tuple[int, ...], flip: bool, dtype: torch.dtype, partial: bool) -> None:
    groups, owners = grouped(sizes, partial)
    total = len(owners) + (STRAYS if partial else 0)
    rows, weight = made(total, OUTPUTS if flip else INPUTS, dtype=dtype), made(3, OUTPUTS, INPUTS, seed=1, dtype=dtype)
    expected = torch.zeros(total, INPUTS if flip else OUTPUTS, dtype=torch.float64)
    for row, owner in enumerate(owners):
        matrix = weight[owner].double()
        expected[row] = rows[row].double() @ (matrix if flip else matrix.T)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    out = times_weights(rows, weight, groups, flip=flip)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    transposed = weight.mT.contiguous().mT  # the same numbers, the other way round in memory
    again = times_weights(rows, transposed, groups, flip=flip)
    torch.testing.assert_close(again, out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(times_weights(rows, Kept(weight), groups, flip=flip), out)
    onto = torch.ones_like(out)
    assert times_weights(rows, weight, groups, flip=flip, onto=onto) is onto
    torch.testing.assert_close(onto.double(), expected + 1, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_by_rows(sizes: tuple[int, ...], dtype: torch.dtype, partial: bool) -> None:
    groups, owners = grouped(sizes, partial)
    total = len(owners) + (STRAYS if partial else 0)
    left, right = made(total, OUTPUTS, dtype=dtype), made(total, INPUTS, seed=1, dtype=dtype)
    expected = torch.zeros(3, OUTPUTS, INPUTS, dtype=torch.float64)
    sums = torch.zeros(3, OUTPUTS, dtype=torch.float64)
    for row, owner in enumerate(owners):
        expected[owner] += torch.outer(left[row].double(), right[row].double())
        sums[owner] += left[row].double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-1
    torch.testing.assert_close(rows_by_rows(left, right, groups).double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sums_of_rows(left, groups).double(), sums, rtol=tolerance, atol=tolerance)
    assert experts_of_rows(groups, len(owners)).tolist() == owners


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_torchs_grouped_products_give_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU takes; torch computes it on a CPU as well, so its strides and paddings are seen here."""
    for sizes in SIZES[:4]:
        for partial in (False, True):
            groups, owners = grouped(sizes, partial)
            total = len(owners) + (STRAYS if partial else 0)
            rows, weight = made(total, INPUTS, dtype=dtype), made(3, OUTPUTS, INPUTS, seed=1, dtype=dtype)
            other = made(total, OUTPUTS, seed=2, dtype=dtype)
            looped = (
                times_weights(rows, weight, groups),
                times_weights(other, weight, groups, flip=True),
                times_weights(rows, weight, groups, onto=other.clone()),
                rows_by_rows(other, rows, groups),
            )
            with monkeypatch.context() as patch:
                patch.setattr(reference, "_can_group", lambda rows: True)
                once = (
                    times_weights(rows, weight, groups),
                    times_weights(other, Kept(weight), groups, flip=True),
                    times_weights(rows, weight, groups, onto=other.clone()),
                    rows_by_rows(other, rows, groups),
                )
            for ours, theirs in zip(looped, once, strict=True):
                torch.testing.assert_close(theirs, ours, rtol=2e-2, atol=2e-2)


def test_sorting() -> None:
    index_TK = torch.tensor([[2, 0], [1, 2], [2, 1]])
    found = sort_by_expert(index_TK, 4, torch.float32)
    assert index_TK.reshape(-1)[found.order_S].tolist() == [0, 1, 1, 2, 2, 2]
    assert found.order_S.tolist() == [1, 2, 5, 0, 3, 4], "of equals the earlier token first"
    assert found.order_S[found.places_TK].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found.groups.ends_E.tolist() == [1, 3, 6, 6]
    assert found.groups.spans == [(0, 0, 1), (1, 1, 3), (2, 3, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_every_choice_has_a_row_of_its_expert(seed: int, dtype: torch.dtype) -> None:
    """Also where rows are filled up, and where some choices are of no expert."""
    index_TK = torch.randint(0, 6, (40, 3), generator=torch.Generator().manual_seed(seed))
    index_TK[index_TK == 2] = 4  # an expert without a token
    found = sort_by_expert(index_TK, 5, dtype, partial=True)
    begins = {expert: (begin, end) for expert, begin, end in found.groups.spans}
    assert found.some_without_row
    total = found.order_S.shape[0]
    for position, (expert, place) in enumerate(
        zip(index_TK.flatten().tolist(), found.places_TK.flatten().tolist(), strict=True)
    ):
        if expert == 5:
            assert place == total
        else:
            begin, end = begins[expert]
            assert begin <= place < end
            assert found.order_S[place] == position
    counts = [int((index_TK == expert).sum()) for expert in range(5)]
    sizes = [begins.get(expert, (0, 0))[1] - begins.get(expert, (0, 0))[0] for expert in range(5)]
    assert sizes == (bucket(torch.tensor(counts)).tolist() if dtype == torch.bfloat16 else counts)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_to_the_experts_and_back(filled: bool, partial: bool) -> None:
    """Rows are their tokens', sums their rows'; gradients are those of torch's own indexing."""
    index_TK = torch.randint(0, 4 if partial else 3, (7, 2), generator=torch.Generator().manual_seed(0))
    found = sort_by_expert(index_TK, 3, torch.bfloat16 if filled else torch.float64, partial=partial)
    assert (found.filled_S is not None) is filled
    hidden, weights = made(7, INPUTS).requires_grad_(), made(7, 2, seed=1).requires_grad_()
    rows = dispatch(hidden, found)
    for token in range(7):
        for choice in range(2):
            if index_TK[token, choice] < 3:
                assert torch.equal(rows[found.places_TK[token, choice]], hidden[token])
    out = combine(rows.exp(), weights, found)
    expected = (hidden.exp().unsqueeze(1) * weights.unsqueeze(-1) * (index_TK < 3).unsqueeze(-1)).sum(1)
    torch.testing.assert_close(out, expected)
    upstream = made(7, INPUTS, seed=2)
    gradients = torch.autograd.grad(out, (hidden, weights), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (hidden, weights), upstream))
    leaf = rows.detach().requires_grad_()
    (by_row,) = torch.autograd.grad(combine(leaf, weights, found), leaf, upstream)
    if found.filled_S is not None:
        assert by_row[found.filled_S].abs().max() == 0, "nobody reads what fills up"


@pytest.mark.parametrize("sizes", SIZES[:4])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_gradients_are_the_finite_differences(
    sizes: tuple[int, ...], stored: bool, with_bias: bool, with_lora: bool
) -> None:
    groups, owners = grouped(sizes)
    rows = made(len(owners), INPUTS).requires_grad_()
    weight = made(3, OUTPUTS, INPUTS, seed=1).requires_grad_(not stored)
    bias = made(3, OUTPUTS, seed=2).requires_grad_()
    a, b = made(3, RANK, INPUTS, seed=3).requires_grad_(), made(3, OUTPUTS, RANK, seed=4).requires_grad_()

    def function(rows: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return grouped_linear(
            rows, Kept(weight) if stored else weight, groups, bias if with_bias else None,
            Lora(a, b) if with_lora else None,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (rows, weight, bias, a, b))
    out = function(rows, weight, bias, a, b)
    for row, owner in enumerate(owners):
        matrix = weight[owner] + (b[owner] @ a[owner] if with_lora else 0)
        expected = matrix @ rows[row] + (bias[owner] if with_bias else 0)
        torch.testing.assert_close(out[row], expected)


def test_a_frozen_weight_gets_no_gradient_and_nothing_is_saved_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, owners = grouped((3, 4, 2))
    saved: list[tuple[int, ...]] = []
    rows, weight = made(len(owners), INPUTS).requires_grad_(), made(3, OUTPUTS, INPUTS, seed=1)

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    def never(*_: object) -> None:
        raise AssertionError("a gradient of the weight was made")

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = grouped_linear(rows, weight, groups)
    assert saved == [(3, OUTPUTS, INPUTS)], "the weight itself, which is there anyway, and no rows"
    with monkeypatch.context() as patch:
        patch.setattr(reference, "rows_by_rows", never)
        out.sum().backward()
    assert rows.grad is not None


def test_dropout_is_on_the_input_of_lora_alone_and_keeps_the_mean() -> None:
    groups, owners = grouped((3, 4, 2))
    rows, weight = made(len(owners), INPUTS), made(3, OUTPUTS, INPUTS, seed=1)
    a, b = made(3, RANK, INPUTS, seed=3), made(3, OUTPUTS, RANK, seed=4)
    ids = torch.arange(len(owners))

    def dropping(rows: Tensor, seed: int, b: Tensor = b) -> Tensor:
        return grouped_linear(rows, weight, groups, None, Lora(a, b, 0.3), drop=Drop(0.3, seed, UP, ids))

    runs = torch.stack([dropping(rows, seed) for seed in range(2000)])
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], dropping(rows, 0))
    expected = grouped_linear(rows, weight, groups, None, Lora(a, b))
    error = (runs.mean(0) - expected).square().mean().sqrt() / (runs.var(0) / 2000).mean().sqrt()
    assert 0.5 < error < 1.6, "off by its standard error"
    assert torch.equal(dropping(rows, 1, torch.zeros_like(b)), grouped_linear(rows, weight, groups))
    leaf = rows.clone().requires_grad_()
    dropping(leaf, 1).sum().backward()
    mask = Drop(0.3, 1, UP, ids).keep(INPUTS) / 0.7
    by_hand = rows.clone().requires_grad_()
    (grouped_linear(by_hand, weight, groups) + grouped_linear(by_hand * mask, (b @ a), groups)).sum().backward()
    torch.testing.assert_close(leaf.grad, by_hand.grad)
    with pytest.raises(AssertionError, match="LoRA's dropout and its mask differ"):
        grouped_linear(rows, weight, groups, None, Lora(a, b, 0.3))


def test_gradients_with_dropout_are_the_finite_differences() -> None:
    groups, owners = grouped((3, 0, 4))
    leaves = (made(7, INPUTS), made(3, OUTPUTS, INPUTS, seed=1), made(3, RANK, INPUTS, seed=3), made(3, OUTPUTS, RANK))
    drop = Drop(0.4, 2, UP, torch.arange(len(owners)))

    def function(rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return grouped_linear(rows, weight, groups, None, Lora(a, b, 0.4), drop=drop)

    torch.autograd.gradcheck(function, tuple(leaf.requires_grad_() for leaf in leaves))


def test_autocast_does_not_reach_inside() -> None:
    groups, owners = grouped((3, 4, 2))
    rows, weight = made(len(owners), INPUTS, dtype=torch.float32), made(3, OUTPUTS, INPUTS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_linear(rows, weight, groups), grouped_linear(rows, weight, groups))
        inside = grouped_linear(rows.requires_grad_(), weight, groups)
        (gradient,) = torch.autograd.grad(inside.sum(), rows)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, grouped_linear(rows, weight, groups))
    assert gradient.dtype == torch.float32


def test_a_small_update_survives_bf16_better_than_folded() -> None:
    """Half of the weights' last digit and less: what of it comes out, against double precision."""
    groups = Groups(torch.tensor([64], dtype=torch.int32))
    rows, weight = made(64, 576).bfloat16(), (made(1, 1536, 576, seed=1) * 0.05).bfloat16()
    a, b = (made(1, 8, 576, seed=2) / 24).bfloat16(), (made(1, 1536, 8, seed=3) * 3e-4).bfloat16()
    true = rows.double() @ a[0].double().T @ b[0].double().T
    base = grouped_linear(rows, weight, groups).double()

    def error(adapted_rows: Tensor) -> float:
        return float((adapted_rows.double() - base - true).norm() / true.norm())

    folded, beside = (
        grouped_linear(rows, weight + b @ a, groups),
        grouped_linear(rows, weight, groups, None, Lora(a, b)),
    )
    assert error(folded) > 1 > error(beside), "folded it comes out as noise"


def test_buckets_are_few_and_add_little_padding() -> None:
    rows = torch.arange(1, 4097)
    sizes = bucket(rows)
    assert (sizes >= rows).all()
    assert ((sizes - rows) < (rows / 16).clamp(min=16)).all()
    assert len(sizes.unique()) <= 16 * 5
