"""A whole expert layer that recomputes what it does not keep, against the steps that keep everything."""

from functools import partial as partial_of
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.drop import DOWN, INNER, UP, Drop, Dropout
from llama_stack_provider_moe.compute.moe.kernels.groups import sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.layer import Projection, expert_layer, kept_layer
from llama_stack_provider_moe.compute.moe.kernels.linear import Lora, grouped_linear
from llama_stack_provider_moe.compute.moe.kernels.permute import combine, dispatch
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation, ActivationKind

TOKENS, CHOICES, EXPERTS, HIDDEN, INNER_SIZE, RANK = 7, 2, 3, 6, 4, 2


class Kept:
    """A weight that stands for one in another form."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.dtype, self.shape = weight, weight.dtype, tuple(weight.shape)

    def expert(self, number: int) -> Tensor:
        return self.weight[number]

    def whole(self) -> Tensor:
        return self.weight


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def swiglu(inner_SJ: Tensor) -> Tensor:
    gate, up = inner_SJ.chunk(2, dim=-1)
    return F.silu(gate) * up


def leaves(bias: bool, lora: bool) -> dict[str, Tensor]:
    shapes = {
        "hidden": (TOKENS, HIDDEN), "weights": (TOKENS, CHOICES),
        "up": (EXPERTS, 2 * INNER_SIZE, HIDDEN), "down": (EXPERTS, HIDDEN, INNER_SIZE),
    }  # fmt: skip
    if bias:
        shapes |= {"up_bias": (EXPERTS, 2 * INNER_SIZE), "down_bias": (EXPERTS, HIDDEN)}
    if lora:
        shapes |= {"up_a": (EXPERTS, RANK, HIDDEN), "up_b": (EXPERTS, 2 * INNER_SIZE, RANK)}
        shapes |= {"down_a": (EXPERTS, RANK, INNER_SIZE), "down_b": (EXPERTS, HIDDEN, RANK)}
    return {name: made(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}


def projection(found: dict[str, Tensor], name: str, stored: bool) -> Projection:
    lora = Lora(found[f"{name}_a"], found[f"{name}_b"]) if f"{name}_a" in found else None
    return Projection(Kept(found[name]) if stored else found[name], found.get(f"{name}_bias"), lora)


def routed(partial: bool) -> Tensor:
    return torch.randint(0, EXPERTS + partial, (TOKENS, CHOICES), generator=torch.Generator().manual_seed(3))


def forgetful(
    found: dict[str, Tensor],
    index_TK: Tensor,
    stored: bool,
    dtype: torch.dtype,
    partial: bool,
    keep_rows: bool = False,
    kind: ActivationKind = "other",
) -> Tensor:
    return expert_layer(
        found["hidden"], found["weights"], projection(found, "up", stored), projection(found, "down", stored),
        Activation(swiglu, kind), sort_by_expert(index_TK, EXPERTS, dtype, partial=partial), reference,
        keep_rows=keep_rows,
    )  # fmt: skip


def keeping(found: dict[str, Tensor], index_TK: Tensor, dtype: torch.dtype, partial: bool) -> Tensor:
    rows = sort_by_expert(index_TK, EXPERTS, dtype, partial=partial)
    up, down = (projection(found, name, False) for name in ("up", "down"))
    inner = grouped_linear(dispatch(found["hidden"], rows), up.weight, rows.groups, up.bias_EO, up.lora)
    out = grouped_linear(swiglu(inner), down.weight, rows.groups, down.bias_EO, down.lora)
    return combine(out, found["weights"], rows)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(("keep_rows", "kind"), [(False, "other"), (True, "silu")])
def test_gradients_are_the_finite_differences(
    keep_rows: bool, kind: ActivationKind, partial: bool, stored: bool, bias: bool, lora: bool
) -> None:
    """In double precision, of everything that can have one; also where some choices are of no expert."""
    start = leaves(bias, lora)
    index_TK = routed(partial)
    fixed = {name: leaf for name, leaf in start.items() if stored and name in ("up", "down")}
    names = [name for name in start if name not in fixed]

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True)) | fixed
        return forgetful(given, index_TK, stored, torch.float64, partial, keep_rows, kind)

    torch.autograd.gradcheck(function, [start[name].requires_grad_() for name in names])
    torch.testing.assert_close(
        forgetful(start, index_TK, stored, torch.float64, partial, keep_rows, kind),
        keeping(start, index_TK, torch.float64, partial),
    )


@pytest.mark.parametrize("wanted", ["hidden", "weights", "up", "down_bias", "up_a", "up_b", "down_a", "down_b"])
def test_each_gradient_alone(wanted: str) -> None:
    """Nothing that is made for one gradient is missed by another; what was not asked for gets none."""
    index_TK = routed(False)
    found = []
    for way in ("forgetful", "rows kept", "keeping"):
        tensors = leaves(True, True)
        tensors[wanted].requires_grad_()
        if way != "keeping":
            out = forgetful(tensors, index_TK, False, torch.float64, False, way == "rows kept")
        else:
            out = keeping(tensors, index_TK, torch.float64, False)
        out.square().sum().backward()
        assert [name for name, leaf in tensors.items() if leaf.grad is not None] == [wanted]
        found.append(tensors[wanted].grad)
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize("partial", [False, True])
def test_padding_rows_have_no_effect(partial: bool) -> None:
    """In half precision on a CPU each expert's rows are filled up with others; against double precision."""
    index_TK = routed(partial)
    half = {name: leaf.to(torch.bfloat16).requires_grad_() for name, leaf in leaves(True, True).items()}
    true = {name: leaf.detach().double().requires_grad_() for name, leaf in half.items()}
    out = forgetful(half, index_TK, False, torch.bfloat16, partial)
    expected = keeping(true, index_TK, torch.float64, partial)
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.3)
    out.double().sum().backward()
    expected.sum().backward()
    for name, leaf in half.items():
        mine, theirs = leaf.grad, true[name].grad
        assert mine is not None
        assert theirs is not None
        assert ((mine - theirs).norm() / theirs.norm()).item() < 0.03, name


@pytest.mark.parametrize("keep_rows", [False, True])
def test_only_the_input_and_the_up_projection_are_kept(keep_rows: bool) -> None:
    tensors = {name: leaf.requires_grad_() for name, leaf in leaves(True, True).items()}
    kept: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Any:
        kept[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        forgetful(tensors, routed(False), False, torch.float64, False, keep_rows)
    rows = TOKENS * CHOICES
    activations = sorted(
        shape for place, shape in kept.items() if place not in {t.data_ptr() for t in tensors.values()}
    )
    # Beside what went in: the up projection's output, and LoRA's two thin products; the rows of the input, if asked.
    of_input = [(rows, HIDDEN)] if keep_rows else []
    assert activations == [(rows, RANK), (rows, RANK), *of_input, (rows, 2 * INNER_SIZE)]


def test_rows_are_not_kept_where_no_gradient_reads_them() -> None:
    tensors = leaves(False, False)
    tensors["hidden"].requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: kept.append(tuple(each.shape)) or each, lambda each: each
    ):
        forgetful(tensors, routed(False), False, torch.float64, False, True)
    assert (TOKENS * CHOICES, HIDDEN) not in kept


DROPPING = {"up": 0.3, "down": 0.4}
SEED, SHARE = 11, 0.2


def dropping(
    found: dict[str, Tensor],
    index_TK: Tensor,
    keeps: bool | None,
    dtype: torch.dtype = torch.float64,
    partial: bool = False,
) -> Tensor:
    """The layer with three kinds of dropout, recomputed, step by step, or (None) recomputed from kept rows."""
    up, down = (
        Projection(found[name], found.get(f"{name}_bias"), Lora(found[f"{name}_a"], found[f"{name}_b"], share))
        for name, share in DROPPING.items()
    )
    compute: Any = {True: kept_layer, False: expert_layer, None: partial_of(expert_layer, keep_rows=True)}[keeps]
    rows = sort_by_expert(index_TK, EXPERTS, dtype, partial=partial)
    return compute(  # type: ignore[no-any-return]
        found["hidden"], found["weights"], up, down, Activation(swiglu), rows, reference, dropout=Dropout(SEED, SHARE)
    )


@pytest.mark.parametrize("keeps", [False, True, None])
@pytest.mark.parametrize("partial", [False, True])
def test_gradients_with_dropout_are_the_finite_differences(partial: bool, keeps: bool | None) -> None:
    start = leaves(True, True)
    index_TK = routed(partial)

    def function(*tensors: Tensor) -> Tensor:
        return dropping(dict(zip(start, tensors, strict=True)), index_TK, keeps, partial=partial)

    torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in start.values()])
    torch.testing.assert_close(
        dropping(start, index_TK, keeps, partial=partial), dropping(start, index_TK, False, partial=partial)
    )


def test_dropout_by_hand() -> None:
    """One choice after the other, with masks of its id, token * K + k, in three streams."""
    found, index_TK = leaves(True, True), routed(False)
    ids = torch.arange(TOKENS * CHOICES)
    masks = {
        stream: Drop(share, SEED, stream, ids).keep(size) / (1 - share)
        for stream, share, size in ((UP, 0.3, HIDDEN), (INNER, SHARE, INNER_SIZE), (DOWN, 0.4, INNER_SIZE))
    }
    expected = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for choice in range(CHOICES):
            row, expert = token * CHOICES + choice, int(index_TK[token, choice])
            x = found["hidden"][token]
            low = found["up_a"][expert] @ (x * masks[UP][row])
            inner = found["up"][expert] @ x + found["up_b"][expert] @ low + found["up_bias"][expert]
            g = swiglu(inner) * masks[INNER][row]
            low = found["down_a"][expert] @ (g * masks[DOWN][row])
            out = found["down"][expert] @ g + found["down_b"][expert] @ low + found["down_bias"][expert]
            expected[token] += found["weights"][token, choice] * out
    torch.testing.assert_close(dropping(found, index_TK, False), expected)


def test_padding_changes_no_mask() -> None:
    """In bf16 on a CPU each expert's rows are filled up; in double precision there is no padding."""
    index_TK = routed(False)
    half = {name: leaf.to(torch.bfloat16) for name, leaf in leaves(True, True).items()}
    true = {name: leaf.double() for name, leaf in half.items()}
    expected = dropping(true, index_TK, False)
    for keeps in (False, True):
        found = dropping(half, index_TK, keeps, torch.bfloat16).double()
        assert ((found - expected).norm() / expected.norm()).item() < 0.02
    other = expert_layer(
        true["hidden"], true["weights"], projection(true, "up", False), projection(true, "down", False),
        Activation(swiglu), sort_by_expert(index_TK, EXPERTS, torch.float64), reference,
    )  # fmt: skip
    assert ((other - expected).norm() / expected.norm()).item() > 0.2, "the masks matter"


def test_with_dropout_no_more_is_kept() -> None:
    tensors = {name: leaf.requires_grad_() for name, leaf in leaves(True, True).items()}
    kept: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Any:
        if tensor.is_floating_point():
            kept[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        dropping(tensors, routed(False), False)
    rows = TOKENS * CHOICES
    places = {tensor.data_ptr() for tensor in tensors.values()}
    activations = [shape for place, shape in kept.items() if place not in places and shape[:1] == (rows,)]
    assert sorted(activations) == [(rows, RANK), (rows, RANK), (rows, 2 * INNER_SIZE)]
