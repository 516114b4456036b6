"""What was learnt is what stops: in the saved generation config, in what generates, and in what is exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_stack_provider_moe.compute.export.end_tokens import end_ids, ending_as_learnt
from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.export.ollama import read_chat
from llama_stack_provider_moe.compute.models.generation_ends import ends_of, stop_at
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.support import tiny_models
from tests.support.training_support import Run, Workshop, said, workshop

__all__ = ["workshop"]

ASKED = [said("user", "What colour is the sky?")]
ROWS = [{"messages": [*ASKED, said("assistant", "blue")]}] * 8
IM_END, END_OF_TEXT = 1, tiny_models.VOCAB_SIZE


def base(folder: Path) -> Path:
    """A base model: its tokenizer ends a text with <|endoftext|>, and its chat template a turn with <|im_end|>."""
    # With the usual spread, the frozen head could not give a loss near 0.
    tiny_models.build("granitemoe", folder, vocab_size=END_OF_TEXT + 1, eos_token_id=END_OF_TEXT, initializer_range=0.5)
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    assert tokenizer.eos_token_id == END_OF_TEXT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Run:
    folder = base(workshop.root / "models" / "base")
    return workshop.run(
        "sft", folder, ROWS, ROWS[:1], optimizer={"lr": 2e-2}, training={"n_epochs": 40},
        options={"save_merged": True, "keep_checkpoints": 1},
    )  # fmt: skip


def test_the_merged_model_stops_where_its_rows_ended(run: Run) -> None:
    assert run.exit_code == COMPLETED, run.reason
    assert run.steps("loss")[-1] < 0.05
    merged = run.folder.root / "artifacts" / "merged"
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [IM_END, END_OF_TEXT]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(made[0, ids.shape[1] :]) == "blue<|im_end|>"


def test_the_job_says_what_stops(run: Run) -> None:
    told = [event.text for event in run.events("message")]
    assert "generation stops at: <|im_end|> (learnt), <|endoftext|>" in told


def test_every_folder_and_export_of_the_job_stops_there(run: Run, tmp_path: Path) -> None:
    folder = run.folder
    (checkpoint,) = [path for path in (folder.root / "checkpoints").iterdir() if path.name[0] != "."]
    for each in (folder.adapter, checkpoint):
        assert end_ids(each) == [IM_END, END_OF_TEXT], each
        model = AutoModelForCausalLM.from_pretrained(each)
        assert isinstance(model, torch.nn.Module)
    merge(str(folder.read_spec().model), folder.adapter, tmp_path / "merged")
    assert end_ids(tmp_path / "merged") == [IM_END, END_OF_TEXT]
    assert read_chat(tmp_path / "merged").stop == ("<|endoftext|>", "<|im_end|>")


def test_a_gguf_gets_the_learnt_token_as_its_end(run: Run) -> None:
    merged = run.folder.root / "artifacts" / "merged"
    with ending_as_learnt(merged) as view:
        assert view != merged
        assert view.name == merged.name
        assert AutoTokenizer.from_pretrained(view).eos_token == "<|im_end|>"
        assert {path.name for path in view.iterdir()} == {path.name for path in merged.iterdir()}
    assert not view.exists()
    assert AutoTokenizer.from_pretrained(merged).eos_token == "<|endoftext|>", "the folder itself is unchanged"


@pytest.mark.parametrize(
    ("ends", "template"),
    [
        ([IM_END, 2], tiny_models.CHATML),  # it is the tokenizer's own end already
        ([2, IM_END], tiny_models.CHATML),  # listed first, but no answer ends with it
        (None, tiny_models.CHATML),
        ([2], None),
    ],
)
def test_another_folder_is_converted_as_it_is(tmp_path: Path, ends: Any, template: str | None) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    if ends is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with ending_as_learnt(tmp_path) as view:
        assert view == tmp_path


def test_ends_are_added_before_those_that_a_model_has() -> None:
    model, tokenizer = tiny_models.model("mixtral"), tiny_models.tokenizer()
    assert ends_of(model) == [IM_END]
    assert stop_at(model, tokenizer, []) is None
    assert stop_at(model, tokenizer, [IM_END]) == "generation stops at: <|im_end|> (learnt)"
    assert model.generation_config.eos_token_id == IM_END
    assert stop_at(model, tokenizer, [2]) == "generation stops at: <|im_start|> (learnt), <|im_end|>"
    assert ends_of(model) == [2, IM_END]
    model.generation_config.eos_token_id = None
    assert ends_of(model) == []
    assert stop_at(model, tokenizer, [2]) == "generation stops at: <|im_start|> (learnt)"
