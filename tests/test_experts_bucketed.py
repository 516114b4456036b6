"""The bucketed experts compute what transformers' eager ones do, in every layout, forward and backward."""

import pytest
import torch

from llama_stack_provider_moe.experts.bucketed import BUCKETED, bucket
from llama_stack_provider_moe.experts.layout import find_layout
from llama_stack_provider_moe.experts.settings import apply_moe, resolve_moe
from llama_stack_provider_moe.spec import Moe
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
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}")
    assert any(gradient.abs().max() > 0 for name, gradient in gradients.items() if "down_proj" in name)


def test_buckets_are_few_and_little_is_filled_up() -> None:
    sizes = [bucket(rows) for rows in range(1, 4097)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1))
    assert all(size - rows < max(16, rows / 4) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 4 * 12
