"""A whole expert layer that recomputes what it does not keep, against the steps that keep everything."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.groups import sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.layer import Projection, expert_layer
from llama_stack_provider_moe.compute.moe.kernels.linear import Lora, grouped_linear
from llama_stack_provider_moe.compute.moe.kernels.permute import combine, dispatch
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation, ActivationKind

TOKENS, CHOICES, EXPERTS, HIDDEN, INNER, RANK = 7, 2, 3, 6, 4, 2


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
        "up": (EXPERTS, 2 * INNER, HIDDEN), "down": (EXPERTS, HIDDEN, INNER),
    }  # fmt: skip
    if bias:
        shapes |= {"up_bias": (EXPERTS, 2 * INNER), "down_bias": (EXPERTS, HIDDEN)}
    if lora:
        shapes |= {"up_a": (EXPERTS, RANK, HIDDEN), "up_b": (EXPERTS, 2 * INNER, RANK)}
        shapes |= {"down_a": (EXPERTS, RANK, INNER), "down_b": (EXPERTS, HIDDEN, RANK)}
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
    assert activations == [(rows, RANK), (rows, RANK), *of_input, (rows, 2 * INNER)]


def test_rows_are_not_kept_where_no_gradient_reads_them() -> None:
    tensors = leaves(False, False)
    tensors["hidden"].requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: kept.append(tuple(each.shape)) or each, lambda each: each
    ):
        forgetful(tensors, routed(False), False, torch.float64, False, True)
    assert (TOKENS * CHOICES, HIDDEN) not in kept
