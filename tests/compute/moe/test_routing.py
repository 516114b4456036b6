"""Routing: the recorder sees exactly the router decisions; losses and figures equal those computed by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.routing import (
    RoutingRecorder,
    probabilities,
    router_z_loss,
    switch_loss,
    usage,
)
from llama_stack_provider_moe.compute.moe.routing_sums import LayerRouting
from tests.support import tiny_models

LENGTH = 12
IDS = torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(11))
# The second row is 7 tokens long; the rest of it is padding, to its right.
MASK = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [7]])).long()
# Families whose models compute an aux loss. (Llama 4 has the coefficient in its config, and no loss.)
NO_AUX = ("glm4_moe", "deepseek_v3", "lfm2_moe", "cohere2_moe", "llama4_text")
AUX = tuple(family for family in tiny_models.MOE if family not in NO_AUX)


def recorded(family: str, **changes: Any) -> tuple[PreTrainedModel, ExpertLayout, RoutingRecorder]:
    model = tiny_models.model(family, **changes)
    layout = find_layout(model)
    assert layout is not None
    return model, layout, RoutingRecorder(model, layout)


def assert_alike(found: list[LayerRouting], expected: list[LayerRouting], tolerance: float = 1e-5) -> None:
    assert [one.layer for one in found] == [one.layer for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.share == pytest.approx(other.share, abs=1e-6)
        assert one.dead == other.dead
        for figure in ("min", "max", "cv", "load_entropy", "token_entropy"):
            assert getattr(one, figure) == pytest.approx(getattr(other, figure), abs=tolerance), figure


class Wires:
    """What flows into a model's routers and experts, taken independently of the recorder."""

    def __init__(self, model: PreTrainedModel, layout: ExpertLayout) -> None:
        self.hidden: dict[int, Tensor] = {}
        self.sent: dict[int, tuple[Tensor, ...]] = {}
        for layer, router in layout.routers(model).items():
            router.register_forward_pre_hook(lambda _, inputs, layer=layer: self.hidden.update({layer: inputs[0]}))
        for layer, experts in layout.experts(model).items():
            experts.register_forward_pre_hook(lambda _, inputs, layer=layer: self.sent.update({layer: inputs}))

    def received(self, layer: int, layout: ExpertLayout) -> Tensor:
        """Tokens that each expert of a layer was given, (E,)."""
        if len(self.sent[layer]) == 1:  # Llama 4's own way: every token to every expert, zero where not chosen
            routed_ETH = self.sent[layer][0].reshape(layout.num_experts, -1, self.hidden[layer].shape[-1])
            return (routed_ETH != 0).any(dim=-1).sum(dim=-1)
        return self.sent[layer][1].flatten().bincount(minlength=layout.num_experts)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_records_the_logits_and_the_tokens_of_the_experts(family: str) -> None:
    model, layout, recorder = recorded(family)
    wires = Wires(model, layout)
    with torch.no_grad(), recorder.recording(None):
        model(IDS)
    z_loss = recorder.z_loss()
    routing = recorder.take()
    by_hand = []
    for figures, (layer, router) in zip(routing, layout.routers(model).items(), strict=True):
        bias = dict(router.named_parameters()).get("bias")
        hidden_TH = wires.hidden[layer].reshape(-1, 32)
        logits_TE = functional.linear(hidden_TH, router.get_parameter("weight"), bias)
        by_hand.append(logits_TE)
        received_E = wires.received(layer, layout)
        assert received_E.sum() == IDS.numel() * layout.top_k
        assert figures.layer == layer
        assert figures.share == pytest.approx((received_E / received_E.sum()).tolist(), abs=1e-7)
        probs_TE = logits_TE.softmax(-1)
        if layout.scoring == "sigmoid":
            probs_TE = logits_TE.sigmoid() / logits_TE.sigmoid().sum(-1, keepdim=True)
        entropy_T = -(probs_TE * probs_TE.log()).sum(-1)
        mean_E = probs_TE.mean(0)
        assert figures.token_entropy == pytest.approx(entropy_T.mean().item(), abs=1e-5)
        assert figures.load_entropy == pytest.approx(-(mean_E * mean_E.log()).sum().item(), abs=1e-5)
        assert figures.token_entropy < figures.load_entropy < math.log(4)
    expected = torch.stack([logits_TE.logsumexp(-1).square().mean() for logits_TE in by_hand]).mean()
    torch.testing.assert_close(z_loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", AUX)
def test_switch_loss_is_the_models_own_aux_loss(family: str) -> None:
    model, layout, _ = recorded(family)
    outputs = model(IDS, attention_mask=MASK, output_router_logits=True)
    logits = [logits.reshape(-1, layout.num_experts) for logits in outputs.router_logits]
    assert len(logits) == len(layout.moe_layers)
    loss = switch_loss(logits, layout.top_k, layout.num_experts, MASK)
    torch.testing.assert_close(loss, outputs.aux_loss, rtol=1e-5, atol=1e-6)
    assert abs(loss - switch_loss(logits, layout.top_k, layout.num_experts)).item() > 1e-5  # padding matters here


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "granitemoehybrid", "llama4_text"])
def test_padding_does_not_count(family: str) -> None:
    """A padded batch is the sum of its rows on their own."""
    model, _, recorder = recorded(family)
    with torch.no_grad():
        with recorder.recording(MASK):
            model(IDS, attention_mask=MASK)
        padded_z, padded = recorder.z_loss(), recorder.take()
        z_losses = []
        for row, length in zip(IDS, MASK.sum(dim=1).tolist(), strict=True):
            with recorder.recording(None):
                model(row[None, :length])
            z_losses.append(recorder.z_loss() * length)
        assert_alike(padded, recorder.take())
        torch.testing.assert_close(padded_z, sum(z_losses) / MASK.sum(), rtol=1e-5, atol=1e-5)
        with recorder.recording(None):
            model(IDS, attention_mask=MASK)
        unmasked = recorder.take()
    assert any(one.share != other.share for one, other in zip(unmasked, padded, strict=True))


def test_micro_batches_add_up_and_take_starts_over() -> None:
    model, _, recorder = recorded("mixtral")
    with torch.no_grad():
        with recorder.recording(MASK):
            model(IDS, attention_mask=MASK)
        whole = recorder.take()
        for row, mask in zip(IDS, MASK, strict=True):
            with recorder.recording(mask[None]):
                model(row[None], attention_mask=mask[None])
        assert_alike(recorder.take(), whole)
    assert recorder.take() == []


def test_two_processes_that_see_the_same_count_as_one_with_twice_as_many_tokens() -> None:
    """`total` stands for the sum over processes: here each of two has this one's tokens."""

    def two(tensor: Tensor) -> Tensor:
        return 2 * tensor

    model, layout, recorder = recorded("mixtral")
    parts = {"long": MASK * torch.tensor([[1], [0]]), "short": MASK * torch.tensor([[0], [1]])}

    def passed() -> None:
        with torch.no_grad(), recorder.recording(MASK, parts):
            model(IDS, attention_mask=MASK)

    passed()
    alone, alone_parts, counts = recorder.take(), recorder.take_parts(), recorder.take_counts()
    passed()
    assert_alike(recorder.take(two), alone)
    shared_parts = recorder.take_parts(("long", "short", "of another process alone"), two)
    assert shared_parts.keys() == alone_parts.keys() == parts.keys()
    for name, found in shared_parts.items():
        assert_alike(found, alone_parts[name])
    twice = recorder.take_counts(two)
    assert twice.keys() == counts.keys() == set(layout.moe_layers)
    assert all(torch.equal(twice[layer], 2 * counts[layer]) for layer in counts)
    assert (recorder.take_counts(two), recorder.take(two)) == ({}, [])
    assert (recorder.take_parts((), two), recorder.take_parts(("long",), two)) == ({}, {})


def test_nothing_is_recorded_outside_or_after_close() -> None:
    model, _, recorder = recorded("mixtral")
    model(IDS)
    assert recorder.take() == []
    with recorder.recording(None):
        model(IDS)
    model(IDS)
    assert [sum(one.share) for one in recorder.take()] == pytest.approx([1.0, 1.0])
    recorder.close()
    with recorder.recording(None):
        model(IDS)
    assert recorder.take() == []
    with pytest.raises(RuntimeError, match="no router ran"):
        recorder.z_loss()


def test_an_error_inside_closes_the_recording() -> None:
    model, _, recorder = recorded("mixtral")
    with pytest.raises(KeyError), recorder.recording(None):
        raise KeyError
    model(IDS)
    assert recorder.take() == []


def test_a_reference_pass_without_gradients_is_not_the_policys() -> None:
    model, _, recorder = recorded("mixtral")
    with recorder.recording(MASK):
        model(IDS, attention_mask=MASK)
    alone_z, alone = recorder.z_loss().item(), recorder.take()
    with recorder.recording(MASK):
        model(IDS, attention_mask=MASK)
        with torch.no_grad():
            model(IDS.flip(1), attention_mask=MASK)
    assert recorder.z_loss().item() == alone_z
    assert recorder.take() == alone


def test_a_mask_of_another_shape_is_an_error() -> None:
    model, _, recorder = recorded("mixtral")
    expected = r"attention_mask has shape \(2, 5\), but the router saw 24 tokens"
    with pytest.raises(ValueError, match=expected), recorder.recording(MASK[:, :5]):
        model(IDS)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_checkpointing_counts_nothing_twice_and_keeps_the_gradients(family: str) -> None:
    """The layers run again in backward: figures and the gradient of loss, aux loss and z-loss are as without."""
    quiet = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0} if family == "phimoe" else {}
    outcomes = []
    for checkpointing in (False, True):
        model, layout, recorder = recorded(family, **quiet)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        runs: list[int] = []
        for router in layout.routers(model).values():
            router.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(0)  # Phi MoE draws its experts in training
        aux = {"output_router_logits": True} if family in AUX else {}
        with recorder.recording(MASK):
            outputs = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100), use_cache=False, **aux)
        (outputs.loss + 0.1 * recorder.z_loss() + (outputs.aux_loss if aux else 0)).backward()
        assert len(runs) == len(layout.moe_layers) * (1 + checkpointing)
        gradients = [router.get_parameter("weight").grad for router in layout.routers(model).values()]
        outcomes.append((recorder.take(), torch.stack(gradients)))
    (plain, plain_grad), (checkpointed, checkpointed_grad) = outcomes
    assert checkpointed == plain
    assert plain_grad.abs().max() > 1e-4
    torch.testing.assert_close(checkpointed_grad, plain_grad, rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_is_noticed_by_the_z_loss() -> None:
    model, _, recorder = recorded("mixtral")
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with recorder.recording(None):
        model(IDS, use_cache=False)
    with pytest.raises(RuntimeError, match="is checkpointing reentrant"):
        recorder.z_loss()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "layers"), [(4, 2, 1), (8, 1, 3), (16, 4, 2)])
def test_switch_loss_is_transformers(experts: int, top_k: int, layers: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(experts)
    logits = tuple(torch.randn(IDS.numel(), experts, generator=generator, requires_grad=True) for _ in range(layers))
    mask = MASK if masked else None
    ours, theirs = switch_loss(logits, top_k, experts, mask), load_balancing_loss_func(logits, experts, top_k, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for one, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
        assert one.abs().max() > 1e-4


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_switch_loss_is_top_k_at_perfect_balance_and_experts_at_collapse(top_k: int) -> None:
    experts = 4
    # Token t prefers experts t, t+1, ... by a hair: choices rotate, probabilities are all but equal.
    order = torch.arange(experts).repeat(3)
    balanced = torch.stack([torch.arange(experts).roll(int(first)) * -1e-6 for first in order])
    assert switch_loss([balanced], top_k, experts).item() == pytest.approx(top_k, abs=1e-4)
    collapsed = torch.full((12, experts), -50.0)
    collapsed[:, 0] = 50.0
    assert switch_loss([collapsed], top_k, experts).item() == pytest.approx(experts, abs=1e-4)


def test_switch_loss_by_hand() -> None:
    """Two tokens, two experts, top-1; probabilities (3/4, 1/4) and (1/5, 4/5); then both choose the first."""
    first = torch.tensor([[3.0, 1.0], [1.0, 4.0]]).log()
    assert switch_loss([first], 1, 2).item() == pytest.approx(2 * (0.5 * (0.75 + 0.2) / 2 + 0.5 * (0.25 + 0.8) / 2))
    second = torch.tensor([[3.0, 1.0], [4.0, 1.0]]).log()
    assert switch_loss([second], 1, 2).item() == pytest.approx(2 * (0.75 + 0.8) / 2)
    # Both layers together: f = (3/4, 1/4), P = ((0.75 + 0.2 + 0.75 + 0.8) / 4, the rest).
    assert switch_loss([first, second], 1, 2).item() == pytest.approx(2 * (0.75 * 0.625 + 0.25 * 0.375))
    # Without the second token of each.
    mask = torch.tensor([[1, 0]])
    assert switch_loss([first, second], 1, 2, mask).item() == pytest.approx(2 * 0.75)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2), math.log(6), -math.inf, -math.inf]], requires_grad=True)
    loss = router_z_loss(logits)
    assert loss.item() == pytest.approx((math.log(4) ** 2 + math.log(8) ** 2) / 2)
    loss.backward()  # d/dx of lse^2 / T is 2 lse softmax / T
    expected = torch.tensor([[math.log(4) / 4] * 4, [math.log(8) / 4, math.log(8) * 3 / 4, 0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected)
    masked = router_z_loss(logits.detach(), torch.tensor([[1, 0]]))
    assert masked.item() == pytest.approx(math.log(4) ** 2)


def test_probabilities_by_hand() -> None:
    logits = torch.tensor([[math.log(3), 0.0]])
    assert probabilities(logits, "softmax").tolist() == [pytest.approx([0.75, 0.25])]
    assert probabilities(logits, "sigmoid").tolist() == [pytest.approx([0.6, 0.4])]  # 3/4 and 1/2, over their sum
    assert probabilities(logits.bfloat16(), "softmax").dtype == torch.float32


def test_usage_by_hand() -> None:
    """Three tokens and one of padding, four experts, top-2: counts (3, 2, 1, 0)."""
    probs = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 2]])
    figures = usage(5, probs, chosen, torch.tensor([[1, 1], [1, 0]]))
    assert (figures.layer, figures.dead) == (5, 1)
    assert figures.share == pytest.approx([1 / 2, 1 / 3, 1 / 6, 0])
    assert (figures.min, figures.max) == pytest.approx((0, 1 / 2))
    # Deviations from 1/4 are 1/4, 1/12, -1/12, -1/4: variance (2/16 + 2/144) / 4 = 5/144.
    assert figures.cv == pytest.approx(4 * math.sqrt(5) / 12)
    mean = [2 / 3, 1 / 4, 1 / 12]
    assert figures.load_entropy == pytest.approx(-sum(p * math.log(p) for p in mean))
    assert figures.token_entropy == pytest.approx((math.log(2) + 1.5 * math.log(2) + 0) / 3)


def test_even_usage_has_no_variation_and_full_entropy() -> None:
    figures = usage(0, torch.full((4, 4), 0.25), torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]]))
    assert (figures.cv, figures.dead, figures.min, figures.max) == pytest.approx((0, 0, 0.25, 0.25))
    assert (figures.load_entropy, figures.token_entropy) == pytest.approx((math.log(4), math.log(4)))
