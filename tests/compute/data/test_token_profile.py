"""What `moe-train data check` finds with a tokenizer: the text of tokens, and prompts without room for answers."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama_stack_provider_moe.compute.data.token_profile import pieces_of, profile
from tests.support import tiny_models

TEXTS = ["שלום, 你好 🌊!", "two words  and\nmore", "bad \ufffd sign", ""]


def _byte_level() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator([""], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def _with_spaces_in_front() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token="?", byte_fallback=False))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.train_from_iterator(["two words and more"] * 9, trainers.BpeTrainer(special_tokens=["?"]))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_tokens_stay_whole(text: str) -> None:
    tokenizer = _byte_level()
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_spaces_between_words_stay() -> None:
    tokenizer = _with_spaces_in_front()
    ids = tokenizer.encode("two words and more")
    assert len(ids) > 1
    assert "".join(pieces_of(tokenizer, ids)) == "two words and more"


def test_prompts_that_leave_an_answer_no_room_are_named(tmp_path: Path) -> None:
    """By the job's settings a row is left out or refused; beyond the model's 256 positions it is told."""
    model = tiny_models.build("mixtral", tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": "x" * length}]} for length in (5, 180, 20, 330)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps([at, {**row, "item": row}]) + "\n" for at, row in enumerate(rows, start=1)))
    for truncate, outcome in (("drop", "dropped"), ("refuse", "refused")):
        job = {
            "recipe": "grpo", "model": str(model), "data": {"dataset_id": "x"}, "rl": {"max_completion_length": 100},
            "options": {"max_length": 400, "truncate": truncate},
            "reward": [{"grader": {"type": "length", "name": "any", "least": 1}}],
        }  # fmt: skip
        found = profile({"job": job, "rows": str(path), "show": 0})["tokens"]
        assert isinstance(found, dict)
        assert (found["answer"], found["positions"]) == (100, 256)
        assert (found["beyond_positions"], found["beyond_rows"]) == (1, [2])
        (named,) = found[f"{outcome}_rows"]
        assert named["row"] == 4
        assert "300 tokens, which rl.max_completion_length 100 leaves of options.max_length 400" in named["reason"]
        assert found["cut"] == 0
