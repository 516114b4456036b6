"""The products by quack-kernels, with its documented GEMM in torch in place of the one that needs a GPU."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import quack, reference
from llama_stack_provider_moe.compute.moe.kernels.drop import Dropout
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups, sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.layer import Projection, expert_layer
from llama_stack_provider_moe.compute.moe.kernels.linear import Lora
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation
from tests.support import quack_gemm

CALLS: list[str] = []


@pytest.fixture(autouse=True)
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    def gemm(*arguments: Any, **options: Any) -> Tensor:
        CALLS.append("rows" if "cu_seqlens_m" in options else "outer")
        return quack_gemm.gemm(*arguments, **options)

    CALLS.clear()
    monkeypatch.setattr(quack, "gemm", lambda: gemm)


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made / shape[-1] ** 0.5).to(dtype)


@pytest.mark.parametrize(("sizes", "strays"), [((9, 0, 33), 0), ((0, 40, 0), 0), ((5, 0, 7), 4), ((0, 0, 0), 0)])
@pytest.mark.parametrize(("outputs", "inputs"), [(80, 72), (67, 133)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_the_references(
    sizes: tuple[int, ...], strays: int, outputs: int, inputs: int, transposed: bool
) -> None:
    """Sides that 8 divides or not, experts without rows, rows of no expert, weights stored either way round."""
    groups = Groups(torch.tensor(sizes).cumsum(0).int(), partial=strays > 0)
    rows = sum(sizes) + strays
    weight = made(3, inputs, outputs, seed=1).mT if transposed else made(3, outputs, inputs, seed=1)
    bias, a, b = made(3, outputs, seed=2), made(3, 4, inputs, seed=3), made(3, outputs, 4, seed=4)
    index = torch.randperm(rows + 5, generator=torch.Generator().manual_seed(0))[:rows]
    for flip, indexed in itertools.product((False, True), (False, True)):
        x = made(rows + 5 if indexed else rows, outputs if flip else inputs, seed=5)
        first, second = (b.mT, a.mT) if flip else (a, b)
        options: dict[str, Any] = {"flip": flip, "index_S": index if indexed else None}
        given = (x, weight, groups, first, second, None if flip else bias)
        for one, other in zip(quack.product(*given, **options), reference.product(*given, **options), strict=True):
            torch.testing.assert_close(one, other)
    assert set(CALLS) == {"rows"}
    left, right = made(rows, outputs, seed=6), made(rows, inputs, seed=7)
    torch.testing.assert_close(quack.rows_by_rows(left, right, groups), reference.rows_by_rows(left, right, groups))
    assert CALLS[-1] == "outer"
    CALLS.clear()
    thin = made(rows, 16, seed=8)
    torch.testing.assert_close(quack.rows_by_rows(thin, right, groups), reference.rows_by_rows(thin, right, groups))
    assert not CALLS, "thin products are not its work"


def swiglu(inner_SJ: Tensor) -> Tensor:
    gate, up = inner_SJ.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_layers_gradients_are_the_references(share: float, trains: bool) -> None:
    """With LoRA, biases and dropout; frozen weights have no product of their own gradient."""
    shapes = {
        "hidden": (19, 72), "weights": (19, 2), "up": (3, 160, 72), "up bias": (3, 160), "up a": (3, 4, 72),
        "up b": (3, 160, 4), "down": (3, 72, 80), "down bias": (3, 72), "down a": (3, 4, 80), "down b": (3, 72, 4),
    }  # fmt: skip
    leaves = {name: made(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    index_TK = torch.randint(0, 3, (19, 2), generator=torch.Generator().manual_seed(1))
    found = []
    for kernels in (quack, reference):
        mine = {
            name: leaf.clone().requires_grad_(trains or name not in ("up", "down")) for name, leaf in leaves.items()
        }
        up, down = (
            Projection(mine[name], mine[f"{name} bias"], Lora(mine[f"{name} a"], mine[f"{name} b"], share))
            for name in ("up", "down")
        )
        out = expert_layer(
            mine["hidden"], mine["weights"], up, down, Activation(swiglu), sort_by_expert(index_TK, 3, torch.float64),
            kernels, Dropout(3, share) if share else None,
        )  # fmt: skip
        out.square().sum().backward()
        found.append({"out": out.detach()} | {name: leaf.grad for name, leaf in mine.items() if leaf.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], msg=name)
    assert (CALLS.count("rows"), CALLS.count("outer")) == (4, 2 if trains else 0)


def test_it_is_imported_only_to_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import patches classes of CuTe's, so `auto` looks at its metadata alone."""
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "quack", None)
    quack.installed()
    quack.gemm.cache_clear()
    with pytest.raises(ModuleNotFoundError):
        quack.gemm()
