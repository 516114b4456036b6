"""`moe-train families` shows every model type with experts, and says so of one that the tests have not seen."""

import json

import pytest

from llama_stack_provider_moe.compute.moe import families_command
from llama_stack_provider_moe.compute.moe.families_command import families, main, table
from llama_stack_provider_moe.compute.moe.model_types import types_with_experts
from tests.support.cli_support import moe_train


def test_every_type_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for model_type, whole in types_with_experts().items():
        assert f"{model_type} ({whole})\n" in text
    assert "jetmoe (JetMoeForCausalLM)\n    Laws: refused: its attention has experts too" in text
    assert "glm5_next (" in text
    assert "not memory plan: sizes of tensors in its attention depend" in text


@pytest.mark.wide
def test_as_json() -> None:
    document = json.loads(moe_train("families", "--json").out)
    assert document["families"].keys() == types_with_experts().keys()
    held = [each for each in document["families"].values() if each.get("fails") == {}]
    assert len(held) >= 55
    assert document["families"]["nemotron_h"]["class"] == "NemotronHForCausalLM"
    assert "experts without a gate" in document["families"]["nemotron_h"]["found"]


def test_a_type_of_a_newer_transformers_is_shown_as_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**types_with_experts(), "next_month": "NextMonthForCausalLM"}
    monkeypatch.setattr(families_command, "types_with_experts", lambda: found)
    rows = {row[0]: row for row in table(families())}
    assert rows["next_month"][1] == "NextMonthForCausalLM"
    assert "tested with an older transformers" in rows["next_month"][3]
