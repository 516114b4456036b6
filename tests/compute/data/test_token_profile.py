"""The text of single tokens, as `moe-train data check --show` prints it."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama_stack_provider_moe.compute.data.token_profile import pieces_of

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
