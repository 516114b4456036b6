"""Statements about servers: from the adapter's folder, with a source or unknown; and what was run here holds."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.export.servers import Kind, read_kind, statements
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter
from tests.support import tiny_models
from tests.support.export_support import adapted, by_peft, gap, logits

SERVERS = ["transformers serve", "vLLM", "SGLang", "llama.cpp --lora", "Ollama ADAPTER"]
BOTH = frozenset({"gate_up_proj", "down_proj"})


def kind(**changes: object) -> Kind:
    plain = {"experts": frozenset(), "router": False, "uneven": False, "dora": False, "biases": False}
    return Kind.model_validate({**plain, **changes})


@pytest.mark.parametrize("model_type", [*tiny_models.FAMILIES, "another"])
@pytest.mark.parametrize("experts", [frozenset(), BOTH, frozenset({"down_proj"})], ids=["attention", "both", "one"])
def test_each_statement_has_a_source_or_is_unknown(model_type: str, experts: frozenset[str]) -> None:
    found = statements(model_type, kind(experts=experts))
    assert [each.server for each in found] == SERVERS
    assert all(each.source or each.applies == "unknown" for each in found)


def said(model_type: str, **changes: object) -> str:
    return next(each.applies for each in statements(model_type, kind(**changes)) if each.server == "vLLM")


def test_statements_about_vllm() -> None:
    assert said("gpt_oss", experts=BOTH) == said("granitemoe") == "yes"
    assert said("olmoe", experts=BOTH) == "with settings"
    assert said("mixtral", experts=BOTH) == said("another") == said("gpt_oss", router=True) == "unknown"
    # It would load these and compute something else, or refuse them.
    for changes in ({"experts": BOTH, "uneven": True}, {"dora": True}, {"experts": frozenset({"down_proj"})}):
        assert said("gpt_oss", **changes) == "no", changes


def test_no_server_applies_moved_biases() -> None:
    assert {each.applies for each in statements("deepseek_v3", kind(biases=True))} == {"no"}


def test_the_kind_is_read_from_the_folder(tmp_path: Path) -> None:
    base = tiny_models.build("mixtral", tmp_path / "base")
    trunk = adapted(base, tmp_path / "trunk", Adapter(rank=2, plan="trunk"))
    assert read_kind(trunk).attention_only
    whole = adapted(base, tmp_path / "whole", Adapter(rank=2), train_router=True)
    assert read_kind(whole) == kind(experts=BOTH, router=True)
    uneven = adapted(base, tmp_path / "uneven", Adapter(rank=4, router_rank=1), train_router=True)
    assert read_kind(uneven).uneven
    (whole / ROUTER_BIAS).write_bytes(b"")
    assert read_kind(whole).biases
    (whole / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="can't be read"):
        read_kind(whole)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "llama"])
def test_transformers_applies_an_adapters_folder_by_itself(family: str, tmp_path: Path) -> None:
    base = tiny_models.build(family, tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter", Adapter(rank=2, alpha=4))
    expected = logits(by_peft(base, adapter))
    assert gap(logits(AutoModelForCausalLM.from_pretrained(adapter).eval()), expected) == 0
    assert gap(logits(AutoModelForCausalLM.from_pretrained(base).eval()), expected) > 0.1
