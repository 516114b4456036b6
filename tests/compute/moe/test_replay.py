"""Laws of replayed routes: a model's own change nothing, others' are used, and the router still learns."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from llama_stack_provider_moe.compute.moe.balance import balance_loss
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.replay import Replay, require_replay
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder, switch_loss
from llama_stack_provider_moe.compute.recipes.grpo.routes import Routes, aligned, require_alignment, require_routes
from llama_stack_provider_moe.compute.runtime.peers import ALONE
from llama_stack_provider_moe.errors import ModelError
from tests.support import tiny_models

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))
FAMILIES = ("qwen3_moe", "granitemoe", "mixtral", "deepseek_v3", "gpt_oss", "phimoe")


def made(family: str) -> tuple[PreTrainedModel, ExpertLayout, Replay]:
    model = tiny_models.model(family)
    layout = find_layout(model)
    assert layout is not None
    generator = torch.Generator().manual_seed(9)
    for bias in layout.biases(model).values():  # a bias for the choice must not reach the weights
        bias.data.copy_(torch.rand(bias.shape, generator=generator))
    return model, layout, Replay(model, layout)


def learnt(model: PreTrainedModel, ids: Tensor = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def routes_of(model: PreTrainedModel, replay: Replay, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad(), replay.recording(len(ids)) as found:
        model(ids)
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_own_routes_change_nothing_and_others_are_used(family: str) -> None:
    model, layout, replay = made(family)
    loss, gradients = learnt(model)
    own = routes_of(model, replay)
    assert own.dtype == torch.int16
    replay.force(own)
    same, same_gradients = learnt(model)
    assert torch.equal(loss, same)
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)

    others = own.roll(1, dims=1)
    recorder = RoutingRecorder(model, layout)
    replay.force(others)
    with recorder.recording(None), replay.observing(len(IDS)) as chosen:
        model(input_ids=IDS, labels=IDS).loss.backward()
    seen = slice(1) if family == "phimoe" else slice(None)  # its second choice is among what the forced first leaves
    assert torch.equal(chosen[0][:, :, 0, seen], own[:, :, 0, seen])  # the first router sees what it saw before
    for at, layer in enumerate(replay.layers):
        assert torch.equal(recorder.chosen_in(layer).reshape(2, 12, -1), others[:, :, at].long())
        gradient = layout.routers(model)[layer].get_parameter(layout.router_weight).grad
        assert gradient is not None
        assert gradient.abs().max() > 0
    replay.rest()
    assert torch.equal(learnt(model)[0], loss)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_balance_loss_counts_what_routers_would_choose(family: str) -> None:
    """Not the replayed experts. Of a softmax's router the loss is then that of transformers, by its logits alone."""
    model, layout, replay = made(family)
    recorder = RoutingRecorder(model, layout)
    recorder.own_choice = replay.own_choice
    replay.force(torch.zeros_like(routes_of(model, replay)) + torch.arange(layout.top_k, dtype=torch.int16))
    with recorder.recording(None), replay.observing(len(IDS)) as own:
        model(input_ids=IDS)
    chosen = [own[0][:, :, at].reshape(-1, layout.top_k).long() for at in range(len(replay.layers))]
    assert all(torch.equal(a, b) for a, b in zip(recorder.chosen(), chosen, strict=True))
    found = balance_loss(recorder, "switch")
    logits, count = recorder.logits(), (layout.top_k, layout.choices)
    assert torch.equal(found, switch_loss(logits, *count, scoring=layout.scoring, chosen=chosen))
    replayed = [recorder.chosen_in(layer) for layer in replay.layers]
    assert all(bool((each == torch.arange(layout.top_k)).all()) for each in replayed), (
        "the figures of routing have these"
    )
    assert abs(found - switch_loss(logits, *count, scoring=layout.scoring, chosen=replayed)) > 1e-3
    if family == "qwen3_moe":
        assert torch.allclose(found, load_balancing_loss_func(tuple(logits), layout.choices, layout.top_k))
    replay.rest()
    with recorder.recording(None):
        model(input_ids=IDS)
    assert torch.equal(recorder.chosen()[0], recorder.chosen_in(replay.layers[0]))


def test_a_checkpointed_layer_runs_again_with_the_same_routes() -> None:
    model, _, replay = made("qwen3_moe")
    replay.force(routes_of(model, replay).roll(1, dims=1))
    _, wanted = learnt(model)
    model.activation_checkpointing_enable()
    model.train()
    _, found = learnt(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_every_tiny_family_can_be_replayed(family: str) -> None:
    model, layout, _ = made(family)
    require_replay(model, layout)


def test_a_router_that_chooses_twice_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, _ = made("mixtral")
    router = type(next(iter(layout.routers(model).values())))
    forward = router.forward

    def twice(self: torch.nn.Module, hidden_states: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = forward(self, hidden_states)
        outputs[0].topk(2, dim=-1)
        return outputs

    monkeypatch.setattr(router, "forward", twice)
    with pytest.raises(ModelError, match=r"not possible with mixtral.*MixtralTopKRouter"):
        require_replay(model, layout)


def generated(model: PreTrainedModel, replay: Replay) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Ids, mask and routes of answers to prompts of 3 and 7 tokens, and the logits that sampled them."""
    prompts, mask = IDS[:, :7].clone(), torch.ones(2, 7, dtype=torch.long)
    prompts[0, :4], mask[0, :4] = 0, 0
    torch.manual_seed(0)
    with torch.no_grad(), replay.recording(2) as found:
        made = model.generate(
            input_ids=prompts, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    whole = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], dim=1)
    return made.sequences, whole, aligned(found[0], whole, 6), list(made.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_of_generating_stand_where_their_tokens_do(family: str) -> None:
    model, layout, replay = made(family)
    ids, mask, routes, _ = generated(model, replay)
    assert (routes[0, :4] == -1).all()
    assert (routes[:, -1] == -1).all()  # never run
    assert (routes[0, 4:-1] >= 0).all()
    assert (routes[1, :-1] >= 0).all()
    require_routes(routes, layout.choices)
    replay.force(routes)
    with torch.no_grad(), replay.observing(2) as own:
        model(input_ids=ids, attention_mask=mask)
    require_alignment(own[0], routes)
    counted = routes >= 0
    assert torch.equal(own[0].sort(dim=-1).values[counted], routes.sort(dim=-1).values[counted])


def test_a_shift_by_one_position_is_an_error_before_anything_is_learnt() -> None:
    model, layout, _ = made("qwen3_moe")
    routes = Routes(model, layout, "rollout", ALONE)
    ids, mask, right, _ = generated(model, Replay(model, layout))
    shifted = torch.where(right >= 0, right.roll(1, dims=1), -1)
    shifted[0, 4] = right[0, 4]
    routes.note_generation(shifted)
    figures: list[float] = []
    with pytest.raises(ModelError, match="chooses the recorded experts again"), routes.replayed(shifted, figures):
        model(input_ids=ids, attention_mask=mask)
    assert not figures
    routes.note_generation(right)
    with routes.replayed(right, figures):
        model(input_ids=ids, attention_mask=mask)
    assert figures == [0]


def test_routes_with_an_expert_twice_or_of_another_model_are_errors() -> None:
    right = torch.tensor([[[[0, 3]], [[-1, -1]]]], dtype=torch.int16)
    require_routes(right, 4)
    for wrong in ([1, 1], [0, 4], [-1, 2]):
        with pytest.raises(ModelError, match="twice for one token, or outside 0 to 3"):
            require_routes(torch.tensor([[[wrong]]], dtype=torch.int16), 4)


def test_in_bf16_replayed_passes_are_no_farther_from_generating() -> None:
    model, _, replay = made("qwen3_moe")
    model.bfloat16()
    ids, mask, routes, logits = generated(model, replay)
    sampled = torch.stack(logits, dim=1).float().log_softmax(dim=-1).gather(2, ids[:, 7:, None])

    def distance() -> float:
        with torch.no_grad():
            passed = model(input_ids=ids, attention_mask=mask).logits[:, 6:-1].float().log_softmax(dim=-1)
        return float((passed.gather(2, ids[:, 7:, None]) - sampled).abs().mean())

    free = distance()
    replay.force(routes)
    assert distance() <= free + 1e-6
