"""The plan from a circuit breaker's block and its model, without training: layers, LoRA's layers, weights, log."""

import math
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.methods.breaker_plan import BreakerPlan, decide
from llama_stack_provider_moe.compute.methods.schedules import Coefficients
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.resolve_settings import resolve_moe
from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.spec import JOB_SPEC, BreakerSpec
from llama_stack_provider_moe.spec.breaker import ANY_MODEL, PRESETS
from tests.support import tiny_models

RULES = {"plan": "per_expert", "rules": [{"experts": {"1": 4}}, {"layers": "1", "experts": {"0": 2}}]}


def planned(family: str, layers: int, moe: dict[str, Any] | None = None, width: int = 32, **blocks: Any) -> BreakerPlan:
    """The plan of a job on a model of `layers` blocks; `adapter` is that block, all others are the breaker's."""
    adapter = {"rank": 4, **blocks.pop("adapter", {})}
    spec = JOB_SPEC.validate_python(
        {
            "recipe": "circuit_breaker", "job_uuid": "one", "model": "/models/one", "data": {"dataset_id": "break"},
            "adapter": adapter, "moe": moe or {}, "circuit_breaker": {"retain": {"dataset_id": "kept"}, **blocks},
        }
    )  # fmt: skip
    assert isinstance(spec, BreakerSpec)
    with torch.device("meta"):
        model = tiny_models.model(family, num_hidden_layers=layers, hidden_size=width)
    layout = find_layout(model)
    return decide(spec, model, layout, resolve_moe(spec.moe, layout, full=False, models_loss=False))


def test_a_preset_fills_in_missing_settings() -> None:
    """No block above the last target runs, so LoRA ends there, unless every block runs; the job's own values win."""
    named = planned("mixtral", 32, preset="mistral-7b")
    assert (named.targets, named.retained_at, named.alpha, named.preset) == ((9, 19), (9, 19), 5.0, "mistral-7b")
    assert (named.source, named.adapter.layers, named.whole) == (PRESETS["mistral-7b"].source, "0-19", False)
    assert planned("mixtral", 32, preset="mistral-7b", retain_layers="all").adapter.layers == "0-20"
    assert planned("mixtral", 20, preset="mistral-7b", retain_layers="all").adapter.layers == "0-19", "the last block"
    own = planned("mixtral", 32, preset="mistral-7b", retain_layers="all", target_layers="3,7", alpha=2)
    assert (own.targets, own.alpha, own.adapter.layers) == ((3, 7), 2.0, "0-7")
    assert planned("mixtral", 32, preset="mistral-7b", adapter={"layers": "2-5"}).adapter.layers == "2-5"
    assert planned("mixtral", 4, retain_layers="all").adapter.layers == "0-1", "by the rule, too, to the last target"


def test_a_model_has_a_preset_of_its_own_or_the_rule() -> None:
    granite, other = planned("granitemoe", 6), planned("mixtral", 6)
    assert (granite.preset, granite.source) == ("granite-moe", PRESETS["granite-moe"].source)
    assert (other.preset, other.source) == (None, ANY_MODEL.source)
    for plan in (granite, other):
        assert (plan.targets, plan.adapter.layers, plan.alpha) == ((1, 3), "0-3", 10.0)
    assert planned("mixtral", 32, width=4096).preset == "mixtral-8x7b"
    assert planned("mixtral", 32).preset is None, "as deep, not as wide"


@pytest.mark.parametrize(
    ("blocks", "whole", "logits"),
    [
        ({}, False, False),
        ({"retain_layers": "all"}, True, False),
        ({"moe": {"router_aux_loss_coef": 0.02}}, True, False),
        ({"moe": {"router_z_loss_coef": 0.01}}, True, False),
        ({"variant": "repbend"}, True, True),
        ({"variant": "repbend", "repbend": {"kl": 0}}, False, False),
        ({"variant": "repbend", "repbend": {"kl": 0}, "moe": {"router_z_loss_coef": 0.01}}, True, False),
    ],
)
def test_all_blocks_run_where_something_needs_them(blocks: dict[str, Any], whole: bool, logits: bool) -> None:
    plan = planned("mixtral", 4, **blocks)
    assert (plan.whole, plan.logits) == (whole, logits)


def test_loras_layers_end_at_the_last_target() -> None:
    """The last target itself is a valid layer, alone too, and layers before it are."""
    for layers in ("1", "0", "0-1"):
        assert planned("mixtral", 4, adapter={"layers": layers}).adapter.layers == layers
    assert planned("mixtral", 4, target_layers="1", adapter={"layers": "1-3"}, retain_layers="all").whole
    message = r"adapter\.layers: '0-2' names layer 2, above the last target, block 1; no block above it runs"
    with pytest.raises(AdapterError, match=message):
        planned("mixtral", 4, adapter={"layers": "0-2"})
    with pytest.raises(AdapterError, match=r"adapter\.layers: '2-3' starts above the last target, block 1; LoRA"):
        planned("mixtral", 4, adapter={"layers": "2-3"}, retain_layers="all")
    with pytest.raises(ModelError, match=r"target_layers: '1,4' names block 4; this model has 0 to 3"):
        planned("mixtral", 4, target_layers="1,4")


def test_lora_on_the_head_needs_a_loss_that_sees_it() -> None:
    assert planned("mixtral", 4, variant="repbend", adapter={"apply_lora_to_output": True}).adapter.apply_lora_to_output
    with pytest.raises(AdapterError, match=r"adapter\.apply_lora_to_output: true is not valid here"):
        planned("mixtral", 4, retain_layers="all", adapter={"apply_lora_to_output": True})


def test_rules_without_layers_get_those_with_experts_that_have_lora() -> None:
    """Block 0 of this GLM is dense; a rule's own layers stay, as do other plans' rules."""
    plan = planned("glm4_moe", 6, adapter=RULES)
    assert [rule.layers for rule in plan.adapter.rules] == ["1,2,3", "1"]
    assert planned("glm4_moe", 6, adapter={**RULES, "layers": "0-2"}).adapter.rules[0].layers == "1,2"
    assert planned("glm4_moe", 6, adapter={"plan": "all_experts"}).adapter.rules == []
    with pytest.raises(AdapterError, match=r"adapter\.plan: 'per_expert' finds no experts in layers 0$"):
        planned("glm4_moe", 6, adapter={"plan": "per_expert", "rules": [{"experts": {"1": 4}}], "layers": "0"})


def test_coefficients_and_those_at_the_schedules_end() -> None:
    """`schedule_steps` counts where it is given, else all of the job's; RepBend has none."""
    paper, short = planned("mixtral", 4, alpha=4), planned("mixtral", 4, alpha=4, schedule_steps=2)
    assert paper.coefficients(2, 8) == Coefficients(3.5, 0.5)
    assert short.coefficients(2, 8) == Coefficients(2.0, 2.0)
    assert paper.final(8) == short.final(8) == Coefficients(2.0, 2.0)
    curves: dict[str, Any] = {"reroute_curve": {"start": 8, "end": 4}, "retain_curve": {"start": 1, "end": 5}}
    dual = planned("mixtral", 4, weighting="dual", **curves)
    curves["retain_curve"]["schedule"] = "cosine"
    curved = planned("mixtral", 4, weighting="dual", schedule_steps=4, **curves)
    assert curved.coefficients(2, 8) == pytest.approx((6.0, 3.0))
    assert curved.coefficients(1, 8) == pytest.approx((7.0, 1 + 2 * (1 - math.cos(math.pi / 4))))
    assert (dual.coefficients(2, 8), dual.final(8)) == (Coefficients(7.0, 2.0), Coefficients(4.0, 5.0))
    assert planned("mixtral", 4, variant="repbend").coefficients(1, 8) == Coefficients(1.0, 1.0)


def test_the_log_shows_the_plan() -> None:
    source = ANY_MODEL.source
    assert planned("mixtral", 4, schedule="cosine").text() == (
        "breaks    rerouting, weighting paper, alpha 10, cosine over all steps; blocks 0, 1 (from 0), LoRA on 0-1, "
        f"no block above runs; defaults from {source}"
    )
    curves: dict[str, Any] = {"reroute_curve": {"start": 8, "end": 4}, "retain_curve": {"start": 1, "end": 5}}
    dual = planned("mixtral", 4, weighting="dual", schedule_steps=3, retain_layers="all", **curves).text()
    assert "weighting dual over 3 steps; " in dual
    assert "LoRA on 0-1, all blocks run; " in dual
    assert planned("mixtral", 4, variant="repbend").text().startswith("breaks    RepBend; blocks 0, 1 (from 0)")


def test_resolved_json_shows_the_plan() -> None:
    plan = planned("granitemoe", 4, retain_layers="all", target_layers="0,3", schedule_steps=3, alpha=2)
    assert plan.retained_at == (-1, 0, 1, 2, 4)
    assert plan.as_json() == {
        "circuit_breaker": {
            "variant": "rr", "target_layers": [0, 3], "retain_layers": ["embeddings", 0, 1, 2, "final norm"],
            "lora_layers": "0-3", "all_blocks_run": True, "alpha": 2.0, "schedule_steps": 3, "preset": "granite-moe",
            "source": PRESETS["granite-moe"].source,
        },
        "reference": "the adapter off",
    }  # fmt: skip
    targets = planned("mixtral", 4, target_layers="1-3").as_json()["circuit_breaker"]
    assert targets["retain_layers"] == [1, 2, 3], "blocks, not the norm"
