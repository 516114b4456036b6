"""Masked experts are never chosen, in every family; the family's own choice among the others remains."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.moe.adapters import add_lora
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.masking import masked_experts
from llama_stack_provider_moe.compute.moe.resolve_settings import resolve_moe
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models

IDS = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(5))


def made(family: str, **changes: Any) -> tuple[PreTrainedModel, ExpertLayout]:
    model = tiny_models.model(family, **changes)
    layout = find_layout(model)
    assert layout is not None
    generator = torch.Generator().manual_seed(9)
    for bias in layout.biases(model).values():  # zero in a new model: masking must hold against a bias for an expert
        bias.data.copy_(torch.rand(bias.shape, generator=generator))
    return model, layout


def shares(model: PreTrainedModel, layout: ExpertLayout) -> list[list[float]]:
    recorder = RoutingRecorder(model, layout)
    with torch.no_grad(), recorder.recording(None):
        model(IDS)
    recorder.close()
    return [layer.share for layer in recorder.take()]


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_masked_experts_get_no_token_and_the_model_is_restored(family: str) -> None:
    model, layout = made(family)
    before = state(model)
    with torch.no_grad():
        untouched = model(IDS).logits
    free = shares(model, layout)
    busiest = {layer: [share.index(max(share))] for layer, share in zip(layout.moe_layers, free, strict=True)}
    assert all(max(share) > 0.25 for share in free)
    with masked_experts(model, layout, busiest):
        masked = shares(model, layout)
        with torch.no_grad():
            outputs = model(IDS).logits
    for layer, share in zip(layout.moe_layers, masked, strict=True):
        assert share[busiest[layer][0]] == 0
        assert sum(share) == pytest.approx(1)
    assert outputs.isfinite().all()
    assert (outputs - untouched).abs().max() > 1e-4
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, untouched)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert shares(model, layout) == free


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_masking_is_as_if_the_router_had_no_such_expert(family: str) -> None:
    """A twin whose last expert is cut off, weights and all, computes what masking the last expert does."""
    one_group = {"n_group": 1, "topk_group": 1} if family in ("glm4_moe", "deepseek_v3") else {}
    model, layout = made(family, **one_group)
    key = next(key for key in ("num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts")
               if key in tiny_models.FAMILIES[family])  # fmt: skip
    twin = tiny_models.model(family, **one_group, **{key: 3})
    theirs = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    with torch.no_grad():
        for name, ours in [*model.named_parameters(), *model.named_buffers()]:
            if ours.shape == theirs[name].shape:
                theirs[name].copy_(ours)
            else:
                theirs[name].copy_(ours[:, :3] if ours.shape[0] == 1 else ours[:3])
        expected = twin(IDS).logits
        with masked_experts(model, layout, {layer: [3] for layer in layout.moe_layers}):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_named_choose_as_before() -> None:
    model, layout = made("mixtral")
    free = shares(model, layout)
    with masked_experts(model, layout, {1: [2, 0]}):
        masked = shares(model, layout)
    assert masked[0] == free[0]
    assert masked[1][0] == masked[1][2] == 0


def test_adapters_on_routers_are_masked_too() -> None:
    model, layout = made("qwen3_moe")
    adapter, moe = Adapter(rank=2, plan="trunk"), Moe(train_router=True)
    adapted = add_lora(model, adapter, layout, resolve_moe(moe, layout, full=False)).model
    with masked_experts(adapted, layout, {0: [1, 3]}):
        masked = shares(adapted, layout)
    assert masked[0][1] == masked[0][3] == 0


def test_an_error_inside_restores_the_model() -> None:
    model, layout = made("deepseek_v3")
    before = state(model)
    with pytest.raises(KeyError), masked_experts(model, layout, {1: [0]}):
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    with masked_experts(model, layout, {1: [0]}), pytest.raises(RuntimeError):
        layout.routers(model)[1](torch.zeros(2, 5))  # of another width
    assert shares(model, layout)[0][0] > 0


@pytest.mark.parametrize(
    ("family", "masked", "told"),
    [
        ("mixtral", {2: [0]}, r"masked: 2 is not valid; expected layers with experts: 0, 1"),
        ("mixtral", {0: [4]}, r"masked\[0\]: 4 is not valid; expected experts 0 to 3"),
        ("mixtral", {1: [0, 1, 2]}, r"masked\[1\]: \[0, 1, 2\] is not valid; .* every token can choose 2"),
    ],
)
def test_invalid_masks_are_refused(family: str, masked: dict[int, list[int]], told: str) -> None:
    model, layout = made(family)
    with pytest.raises(InvalidInput, match=told), masked_experts(model, layout, masked):
        pass


def test_a_token_of_one_expert_needs_no_more_than_one() -> None:
    model, layout = made("llama4_text")
    with masked_experts(model, layout, {1: [0, 1, 3]}):
        assert shares(model, layout) == [[0, 0, 1, 0]]
    with (
        pytest.raises(InvalidInput, match="can choose 1"),
        masked_experts(model, layout, {1: [0, 1, 2, 3]}),
    ):
        pass


def test_a_chosen_group_must_hold_enough_for_a_token() -> None:
    """Groups of four, one is chosen, of which a token takes three."""
    changes = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
    model, layout = made("deepseek_v3", **changes)
    with masked_experts(model, layout, {1: [3, 4]}):
        assert shares(model, layout)[0][3:5] == [0, 0]
    with pytest.raises(InvalidInput, match="every token can choose 3"), masked_experts(model, layout, {1: [0, 1]}):
        pass


@pytest.mark.parametrize("products", [0, 2])
def test_a_router_without_exactly_one_product_is_an_error(products: int) -> None:
    """What was masked might not be what it chooses by."""
    model, layout = made("mixtral")
    router = layout.routers(model)[0]
    once = router.forward
    kept = once(torch.zeros(2, 32))
    router.forward = lambda hidden: [kept, *(once(hidden) for _ in range(products))][-1]
    with masked_experts(model, layout, {0: [1]}), pytest.raises(AssertionError, match=rf"its logits {products} times"):
        router(torch.zeros(2, 32))


def test_masks_must_leave_enough_experts_in_any_group() -> None:
    """One group of two is chosen: one expert less in both groups, and top-2 has but one expert left."""
    model, layout = made("deepseek_v3", topk_group=1)
    with masked_experts(model, layout, {1: [0, 1]}):
        assert shares(model, layout)[0][:2] == [0, 0]
    for masked in ([0, 2], [0, 1, 2]):
        with pytest.raises(InvalidInput, match="every token can choose 2"), masked_experts(model, layout, {1: masked}):
            pass
