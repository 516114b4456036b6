"""The trial that `experts_backend: auto` makes on a GPU, here on a CPU, with torch's kernels and spoilt ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.experts.backend import OURS, TRITON, kernels_of, unserved
from llama_stack_provider_moe.experts.kernels import reference
from llama_stack_provider_moe.experts.layout import find_layout
from llama_stack_provider_moe.experts.quantize import quantize
from llama_stack_provider_moe.experts.settings import resolve_moe
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.training.stages import _choose_kernels
from tests import tiny_models

pytest.importorskip("triton", reason="triton is published for Linux only")
CPU = torch.device("cpu")


def spoilt(**changes: Any) -> Any:
    """Torch's kernels but for those in `changes`."""
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
def test_a_wrong_way_is_out_however_quick(family: str, bits: Any, rank: int) -> None:
    from llama_stack_provider_moe.experts.trial import quickest, tell, try_layer

    def slightly(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, low = reference.product(*arguments, **options)
        return out * 1.01, low

    def nowhere(rows: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return torch.full_like(reference.weighted_sum(rows, *arguments, **options), torch.nan)

    def broken(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nMore of it.")

    experts, hidden, top_k = first_experts(family, bits)
    ways = {
        "torch": spoilt(), "again": spoilt(), "slightly off": spoilt(product=slightly),
        "NaN": spoilt(weighted_sum=nowhere), "broken": spoilt(gated=broken),
    }  # fmt: skip
    trials = try_layer(experts, ways, tokens=19, hidden=hidden, top_k=top_k, rank=rank)
    assert {name for name, trial in trials.items() if trial.ms is not None} == {"torch", "again"}
    assert trials["slightly off"].reason.startswith("is off by 0.0")
    assert trials["NaN"].reason == "is off by nan of the norm, so it is not used"
    assert trials["broken"].reason == "failed (RuntimeError: Failed to find C compiler.)"
    assert quickest(trials) in ("torch", "again")
    assert "19 tokens: torch " in tell(trials, 19)
    assert all(parameter.grad is None for parameter in experts.parameters()), "a trial leaves nothing behind"


def test_the_quickest_is_taken() -> None:
    from llama_stack_provider_moe.experts.trial import Trial, quickest, tell

    trials = {"torch": Trial(2.5), "triton": Trial(1.25), "other": Trial(None, "failed")}
    assert quickest(trials) == "triton"
    assert tell(trials, 8192) == (
        "a layer forward and backward, 8,192 tokens: torch 2.5 ms, triton 1.25 ms, other failed"
    )


def test_what_kernels_cannot_do_is_said() -> None:
    experts, *_ = first_experts("mixtral")
    assert unserved(experts, OURS, CPU, drops=True, rank=256) == []
    assert unserved(experts, TRITON, CPU, drops=False, rank=64) == []
    assert unserved(experts, TRITON, CPU, drops=True, rank=65) == [
        "LoRA of rank 65 beside the base's pass, not in it: that has room for 64",
        "all activations of experts are kept: dropout would be drawn anew",
    ]
    experts.act_fn = torch.nn.GELU()
    assert unserved(experts, TRITON, CPU, drops=False, rank=0) == [
        "MixtralExperts's activation by torch: no kernel has its formula"
    ]
    assert kernels_of(TRITON) is not kernels_of(OURS)


def test_the_clock_does_not_choose_where_a_job_is_to_be_repeatable() -> None:
    """Nothing is timed, so this holds without a GPU too."""
    model = tiny_models.model("mixtral")
    layout = find_layout(model)
    assert layout is not None
    body = {"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}, "options": {"deterministic": True}}
    session: Any = SimpleNamespace(spec=JOB_SPEC.validate_python(body))
    found = _choose_kernels(session, model, layout, resolve_moe(session.spec.moe, layout, full=True))
    assert found.experts_implementation == OURS
    assert found.notes[-1] == "no trial of Triton's kernels: the clock is not to choose (options.deterministic)"
