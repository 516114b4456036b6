"""The trial that `experts_backend: auto` runs on a GPU, here on a CPU, with torch's kernels and broken ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.quantize import quantize
from tests.support import tiny_models

pytest.importorskip("triton", reason="triton is published for Linux only")
CPU = torch.device("cpu")


def kernels_with(**changes: Any) -> Any:
    """Torch's kernels, with `changes` in place of some."""
    names = ("WIDEST_RANK", "product", "rows_by_rows", "gated", "gated_backward", "weighted_sum")
    return SimpleNamespace(**{name: getattr(reference, name) for name in names} | changes)


def first_experts(family: str, bits: Any = None) -> tuple[Any, int, int]:
    model = tiny_models.model(family)
    layout = find_layout(model)
    assert layout is not None
    if bits is not None:
        quantize(model, layout, bits, CPU)
    return next(iter(layout.experts(model).values())), model.config.get_text_config().hidden_size, layout.top_k


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    ("family", "bits"), [("mixtral", None), ("gpt_oss", None), ("llama4_text", None), ("qwen3_moe", 4)]
)
def test_incorrect_kernels_are_rejected_however_fast(family: str, bits: Any, rank: int) -> None:
    from llama_stack_provider_moe.compute.moe.kernel_choice import fastest, summary, try_layer

    def slightly(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, low = reference.product(*arguments, **options)
        return out * 1.01, low

    def nowhere(rows: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return torch.full_like(reference.weighted_sum(rows, *arguments, **options), torch.nan)

    def broken(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nMore of it.")

    experts, hidden, top_k = first_experts(family, bits)
    candidates = {
        "torch": kernels_with(), "again": kernels_with(), "slightly off": kernels_with(product=slightly),
        "NaN": kernels_with(weighted_sum=nowhere), "broken": kernels_with(gated=broken),
    }  # fmt: skip
    trials = try_layer(experts, candidates, tokens=19, hidden=hidden, top_k=top_k, rank=rank)
    assert {name for name, trial in trials.items() if trial.ms is not None} == {"torch", "again"}
    assert trials["slightly off"].reason.startswith("is off by 0.0")
    assert trials["NaN"].reason == "is off by nan of the norm, so it is not used"
    assert trials["broken"].reason == "failed (RuntimeError: Failed to find C compiler.)"
    assert fastest(trials) in ("torch", "again")
    assert "19 tokens: torch " in summary(trials, 19)
    assert all(parameter.grad is None for parameter in experts.parameters()), "a trial must leave no gradients behind"


def test_the_fastest_kernel_wins() -> None:
    from llama_stack_provider_moe.compute.moe.kernel_choice import Trial, fastest, summary

    trials = {"torch": Trial(2.5), "triton": Trial(1.25), "other": Trial(None, "failed")}
    assert fastest(trials) == "triton"
    assert summary(trials, 8192) == (
        "one layer forward and backward, 8,192 tokens: torch 2.5 ms, triton 1.25 ms, other failed"
    )
