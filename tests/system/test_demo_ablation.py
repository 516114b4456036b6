"""The parts of the ablation demo that need no server: its prompts, what counts as French, and its plans."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from llama_stack_provider_moe.spec.ablation import AblationPlan

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_ablation")


def test_no_prompt_is_in_two_sets(demo: ModuleType) -> None:
    """Neither those that measure the direction, nor those that choose the plan, test its result."""
    target, baseline = demo.contrast()
    assert len(target) == len(baseline) == 64
    texts = [row["prompt"] for row in [*target, *baseline, *demo.retained()]]
    texts += [*demo.CHOOSING, *demo.HELD_OUT, *demo.ENGLISH_HELD_OUT]
    assert len(set(texts)) == len(texts)
    assert not {row["prompt"].split()[0] for row in target} & {text.split()[0] for text in demo.HELD_OUT}


@pytest.mark.parametrize(
    ("answer", "french"),
    [
        ("La capitale du Japon est Tokyo, une ville de plus de dix millions.", True),
        ("The word 'Bonjour' is a French greeting, and it is used in the morning.", False),
        ("This phrase translates to: le chat est dans la maison.", True),
        ("42", False),
        ("", False),
    ],
)
def test_an_answer_is_french_by_its_frequent_words(demo: ModuleType, answer: str, french: bool) -> None:
    assert demo.rate([answer]) == float(french)
    assert demo.rate([answer, "It is the cat."]) == float(french) / 2


def test_its_plans_are_valid(demo: ModuleType) -> None:
    plan = AblationPlan.model_validate({"ablate": demo.edits(10, 0.5, 30)})
    assert [(layer, each.measurement, each.scale) for layer, each in plan.edits().items()] == [
        (layer, layer, 0.5) for layer in range(10, 30)
    ]
