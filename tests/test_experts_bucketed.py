"""The bucketed experts compute what transformers' eager ones do, in every layout, forward and backward.

So does LoRA beside them, which PEFT folds into the weights.
"""

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.experts.adapters import add_lora
from llama_stack_provider_moe.experts.bucketed import BUCKETED, _grouped, _Weights, bucket
from llama_stack_provider_moe.experts.layout import find_layout
from llama_stack_provider_moe.experts.settings import apply_moe, resolve_moe
from llama_stack_provider_moe.spec import Adapter, Moe
from tests import tiny_models


def learnt(family: str, few_shapes: bool, tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (1, T, V) and every gradient of one backward, in double precision."""
    model = tiny_models.model(family).double().eval()
    layout = find_layout(model)
    # Eager, for grouped_mm takes no double precision.
    resolved = resolve_moe(Moe(enable_moe_optimizations=few_shapes), layout, full=True, few_shapes=few_shapes)
    apply_moe(model, layout, resolved)
    assert resolved.experts_implementation == (BUCKETED if few_shapes else "eager")
    ids = 3 + torch.arange(tokens).unsqueeze(0) % (tiny_models.VOCAB_SIZE - 3)  # 0 is padding, whose embedding is 0
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("family", tiny_models.GROUPED)
def test_equal_to_the_eager_ones(family: str, tokens: int) -> None:
    logits, gradients = learnt(family, True, tokens)
    expected, expected_gradients = learnt(family, False, tokens)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert any(gradient.abs().max() > 0 for name, gradient in gradients.items() if "down_proj" in name)


def adapted(family: str, beside: bool) -> PeftModel:
    """In double precision, with LoRA on all of it, always the same; B begins at zero, and would hide A's gradient."""
    model = tiny_models.model(family).eval()
    layout = find_layout(model)
    resolved = resolve_moe(Moe(enable_moe_optimizations=beside), layout, full=False, few_shapes=beside)
    apply_moe(model, layout, resolved)
    peft_model, report = add_lora(model, Adapter(rank=4, alpha=12), layout, resolved)
    assert any("beside their weights" in note for note in report.notes) == beside
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return peft_model.double().eval()


def answer(model: nn.Module, tokens: int = 37) -> Any:
    ids = 3 + torch.arange(tokens).unsqueeze(0) % (tiny_models.VOCAB_SIZE - 3)
    return model(input_ids=ids).logits


def no_fold(*_: object, **__: object) -> None:
    raise AssertionError("LoRA was folded into the weights")


@pytest.mark.parametrize("family", tiny_models.GROUPED)
def test_lora_beside_the_weights_equals_the_fold(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folded = adapted(family, beside=False)
    answer(folded).square().mean().backward()
    expected = {name: p.grad for name, p in folded.named_parameters() if p.grad is not None}
    beside = adapted(family, beside=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "baddbmm", no_fold)  # PEFT's
        logits = answer(beside)
        logits.square().mean().backward()
    torch.testing.assert_close(logits, answer(folded))
    gradients = {name: p.grad for name, p in beside.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected)
    with beside.disable_adapter(), folded.disable_adapter():
        torch.testing.assert_close(answer(beside), answer(folded))
    beside.merge_adapter()
    torch.testing.assert_close(answer(beside), logits.detach())


def test_a_young_update_is_seen_better_in_bf16_than_folded() -> None:
    """Half of the weights' last digit and less: what of it comes out, against double precision."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    rows, weight = made(64, 576, scale=1).bfloat16(), made(1, 1536, 576, scale=0.05).bfloat16()
    lora_a, lora_b = made(1, 8, 576, scale=1 / 24).bfloat16(), made(1, 1536, 8, scale=3e-4).bfloat16()
    true = rows.double() @ lora_a[0].double().T @ lora_b[0].double().T
    base = _grouped(rows, [64], _Weights(weight, None)).double()

    def error(adapted_rows: torch.Tensor) -> float:
        return float((adapted_rows.double() - base - true).norm() / true.norm())

    folded = error(_grouped(rows, [64], _Weights(weight + lora_b @ lora_a, None)))
    beside = error(_grouped(rows, [64], _Weights(weight, None, lora_a, lora_b)))
    assert folded > 1 > beside, "folded it comes out as noise"


def test_an_offer_that_nobody_takes_is_an_error() -> None:
    model = adapted("mixtral", beside=True)
    model.get_base_model().set_experts_implementation("eager")
    with pytest.raises(AdapterError, match="had no effect in a forward"):
        answer(model)


def test_buckets_are_few_and_little_is_filled_up() -> None:
    sizes = [bucket(rows) for rows in range(1, 4097)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert all(size - rows < max(16, rows / 4) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 4 * 12
