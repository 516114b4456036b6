"""Balancing: losses by hand, experts that choose tokens, moving biases; each corrects a collapsed router."""

import doctest
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.moe import balance
from llama_stack_provider_moe.compute.moe.balance import balance_loss, bias_step, expert_choice, gshard_loss, jitter
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder, probabilities, switch_loss
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS, Steering
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.spec import Moe
from tests.support import tiny_models

BIASED = ("minimax_m2", "ernie4_5_moe", "glm4_moe", "deepseek_v3", "lfm2_moe")
IDS = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, 8:] = 0


def test_examples() -> None:
    outcome = doctest.testmod(balance)
    assert (outcome.failed, outcome.attempted > 5) == (0, True)


def test_gshard_by_hand() -> None:
    """Three tokens, two experts: first choices 2/3 and 1/3, mean probabilities from the sigmoids of the differences."""
    logits = torch.tensor([[math.log(3), 0.0], [math.log(4), 0.0], [0.0, 0.0 + math.log(1.5)]])
    m = (3 / 4 + 4 / 5 + 2 / 5) / 3
    expected = 2 * (2 / 3 * m + 1 / 3 * (1 - m))
    assert gshard_loss([logits]).item() == pytest.approx(expected)
    even = torch.eye(2) * 50
    assert gshard_loss([logits, even]).item() == pytest.approx((expected + 1) / 2), "the mean of layers"
    mask = torch.tensor([[1, 1, 0]])
    assert gshard_loss([logits], attention_mask=mask).item() == pytest.approx(2 * (3 / 4 + 4 / 5) / 2)


def test_gshard_of_sigmoid_scores() -> None:
    logits = torch.tensor([[math.log(3), math.log(1)], [math.log(3), math.log(1)]])  # scores 3/4 and 1/2
    assert gshard_loss([logits], "sigmoid").item() == pytest.approx(2 * (3 / 4) / (3 / 4 + 1 / 2))


def test_switch_loss_of_what_was_chosen() -> None:
    """DeepSeek-V3's form: normalised sigmoids, and the experts that the biased choice took."""
    logits = torch.tensor([[0.0, math.log(3), 0.0], [0.0, math.log(3), 0.0]])  # scores 1/2, 3/4, 1/2 of 7/4
    chosen = torch.tensor([[0, 1], [0, 2]])
    found = switch_loss([logits], 2, 3, scoring="sigmoid", chosen=[chosen])
    assert found.item() == pytest.approx(3 * (1 * 2 / 7 + 0.5 * 3 / 7 + 0.5 * 2 / 7))


def test_losses_are_minimal_at_an_even_load() -> None:
    logits = (
        torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0])
    ).requires_grad_()
    for loss in (gshard_loss([logits]), switch_loss([logits], 2, 4)):
        (gradient,) = torch.autograd.grad(loss, logits)
        by_expert = gradient.sum(0)
        assert by_expert[0] > 0 > by_expert[1:].max(), "the crowded expert's logits are to fall"


@pytest.mark.parametrize("seed", range(5))
def test_each_expert_takes_its_likeliest_tokens(seed: int) -> None:
    probs = torch.rand(24, 4, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(24)
    mask[[3, 7, 9, 20]] = 0
    taken = expert_choice(probs, 2, mask)
    assert taken.sum(0).tolist() == [10] * 4  # 20 tokens * 2 / 4
    assert not taken[mask == 0].any()
    for expert in range(4):
        kept, left = probs[taken[:, expert], expert], probs[~taken[:, expert] & (mask > 0), expert]
        assert kept.min() >= left.max()


def test_a_later_token_changes_an_earlier_ones_experts() -> None:
    """Why expert choice is for training only: it is not causal."""
    probs = torch.tensor([[0.6, 0.4], [0.5, 0.5]])
    assert expert_choice(probs, 1)[0].tolist() == [True, False]
    assert expert_choice(torch.tensor([[0.6, 0.4], [0.7, 0.3]]), 1)[0].tolist() == [False, True]


def test_bias_moves_by_the_sign_of_the_load_alone() -> None:
    assert bias_step(torch.tensor([100.0, 0.0, 1.0, 3.0]), 0.01).tolist() == pytest.approx([-0.01, 0.01, 0.01, 0.01])
    assert bias_step(torch.tensor([5.0, 5.0]), 0.01).tolist() == [0, 0]


def test_jitter_is_uniform_around_one() -> None:
    torch.manual_seed(0)
    noisy = jitter(torch.full((10000,), 2.0), 0.1)
    assert 1.8 <= noisy.min() < 1.81
    assert 2.19 < noisy.max() <= 2.2
    assert noisy.mean() == pytest.approx(2, abs=5e-3)


def steered(
    family: str, full: bool = True, **moe: Any
) -> tuple[PreTrainedModel, ExpertLayout, Steering, RoutingRecorder]:
    # Phi MoE gives its routers a gradient of the token loss only where this noise lets two experts come near.
    model = tiny_models.model(family, **({"router_jitter_noise": 0.4} if family == "phimoe" else {}))
    layout = find_layout(model)
    assert layout is not None
    resolved = resolve_moe(Moe(**moe), layout, full)
    apply_moe(model, layout, resolved)
    steering = Steering(model, layout, resolved)
    return model, layout, steering, RoutingRecorder(model, layout)


class Sent:
    """What goes into the experts, taken independently of recorder and steering."""

    def __init__(self, model: nn.Module, layout: ExpertLayout) -> None:
        self.inputs: dict[int, tuple[Tensor, ...]] = {}
        for layer, experts in layout.experts(model).items():
            experts.register_forward_pre_hook(lambda _, inputs, layer=layer: self.inputs.update({layer: inputs}))


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_experts_choose_in_training_steps_only(family: str) -> None:
    model, layout, steering, recorder = steered(family, moe_load_balancing="expert_choice")
    plain = tiny_models.model(family, **({"router_jitter_noise": 0.4} if family == "phimoe" else {}))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    sent = Sent(model, layout)
    steering.act(MASK)
    with recorder.recording(MASK):
        outputs = model(IDS, attention_mask=MASK)
    capacity = math.ceil(MASK.sum().item() * layout.top_k / 4)
    for routing in recorder.take():
        assert routing.share == pytest.approx([0.25] * 4)
    for layer, (_, index_TE, weights_TE) in sent.inputs.items():
        assert [(index_TE == expert).sum().item() for expert in range(4)] == [capacity] * 4, layer
        assert (index_TE[MASK.flatten() == 0] == 4).all(), "no expert takes padding"
        assert (weights_TE[index_TE == 4] == 0).all()
        assert (weights_TE[index_TE < 4] > 0).all()
    outputs.logits.square().mean().backward()
    for layer, router in layout.routers(model).items():
        gradient = router.get_parameter("weight").grad
        assert gradient is not None, layer
        assert gradient.abs().max() > 0, layer
    for layer, experts in layout.experts(model).items():
        gradient = experts.get_parameter(layout.down).grad
        assert gradient is not None, layer
        assert (gradient.abs().amax(dim=(1, 2)) > 0).all(), "every expert learns"
    steering.rest()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in tiny_models.MOE if family != "llama4_text"])
def test_weights_equal_the_models_where_the_choice_does(family: str) -> None:
    """Each expert's tokens are among those that chose it: there the weight must be what the model itself gives."""
    model, layout, steering, _ = steered(family, moe_load_balancing="expert_choice")
    sent = Sent(model, layout)
    layer = layout.moe_layers[0]
    with torch.no_grad():
        model(IDS)
        _, index_TK, weights_TK = sent.inputs[layer]
        steering.act(None)
        model(IDS)
        _, index_TE, weights_TE = sent.inputs[layer]
    own_TE = torch.zeros_like(weights_TE).scatter(1, index_TK, weights_TK.to(weights_TE.dtype))
    both = (own_TE > 0) & (index_TE < 4)
    assert both.sum() > 10
    if family == "phimoe":  # its weights are no function of the probabilities of all experts
        assert (weights_TE.sum() / own_TE.sum()).item() == pytest.approx(1, abs=0.3)
    else:
        torch.testing.assert_close(weights_TE[both], own_TE[both], rtol=1e-4, atol=1e-6)


def collapsed(family: str, **moe: Any) -> tuple[PreTrainedModel, ExpertLayout, Steering, RoutingRecorder]:
    """A model whose routers prefer expert 0: its logits got a bias by way of a constant direction of their inputs."""
    model, layout, steering, recorder = steered(family, **moe)
    with torch.no_grad():
        for router in layout.routers(model).values():
            seen: list[Tensor] = []
            handle = router.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            model(IDS)
            handle.remove()
            hidden = seen[0].reshape(-1, 32).float()
            # Least squares: the direction in which every token's input is nearest to 1.
            direction = torch.linalg.lstsq(hidden, torch.ones(len(hidden), 1)).solution.squeeze(1)
            router.get_parameter("weight")[0] += 2 * direction
    return model, layout, steering, recorder


def spread(model: PreTrainedModel, recorder: RoutingRecorder, pooled: bool = False) -> float:
    """Coefficient of variation of the experts' load, of what is chosen: the mean over layers, or of their mean load."""
    with torch.no_grad(), recorder.recording(None):
        model(IDS)
    layers = recorder.take()
    recorder.take_counts()
    if pooled:
        mean_E = torch.tensor([layer.share for layer in layers]).mean(0)
        return float(mean_E.std(correction=0) / mean_E.mean())
    return sum(layer.cv for layer in layers) / len(layers)


@pytest.mark.parametrize("strategy", ["switch", "gshard"])
@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "qwen3_moe", "deepseek_v3", "llama4_text", "gpt_oss"])
def test_a_loss_drives_a_collapsed_router_back(family: str, strategy: Any) -> None:
    model, layout, _, recorder = collapsed(family, moe_load_balancing=strategy, router_aux_loss_coef=1.0)
    # Switch's loss, as transformers' models have it, sees the mean of the layers, GShard's each layer by itself.
    pooled = strategy == "switch"
    before = spread(model, recorder, pooled)
    optimizer = torch.optim.Adam([router.get_parameter("weight") for router in layout.routers(model).values()], lr=0.02)
    for _ in range(150):
        with recorder.recording(None):
            model(IDS)
        balance_loss(recorder, strategy).backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.take()
    after = spread(model, recorder, pooled)
    assert before > 0.5
    assert after < 0.5 * before, (before, after)


@pytest.mark.parametrize("family", BIASED)
def test_moving_biases_drive_a_collapsed_router_back(family: str) -> None:
    model, layout, steering, recorder = collapsed(family, moe_load_balancing="aux_free", router_bias_rate=0.01)
    before = spread(model, recorder)
    weights = [router.get_parameter("weight").clone() for router in layout.routers(model).values()]
    for _ in range(120):
        steering.act(None)
        with torch.no_grad(), recorder.recording(None):
            model(IDS)
        steering.after_step(recorder.take_counts())
        recorder.take()
    after = spread(model, recorder)
    assert before > 0.3
    assert after < 0.5 * before, (before, after)
    for old, router in zip(weights, layout.routers(model).values(), strict=True):
        assert torch.equal(router.get_parameter("weight"), old), "the choice was balanced, nothing else moved"


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_choosing_experts_is_balanced_at_once(family: str) -> None:
    model, _, steering, recorder = collapsed(family, moe_load_balancing="expert_choice")
    assert spread(model, recorder) > 0.5
    steering.act(None)
    assert spread(model, recorder) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", BIASED)
def test_biases_are_saved_and_restored_exactly_also_in_bf16(family: str, tmp_path: Path) -> None:
    model = tiny_models.model(family).to(torch.bfloat16)
    layout = find_layout(model)
    assert layout is not None
    resolved = resolve_moe(Moe(moe_load_balancing="aux_free", router_bias_rate=0.001), layout, full=False)
    steering = Steering(model, layout, resolved)
    counts = {layer: torch.tensor([9.0, 1.0, 1.0, 1.0]) for layer in layout.moe_layers}
    for _ in range(300):
        steering.after_step(counts)
    for bias in layout.biases(model).values():
        assert bias.flatten().tolist() == pytest.approx([-0.3, 0.3, 0.3, 0.3], rel=1e-2), "not stuck in rounding"
    steering.save(tmp_path)
    other = tiny_models.model(family)
    again = Steering(other, layout, resolved)
    again.restore(tmp_path)
    for one, two in zip(layout.biases(model).values(), layout.biases(other).values(), strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=1e-2, atol=0)
    again.after_step(counts)
    steering.after_step(counts)
    (tmp_path / "two").mkdir()
    again.save(tmp_path / "two")
    steering.save(tmp_path)
    assert (tmp_path / ROUTER_BIAS).read_bytes() == (tmp_path / "two" / ROUTER_BIAS).read_bytes()


def test_a_checkpoint_without_its_biases_is_an_error(tmp_path: Path) -> None:
    _, _, steering, _ = steered("deepseek_v3", moe_load_balancing="aux_free")
    with pytest.raises(CheckpointError, match=ROUTER_BIAS):
        steering.restore(tmp_path)
    other = steered("lfm2_moe", moe_load_balancing="aux_free")[2]
    other.save(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        steering.restore(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4_text", "minimax_m2"])
def test_jitter_acts_on_routers_in_training_steps_only(family: str) -> None:
    model, layout, steering, _ = steered(family, router_jitter=0.3)
    plain = steered(family)[0]
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    seen: list[Tensor] = []
    layout.routers(model)[layout.moe_layers[0]].register_forward_hook(
        lambda _, inputs, outputs: seen.append(outputs[layout.logits_at].detach())
    )
    steering.act(None)
    torch.manual_seed(0)
    model(IDS), model(IDS)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    with torch.no_grad():
        model(IDS), model(IDS)
    assert torch.equal(seen[2], seen[3]), "a reference's pass sees no noise"
    steering.rest()
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4_text", "glm4_moe"])
def test_the_gradient_of_our_loss_matches_differences(family: str) -> None:
    """By differences of the loss along a direction of the router's weight, in double precision."""
    model, layout, _, recorder = steered(family, router_aux_loss_coef=0.1)
    model = model.double()
    router = next(iter(layout.routers(model).values()))
    weight = router.get_parameter("weight")

    def loss() -> Tensor:
        with recorder.recording(MASK):
            model(IDS, attention_mask=MASK)
        return balance_loss(recorder, "switch")

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    step = 1e-4  # the probabilities are fp32
    with torch.no_grad():
        weight += step * direction
        up = loss().item()
        weight -= 2 * step * direction
        down = loss().item()
    assert (up - down) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=2e-2)


@pytest.mark.parametrize("strategy", ["gshard", "switch"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_recordings_loss_covers_its_real_tokens_and_their_experts(family: str, strategy: Any) -> None:
    """Padding is left out, the scoring is the family's, and Switch's loss counts the experts that a bias had chosen."""
    model, layout, _, recorder = steered(family)
    for bias in layout.biases(model).values():
        bias.data.view(-1)[0] += 1
    with torch.no_grad(), recorder.recording(MASK):
        model(IDS, attention_mask=MASK)
    everything, real = recorder.logits(), MASK.flatten() > 0
    logits, chosen = [one[real] for one in everything], [one[real] for one in recorder.chosen()]

    def loss(logits: list[Tensor], scoring: Any, chosen: list[Tensor] | None) -> float:
        if strategy == "gshard":
            return gshard_loss(logits, scoring).item()
        return switch_loss(logits, layout.top_k, 4, scoring=scoring, chosen=chosen).item()

    expected = loss(logits, layout.scoring, chosen)
    assert abs(loss(everything, layout.scoring, recorder.chosen()) - expected) > 1e-3
    assert abs(loss(logits, "softmax" if layout.scoring == "sigmoid" else "sigmoid", chosen) - expected) > 1e-3
    if (family, strategy) == ("deepseek_v3", "switch"):
        assert abs(loss(logits, layout.scoring, None) - expected) > 1e-3
    assert balance_loss(recorder, strategy).item() == pytest.approx(expected, rel=1e-6)
    # With another process that has the same tokens: this one's part is half of the same loss.
    assert balance_loss(recorder, strategy, lambda mine: 2 * mine).item() == pytest.approx(expected / 2, rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4_text"])
def test_chosen_tokens_have_weights_of_the_dtype_that_the_model_gives(family: str) -> None:
    """In a bf16 model some families weigh experts in fp32, others in bf16."""
    model, layout, steering, _ = steered(family, moe_load_balancing="expert_choice")
    model.to(torch.bfloat16)
    given: list[Tensor] = []
    router = layout.routers(model)[layout.moe_layers[0]]
    weights = 0 if family == "llama4_text" else 1
    router.register_forward_hook(lambda _, inputs, outputs: given.append(outputs[weights]))
    with torch.no_grad():
        model(IDS)
        steering.act(None)
        model(IDS)
    own, ours = given
    assert (own.shape == ours.shape) is (family == "llama4_text")
    assert ours.dtype == own.dtype == (torch.float32 if family in ("mixtral", "deepseek_v3") else torch.bfloat16)


def test_probabilities_of_the_two_scorings() -> None:
    logits = torch.tensor([[0.0, math.log(3)]])
    assert probabilities(logits, "softmax").tolist() == [pytest.approx([0.25, 0.75])]
    assert probabilities(logits, "sigmoid").tolist() == [pytest.approx([0.4, 0.6])]
