"""What calibration adds up: choices, and router weights times norms of outputs, computed again by hand."""

import doctest
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llama_stack_provider_moe.compute.methods import surgery
from llama_stack_provider_moe.compute.methods.surgery import highest, mass_of, reap_scores
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.surgery import plan
from llama_stack_provider_moe.compute.surgery.calibrate import Calibration, calibrate, losses
from llama_stack_provider_moe.errors import DataError, LayoutError
from tests.support import surgery_models, tiny_models

ROWS = surgery_models.prompts(5, 9)


@pytest.mark.parametrize("module", [surgery, plan])
def test_examples(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def by_hand(model: nn.Module, layout: ExpertLayout) -> Calibration:
    """The sums for an expert of gate, up and down matrices without biases, one token at a time."""
    seen: dict[int, tuple[Tensor, ...]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs, layer=layer: seen.update({layer: inputs}))
        for layer, module in layout.experts(model).items()
    ]
    shape = (len(layout.moe_layers), layout.num_experts)
    count, sums = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)
    for prompt in ROWS:
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
        for at, layer in enumerate(layout.moe_layers):
            experts = layout.experts(model)[layer]
            gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
            hidden_TH, chosen_TK, weight_TK = seen[layer]
            for token, (chosen_K, weight_K) in enumerate(zip(chosen_TK, weight_TK, strict=True)):
                for expert, weight in zip(chosen_K.tolist(), weight_K.tolist(), strict=True):
                    gate, up = (gate_up[expert] @ hidden_TH[token]).chunk(2)
                    made = (down[expert] @ (functional.silu(gate) * up)).detach()
                    count[at, expert] += 1
                    sums[at, expert] += weight * float(made.norm())
    for handle in handles:
        handle.remove()
    return Calibration(count, sums, torch.zeros(shape), sum(len(prompt.ids) for prompt in ROWS))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "glm4_moe"])
def test_sums_are_those_of_the_formula(family: str) -> None:
    model = tiny_models.model(family, **surgery_models.eight(family))
    layout = surgery_models.layout_of(model)
    found, expected = calibrate(model, layout, ROWS, batch_size=2), by_hand(model, layout)
    assert torch.equal(found.count_LE.float(), expected.count_LE)
    assert torch.allclose(found.contribution_LE, expected.contribution_LE, rtol=1e-5)
    assert found.count_LE.sum() == expected.tokens * layout.top_k * len(layout.moe_layers)
    scores = found.scores("reap")
    used = expected.count_LE > 0
    assert torch.allclose(scores[used], (expected.contribution_LE / expected.count_LE)[used], rtol=1e-5)
    assert not torch.equal(scores.argsort(), found.scores("usage").argsort())


def test_llama_4_contributes_what_its_scaled_inputs_give() -> None:
    model = tiny_models.model("llama4_text", num_local_experts=8)
    layout = surgery_models.layout_of(model)
    outputs: list[Tensor] = []
    (experts,) = layout.experts(model).values()
    handle = experts.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    for prompt in ROWS:
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
    handle.remove()
    norms = [each.view(8, -1, 32).norm(dim=-1).sum(dim=1) for each in outputs]
    found = calibrate(model, layout, ROWS, batch_size=2)
    assert torch.allclose(found.contribution_LE[0].float(), torch.stack(norms).sum(dim=0), rtol=1e-4)
    assert found.count_LE.sum() == found.tokens


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_padding_does_not_count(family: str) -> None:
    model = tiny_models.model(family, **surgery_models.eight(family))
    layout = surgery_models.layout_of(model)
    mixed = [ROWS[0], surgery_models.prompts(1, 30)[0]]
    together, apart = (calibrate(model, layout, mixed, batch_size=size) for size in (2, 1))
    assert torch.equal(together.count_LE, apart.count_LE)
    assert torch.allclose(together.contribution_LE, apart.contribution_LE, rtol=1e-4)
    assert torch.allclose(together.probability_LE, apart.probability_LE, rtol=1e-4)
    assert together.probability_LE.sum(dim=1).tolist() == pytest.approx([1.0] * len(layout.moe_layers))


def test_use_alone_needs_no_second_pass_through_experts() -> None:
    model = tiny_models.model("mixtral")
    layout = surgery_models.layout_of(model)
    calls: list[int] = []
    for module in layout.experts(model).values():
        forward = module.forward

        def counted(*given: Tensor, forward: Callable[..., Tensor] = forward) -> Tensor:
            calls.append(1)
            return forward(*given)

        module.forward = counted
    found = calibrate(model, layout, ROWS, batch_size=5, contributions=False)
    assert len(calls) == len(layout.moe_layers)
    assert not found.contribution_LE.any()
    calls.clear()
    calibrate(model, layout, ROWS, batch_size=5)
    assert len(calls) == len(layout.moe_layers) * (1 + layout.top_k)


def test_experts_that_are_called_in_another_way_are_named() -> None:
    model = tiny_models.model("mixtral")
    layout = surgery_models.layout_of(model)
    for module in layout.experts(model).values():
        forward = module.forward
        module.forward = lambda *given, forward=forward: forward(*given[:3])
        module.register_forward_pre_hook(lambda _module, inputs: (*inputs, inputs[0]))
    with pytest.raises(LayoutError, match=r"MixtralExperts: is not called with .*expected surgery.by 'usage'"):
        calibrate(model, layout, ROWS, batch_size=5)


def test_rows_without_a_next_token_have_no_loss() -> None:
    model = tiny_models.model("mixtral")
    with pytest.raises(DataError, match="no row has two tokens"):
        losses(model, surgery_models.layout_of(model), [prompt._replace(ids=[5]) for prompt in ROWS[:1]], {}, 2)


def test_the_lowest_scores_go_in_each_group() -> None:
    score = torch.tensor([[5.0, 1.0, 4.0, 2.0, 0.5, 0.6, 0.7, 0.8], [1.0] * 8])
    assert highest(score, 4) == [(0, 1, 2, 3), (0, 1, 2, 3)]
    assert highest(score, 4, groups=2) == [(0, 2, 6, 7), (0, 1, 4, 5)]
    assert reap_scores(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 8.0]])).tolist() == [[0.0, 0.5]]
    assert mass_of(torch.tensor([[0.1, 0.2, 0.7]]), [[0, 2]]) == [pytest.approx(0.8)]
    assert math.isclose(mass_of(torch.tensor([[0.1, 0.9]]), [[]])[0], 0)
