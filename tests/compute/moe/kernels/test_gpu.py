"""The Triton kernels on a GPU: five models' shapes, three routings, output and gradients against double precision.

Not run by `make test`, which leaves out what is marked `gpu`: `pytest -m gpu tests/test_kernels_gpu.py` on a GPU.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.groups import sort_by_expert
from llama_stack_provider_moe.compute.moe.kernels.layer import Projection, expert_layer
from llama_stack_provider_moe.compute.moe.kernels.linear import Kernels, Lora
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation

pytestmark = pytest.mark.gpu
TOKENS = 512
# hidden, intermediate, experts, experts of a token; the largest with an eighth of the experts, for double precision
SHAPES = {
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "Mixtral-8x7B": (4096, 14336, 4, 2),
    "Granite-3.0-1b-a400m": (1024, 512, 32, 8),
    "gpt-oss-20b": (2880, 2880, 8, 4),
    "Llama-4-Scout": (5120, 8192, 4, 1),
}
ROUTINGS = ("balanced", "zipf", "one-hot")
# Of the replaced path's error against fp64, on the same numbers; both round what is in between.
NO_WORSE = 1.25


def routing(kind: str, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """(T, K): experts of each token, no one twice."""
    if kind == "one-hot":  # all first choices are one expert's
        rest = torch.rand(TOKENS, experts - 1, device="cuda", generator=generator).topk(top_k - 1).indices + 1
        return torch.cat([torch.zeros_like(rest[:, :1]) if top_k > 1 else rest.new_zeros(TOKENS, 1), rest], dim=1)
    weights_E = torch.ones(experts) if kind == "balanced" else 1 / torch.arange(1, experts + 1)
    return torch.multinomial(weights_E.to("cuda").expand(TOKENS, -1), top_k, generator=generator)


def swiglu(inner_SJ: Tensor) -> Tensor:
    gate, up = inner_SJ.chunk(2, dim=-1)
    return F.silu(gate) * up


def learnt(kernels: Kernels, leaves: dict[str, Tensor], index_TK: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and every gradient."""
    mine = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    up, down = (
        Projection(mine[name], None, Lora(mine[f"{name} a"], mine[f"{name} b"]) if f"{name} a" in mine else None)
        for name in ("up", "down")
    )
    found = sort_by_expert(index_TK, leaves["up"].shape[0], leaves["up"].dtype)
    out = expert_layer(mine["hidden"], mine["weights"], up, down, Activation(swiglu, "silu"), found, kernels)
    gradients = torch.autograd.grad(out, list(mine.values()), upstream.to(out.dtype))
    return {"out": out.detach(), **dict(zip(mine, gradients, strict=True))}


def off(one: Tensor, true: Tensor) -> float:
    return float((one.double() - true).norm() / true.norm())


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_the_path_it_replaces(shape: str, kind: str, dtype: torch.dtype, lora: bool) -> None:
    """Output and each gradient, against fp64; three more runs give the same, bit by bit."""
    from llama_stack_provider_moe.compute.moe.kernels import grouped

    hidden, inner, experts, top_k = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*sizes: int) -> Tensor:
        made = torch.randn(*sizes, device="cuda", generator=generator, dtype=torch.float32)
        return (made / sizes[-1] ** 0.5).to(dtype)

    leaves = {
        "hidden": random(TOKENS, hidden) * hidden**0.5, "weights": random(TOKENS, top_k),
        "up": random(experts, 2 * inner, hidden), "down": random(experts, hidden, inner),
    }  # fmt: skip
    if lora:
        leaves |= {"up a": random(experts, 16, hidden), "up b": random(experts, 2 * inner, 16)}
        leaves |= {"down a": random(experts, 16, inner), "down b": random(experts, hidden, 16)}
    index_TK = routing(kind, experts, top_k, generator)
    upstream = random(TOKENS, hidden)
    ours = learnt(grouped, leaves, index_TK, upstream)
    again: list[dict[str, Any]] = [learnt(grouped, leaves, index_TK, upstream) for _ in range(3)]
    for name, tensor in ours.items():
        assert all(torch.equal(each[name], tensor) for each in again), name
    twin = learnt(reference, leaves, index_TK, upstream)
    true = learnt(reference, {name: leaf.double() for name, leaf in leaves.items()}, index_TK, upstream.double())
    for name, tensor in true.items():
        assert off(ours[name], tensor) <= NO_WORSE * off(twin[name], tensor) + 1e-6, name


@pytest.mark.parametrize("rank", [1, 5, 64, 100, 256])
@pytest.mark.parametrize("tokens", [1, 3, 700])
def test_any_rank_and_sizes_that_no_tile_divides(rank: int, tokens: int) -> None:
    from llama_stack_provider_moe.compute.moe.kernels import grouped
    from llama_stack_provider_moe.compute.moe.kernels.groups import Groups
    from llama_stack_provider_moe.compute.moe.kernels.linear import grouped_linear

    generator = torch.Generator("cuda").manual_seed(rank)
    rows = torch.randn(tokens, 333, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(3, 517, 333, device="cuda", generator=generator).bfloat16() / 18
    lora = Lora(
        torch.randn(3, rank, 333, device="cuda", generator=generator).bfloat16() / 18,
        torch.randn(3, 517, rank, device="cuda", generator=generator).bfloat16() / rank**0.5,
    )
    groups = Groups(torch.tensor([tokens // 2, tokens // 2, tokens], device="cuda", dtype=torch.int32))
    ours = grouped_linear(rows, weight, groups, None, lora, grouped)
    twin = grouped_linear(rows, weight, groups, None, lora, reference)
    true = grouped_linear(
        rows.double(), weight.double(), groups, None, Lora(lora.a_ERI.double(), lora.b_EOR.double()), reference
    )
    assert off(ours, true) <= NO_WORSE * off(twin, true) + 1e-6


def test_nothing_waits_for_the_device() -> None:
    """Forward and backward ask the device for nothing, once tiles are chosen."""
    from llama_stack_provider_moe.compute.moe.kernels import grouped

    generator = torch.Generator("cuda").manual_seed(0)
    leaves = {
        "hidden": torch.randn(64, 256, device="cuda").bfloat16(),
        "weights": torch.rand(64, 2, device="cuda").bfloat16(),
        "up": torch.randn(8, 512, 256, device="cuda").bfloat16() / 16,
        "down": torch.randn(8, 256, 256, device="cuda").bfloat16() / 16,
    }  # fmt: skip
    index_TK = torch.rand(64, 8, device="cuda", generator=generator).topk(2).indices
    upstream = torch.randn(64, 256, device="cuda").bfloat16()
    learnt(grouped, leaves, index_TK, upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        learnt(grouped, leaves, index_TK, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
