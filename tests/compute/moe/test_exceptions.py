"""Every line of `exceptions` is still needed: without it, the family is refused or computed otherwise."""

import pytest

from llama_stack_provider_moe.compute.moe import derive, described, experts_modules, implementation, routers
from llama_stack_provider_moe.compute.moe.backend import OURS, is_dispatched
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.exceptions import KNOWN_LOOPS, OF_IMAGES, REFUSED, SCORINGS
from llama_stack_provider_moe.compute.moe.implementation import by_settings
from llama_stack_provider_moe.errors import LayoutError
from llama_stack_provider_moe.spec import Moe
from tests.support.family_subject import Subject

LOOPS = {"llama4_text": "Llama4TextExperts", "longcat_flash": "LongcatFlashExperts", "step3p7": "Step3p7Experts"}
HAS_SCORING = {"phimoe": "PhimoeTopKRouter"}
MISTAKEN = {"doge": True, "diffusion_gemma": False}  # whether it passes for a dense model
HAS_IMAGES = {"ernie4_5_vl_moe": "ernie4_5_vl_moe_text"}


def test_these_tests_are_of_all_lines() -> None:
    assert set(LOOPS.values()) == set(KNOWN_LOOPS)
    assert set(HAS_SCORING.values()) == set(SCORINGS)
    assert set(HAS_IMAGES.values()) == set(OF_IMAGES)


@pytest.mark.parametrize("model_type", HAS_SCORING)
def test_without_its_scoring_a_router_is_not_understood(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Subject(model_type).model()
    assert find_layout(model) is not None
    monkeypatch.setattr(derive, "SCORINGS", {})
    with pytest.raises(LayoutError, match=f"the weights of {HAS_SCORING[model_type]} are not a known function"):
        find_layout(model)


@pytest.mark.parametrize("model_type", HAS_IMAGES)
def test_without_its_line_a_model_has_two_blocks_of_experts(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Subject(model_type).model()
    layout = find_layout(model)
    assert layout is not None
    assert any(path.endswith("vision_moe") for path in layout.frozen)
    for module in (experts_modules, described, routers):
        monkeypatch.setattr(module, "OF_IMAGES", {})
    with pytest.raises(LayoutError, match=r"expected one block of experts in a layer, found .*text_moe.*vision_moe"):
        find_layout(model)


@pytest.mark.parametrize("model_type", LOOPS)
def test_a_loop_that_is_not_known_stays_transformers_own(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Subject(model_type).model()
    layout = find_layout(model)
    assert layout is not None
    assert layout.experts_class == LOOPS[model_type]
    assert not any(is_dispatched(experts) for experts in layout.experts(model).values())
    assert by_settings(Moe(), layout).implementation == OURS
    monkeypatch.setattr(implementation, "KNOWN_LOOPS", ())
    choice = by_settings(Moe(), layout)
    assert choice.implementation == "eager"
    assert "a loop that this version does not know" in choice.notes[0]


@pytest.mark.parametrize("model_type", REFUSED)
def test_without_its_line_a_refused_type_is_mistaken_or_not_understood(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two give no reason then, one passes for a dense model, and one for a model of the next token."""
    model = Subject(model_type).model()
    monkeypatch.setattr(derive, "REFUSED", {})
    if model_type in MISTAKEN:
        assert (find_layout(model) is None) is MISTAKEN[model_type]
        return
    with pytest.raises(LayoutError) as raised:
        find_layout(model)
    assert REFUSED[model_type] not in str(raised.value)
