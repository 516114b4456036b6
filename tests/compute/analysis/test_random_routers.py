"""The baseline of a routing analysis: a random router beside the model's own."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.analysis.random_routers import RandomRouters
from llama_stack_provider_moe.compute.analysis.routing_report import Prompt, compare, count
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.spec import Analysis
from tests.support import tiny_models

FAMILIES = ("granitemoe", "mixtral", "deepseek_v3", "llama4_text", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_router_sees_what_the_models_router_sees(family: str, tmp_path: Path) -> None:
    """With the weights of the model's own linear router, it makes the choices by the greatest logits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models.build(family, tmp_path / family)).eval()
    layout = find_layout(model)
    assert layout is not None
    ids = torch.arange(10, 34).reshape(2, 12)
    routers, random = layout.routers(model), RandomRouters(model, layout)
    expected: dict[int, torch.Tensor] = {}

    def own(layer: int, outputs: object) -> None:
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        logits = given[layout.logits_at]
        assert isinstance(logits, torch.Tensor)
        expected[layer] = logits.reshape(-1, layout.choices).topk(layout.top_k).indices

    handles = [
        router.register_forward_hook(lambda _module, _inputs, outputs, layer=layer: own(layer, outputs))
        for layer, router in routers.items()
    ]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    for layer, router in routers.items():
        weight = next(each for each in router.parameters() if each.dim() == 2)
        random._weight_DE[layer] = weight.detach().float().T
    with torch.no_grad():
        again = model(input_ids=ids).logits
    assert torch.equal(before, again), "it changes nothing"
    for layer in layout.moe_layers:
        bias = [each for name, each in routers[layer].named_parameters() if name == "bias" and bool(each.any())]
        if not bias:
            assert torch.equal(random.chosen_in(layer).sort().values, expected[layer].sort().values)
    random.close()
    for handle in handles:
        handle.remove()
    assert not any(router._forward_pre_hooks for router in routers.values())


def test_sets_of_other_tokens_differ_for_a_random_router_too(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models.build("granitemoe", tmp_path / "model")).eval()
    layout = find_layout(model)
    assert layout is not None

    def rows(first: int) -> list[Prompt]:
        ids = [[first + (7 * row + place) % 20 for place in range(16)] for row in range(12)]
        return [Prompt(each, [True] * len(each)) for each in ids]

    unlike = {"a": count(model, layout, rows(10), 4), "b": count(model, layout, rows(60), 4)}
    alike = {"a": unlike["a"], "b": count(model, layout, rows(10), 4)}
    settings = Analysis(resamples=100, permutations=20)
    for layer in compare(unlike, layout.moe_layers, settings, seed=1):
        assert layer.random_router is not None
        assert 1e-3 < layer.random_router < math.log(2)
    for layer in compare(alike, layout.moe_layers, settings, seed=1):
        assert layer.random_router == pytest.approx(0, abs=1e-6)
    assert unlike["a"].random_NLE is not None
    tokens_NL = unlike["a"].random_NLE.sum(axis=2)
    assert np.array_equal(tokens_NL, np.full_like(tokens_NL, 16 * layout.top_k))
