"""Every model type of the installed transformers with experts: the laws of `family_laws` hold, or a reason is listed.

A family that a newer transformers brings is tested without a new line here; so `FAILS` and `NOT_MADE` must be exact.
"""

from pathlib import Path

import pytest

from llama_stack_provider_moe.compute.moe import model_types
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.exceptions import REFUSED
from llama_stack_provider_moe.compute.moe.model_types import has_experts, types_with_experts
from llama_stack_provider_moe.errors import LayoutError, MoeError
from tests.support.family_laws import LAWS
from tests.support.family_results import FAILS, FILE, NOT_MADE, text
from tests.support.family_subject import Subject

MADE = [each for each in types_with_experts() if each not in NOT_MADE and each not in REFUSED]


def test_what_one_type_has_is_told_by_its_own_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job asks for its model's type alone, and reads one file of several hundred."""
    read: list[str] = []
    source = model_types._source
    monkeypatch.setattr(model_types, "_source", lambda model_type: read.append(model_type) or source(model_type))
    has_experts.cache_clear()
    found = {each: has_experts(each) for each in ("llama", "mixtral", "no such type")}
    assert found == {"llama": False, "mixtral": True, "no such type": False}
    assert read == ["llama", "mixtral"]


# One family after the other: its laws share its model.
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("model_type", MADE)
@pytest.mark.filterwarnings("ignore")
def test_law(model_type: str, law: str, tmp_path: Path) -> None:
    subject = Subject(model_type)
    if (model_type, law) not in FAILS:
        LAWS[law](subject, tmp_path)
        return
    with pytest.raises((AssertionError, MoeError), match=FAILS[model_type, law].shows):
        LAWS[law](subject, tmp_path)


@pytest.mark.parametrize("model_type", [each for each in REFUSED if each in types_with_experts()])
def test_a_refused_type_is_refused_with_its_reason(model_type: str) -> None:
    with pytest.raises(LayoutError, match=f"{model_type}.*{REFUSED[model_type][:20]}"):
        find_layout(Subject(model_type).model())


@pytest.mark.parametrize("model_type", NOT_MADE)
def test_a_type_that_is_not_made_can_not_be_made(model_type: str) -> None:
    with pytest.raises((ImportError, AttributeError)):
        Subject(model_type).model()


def test_at_least_55_types_hold_all_laws() -> None:
    assert len(MADE) - len({model_type for model_type, _ in FAILS}) >= 55


@pytest.mark.filterwarnings("ignore")
def test_the_file_that_the_command_shows_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "run python -m tests.support.family_results"
