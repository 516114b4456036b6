"""Rows with more tokens than the model has positions: RoPE causes a warning, a table of positions an error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llama_stack_provider_moe.compute.data.positions import Positions, by_config, judge, positions_of
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.errors import DataError
from tests.support import tiny_models
from tests.support.training_support import Row, Run, Workshop, dpo_rows, said, sft_rows, workshop

__all__ = ["workshop"]


def long_row(words: int) -> Row:
    return {"messages": [said("user", "word " * words), said("assistant", "done")]}


def warnings(run: Run) -> list[str]:
    return [event.text for event in run.events("message") if event.level == "warning"]


def test_rows_beyond_the_models_positions_cause_a_warning(workshop: Workshop) -> None:
    run = workshop.run("sft", "mixtral", [*sft_rows(6), long_row(300), long_row(310)], sft_rows(2, 50),
                       options={"max_length": 2048})  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    (told,) = warnings(run)
    longest = run.resolved["longest_row"]
    assert longest > 300
    assert told == (
        f"2 of 10 rows have more tokens than the model has positions, 256 (max_position_embeddings 256); the longest "
        f"has {longest:,}. The model was not trained on these positions: set options.max_length to 256 or "
        "less, or options.rope_scaling (recipe sft) to extend them"
    )
    assert (run.resolved["positions"], run.resolved["rows_beyond_positions"]) == (256, 2)


def test_a_plain_text_beyond_the_positions_causes_a_warning(workshop: Workshop) -> None:
    texts: list[Any] = [{"text": "word " * 300}, *({"text": f"The garden of {i}."} for i in range(7))]
    run = workshop.run("sft", "mixtral", texts, sft_rows(2, 50), options={"max_length": 1024})
    assert run.exit_code == COMPLETED, run.reason
    (told,) = warnings(run)
    assert told.startswith("1 of 10 rows have more tokens than the model has positions, 256 (max_position_embeddings")
    assert run.resolved["rows_beyond_positions"] == 1


def test_rows_that_are_cut_to_the_positions_do_not(workshop: Workshop) -> None:
    rows = [*sft_rows(6), long_row(300)]
    rows[-1]["messages"].insert(0, said("assistant", "yes"))
    rows[-1]["messages"].insert(0, said("user", "Well?"))
    run = workshop.run("sft", "mixtral", rows, sft_rows(2, 50), options={"max_length": 256})
    assert run.exit_code == COMPLETED, run.reason
    assert not [text for text in warnings(run) if "positions" in text]
    assert (run.resolved["longest_row"], run.resolved["rows_beyond_positions"]) == (256, 0)


@pytest.mark.parametrize("recipe", ["dpo", "circuit_breaker"])
def test_every_recipe_warns(workshop: Workshop, recipe: str) -> None:
    """A pair counts as its prompt with the longer answer; a breaker counts the rows of all its sets."""
    model = workshop.model("mixtral", max_position_embeddings=24)
    rows = dpo_rows(4) if recipe == "dpo" else sft_rows(4)
    run = workshop.run(recipe, model, rows, rows[:1], options={"max_length": 64, "precompute_ref_log_probs": False}
                       if recipe == "dpo" else {"max_length": 64})  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    (told,) = [text for text in warnings(run) if "positions" in text]
    total = 5 if recipe == "dpo" else 4 + 1 + 12 + 3
    assert f" of {total} rows have more tokens than the model has positions, 24 " in told
    assert run.resolved["longest_row"] > 24


def test_rows_beyond_a_table_of_positions_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    """GPT-2 would read past its table's end: an IndexError on a CPU, garbage or an abort on a GPU."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    run = workshop.run("sft", tmp_path, [*sft_rows(3), long_row(60)], sft_rows(1), options={"max_length": 512})
    assert run.exit_code == FAILED
    assert run.reason.startswith(
        "1 of 5 rows have more tokens than the model has positions, 64 (wpe, a table of learned"
    )
    assert run.reason.endswith("options.max_length: expected at most 64")
    assert not run.events("step")


@pytest.mark.parametrize(("family", "name"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings"),
                                              ("gptj", "n_positions"), ("codegen", "n_positions")])  # fmt: skip
def test_a_tables_size_is_the_limit(family: str, name: str) -> None:
    """The number is right: a row of this length runs, one with one more token does not."""
    small: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    if family == "opt":
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 32,
                 "word_embed_proj_dim": 32}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=99, **{name: 24}, **small)).eval()
    found = positions_of(model)
    assert found is not None
    assert (found.most, found.table) == (24, True)
    with torch.no_grad():
        model(torch.arange(24).unsqueeze(0))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.arange(25).unsqueeze(0))


def test_a_vision_towers_table_does_not_limit_the_text() -> None:
    """Gemma 3 of 4B and more is a composite model: its SigLIP tower has a position for each patch, 4,096 in all."""
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    found = positions_of(AutoModelForCausalLM.from_config(config))
    assert found == Positions(64, False, "max_position_embeddings 64")


CONFIGS: list[tuple[dict[str, Any], int | None]] = [
    ({"max_position_embeddings": 4096}, 4096),
    ({"max_position_embeddings": 4096, "sliding_window": 512}, 4096),
    # Qwen's advice for long texts: keep the length, and add YaRN's factor.
    ({"max_position_embeddings": 32768, "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}}, 131072),
    # DeepSeek V3 and gpt-oss: the length is already the scaled one.
    ({"max_position_embeddings": 163840, "rope_parameters": {
        "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "rope_theta": 1e4}}, 163840),
    ({"max_position_embeddings": 131072, "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "rope_theta": 5e5}}, 131072),
    ({"max_position_embeddings": 4096, "rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 16384),
    ({"max_position_embeddings": 4096, "rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 8192),
]  # fmt: skip


@pytest.mark.parametrize(("values", "most"), CONFIGS)
def test_positions_by_config(values: dict[str, Any], most: int) -> None:
    found = by_config(AutoConfig.for_model("llama", **values))
    assert found is not None
    assert (found.most, found.table) == (most, False)


def test_models_without_a_limit() -> None:
    assert by_config(AutoConfig.for_model("mamba")) is None
    assert by_config(AutoConfig.for_model("bloom")) is None
    assert by_config(AutoConfig.for_model("falcon", alibi=True, max_position_embeddings=2048)) is None
    told = judge(None, torch.tensor([3, 7]), pytest.fail)
    assert told == {"positions": None, "longest_row": 7, "rows_beyond_positions": 0}


def test_a_rows_length_decides_alone() -> None:
    said: list[str] = []
    judge(Positions(7, False, "given"), torch.tensor([3, 7]), said.append)
    assert not said
    assert judge(Positions(6, False, "given"), torch.tensor([3, 7]), said.append)["rows_beyond_positions"] == 1
    assert len(said) == 1
    with pytest.raises(DataError, match="expected at most 6"):
        judge(Positions(6, True, "given"), torch.tensor([3, 7]), said.append)
