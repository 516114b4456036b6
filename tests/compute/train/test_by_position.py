"""A job that extends its model's context: it measures before and after, and what it leaves says so."""

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from llama_stack_provider_moe.compute.models.rope import extend_for
from llama_stack_provider_moe.compute.train.by_position import PositionReport
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.options import ROPE_FILE
from tests.support.training_support import Row, Run, Workshop, said, workshop

__all__ = ["workshop"]

SHORT = {"max_position_embeddings": 32}
LONG: dict[str, Any] = {
    "options": {"rope_scaling": {"type": "yarn", "factor": 4}, "max_length": 128, "save_merged": True}
}


def rows(count: int, first: int = 0) -> list[Row]:
    """Rows of some 80 tokens."""
    text = "The quick garden grows in spring, and the river runs. "
    return [{"messages": [said("user", f"Tell {at} times."), said("assistant", text * 2)]}
            for at in range(first, first + count)]  # fmt: skip


def longer(workshop: Workshop, **blocks: Any) -> Run:
    folder = workshop.model("mixtral", **SHORT)
    return workshop.run("sft", folder, rows=rows(16), validation=rows(4, 100), **(LONG | blocks))


@pytest.fixture(scope="module")
def lora(workshop: Workshop) -> Run:
    return longer(workshop, training={"n_epochs": 4, "batch_size": 4})


def test_perplexity_by_position_before_and_after(lora: Run) -> None:
    assert lora.exit_code == COMPLETED, lora.reason
    assert [each.path for each in lora.manifest.artifacts if each.kind == "analysis"] == [str(lora.folder.positions)]
    report = PositionReport.model_validate_json((lora.folder.positions / "positions.json").read_bytes())
    assert (report.trained_positions, report.positions, report.rows, report.of) == (32, 128, 4, "held-out rows")
    assert [each.first for each in report.buckets] == [0, 8, 16, 32, 64]
    assert report.buckets[-1].last < 128
    for each in report.buckets:
        assert each.perplexity.keys() == {"as shipped", "scaled", "trained"}
        assert each.perplexity["as shipped"] != each.perplexity["scaled"], "scaling changes what the model computes"
    assert report.buckets[-1].perplexity["trained"] < 0.8 * report.buckets[-1].perplexity["scaled"]
    assert (lora.folder.positions / "positions.png").stat().st_size > 5000
    assert lora.resolved["rope"]["rope_parameters"]["factor"] == 4
    assert (lora.resolved["positions"], lora.resolved["rows_beyond_positions"]) == (128, 0)


def test_an_adapter_and_its_merge_compute_the_same(workshop: Workshop, lora: Run) -> None:
    ids = torch.arange(5, 85).unsqueeze(0)
    base = AutoModelForCausalLM.from_pretrained(workshop.model("mixtral", **SHORT))
    extend_for(base, lora.folder.adapter)
    adapted = PeftModel.from_pretrained(base, lora.folder.adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(lora.folder.merged).eval()
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
    assert AutoConfig.from_pretrained(lora.folder.merged).rope_parameters["rope_type"] == "yarn"
    card = (lora.folder.adapter / "README.md").read_text()
    assert f"PEFT does not read `{ROPE_FILE}`" in card
    assert "merge first" in card


def test_all_weights_and_a_start_from_the_adapter(workshop: Workshop, lora: Run) -> None:
    whole = longer(workshop, adapter=None, optimizer={"lr": 1e-3})
    assert whole.exit_code == COMPLETED, whole.reason
    config = json.loads((whole.folder.model / "config.json").read_text())
    assert config["rope_parameters"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "rope_theta": config["rope_parameters"]["rope_theta"]}  # fmt: skip
    assert config["max_position_embeddings"] == 128
    start = {"rank": 4, "alpha": 8, "init_from": str(lora.folder.adapter)}
    again = longer(workshop, adapter=start)
    assert again.exit_code == COMPLETED, again.reason
    without = longer(workshop, adapter=start, options={"max_length": 128})
    assert without.exit_code == FAILED
    assert (
        "it was trained with RoPE scaled by yarn x 4: 32 positions become 128, this job has the model" in without.reason
    )


def test_families_that_cannot_are_named(workshop: Workshop) -> None:
    run = workshop.run("sft", "gpt_oss", options={"rope_scaling": {"factor": 2}})
    assert run.exit_code == FAILED
    assert "options.rope_scaling: is not valid for this gpt_oss model, which scales" in run.reason


@pytest.mark.parametrize("recipe", ["dpo", "circuit_breaker"])
def test_only_sft_extends_the_context(recipe: str) -> None:
    more = {"circuit_breaker": {"retain": {"dataset_id": "x"}}} if recipe == "circuit_breaker" else {}
    body = {"recipe": recipe, "model": "m", "data": {"dataset_id": "x"}, "options": {"rope_scaling": {"factor": 2}}}
    with pytest.raises(ValueError, match=r"options\.rope_scaling: is for SFT only"):
        JOB_SPEC.validate_python(body | more)
