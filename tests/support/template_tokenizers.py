"""Tokenizers for any chat template, with the special tokens that it names, and the templates in TRL's wheel."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import trl.chat_template_utils
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CONTROL = re.compile(
    r"<[|｜][^\s'\"{}<>]{1,40}?[|｜]>|<\|\w{1,30}>|<\w{1,30}\|>|<[a-z]+_of_[a-z]+>|\[/?[A-Za-z]*[A-Z]{3,}\]|<sop>"
)
_TAGS = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
_WORDS = (
    "rivers, stones and lights of the harbour",
    "The tide at Brest is high at noon; the answer is five.",
)


def published() -> dict[str, str]:
    """Name -> text of each published chat template in TRL's wheel, without TRL's own variants for training."""
    folder = Path(trl.chat_template_utils.__file__).parent / "chat_templates"
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    return {name: text for name, text in found.items() if not name.endswith("_training")}


def byte_level(template: str | dict[str, str] | None, specials: Sequence[str], **named: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer.

    Args:
        template: its chat template, or several by name.
        specials: its special tokens.
        named: bos_token, eos_token, pad_token.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(specials), special_tokens=list(specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(_WORDS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **named)
    made.chat_template = template
    return made


def metaspace(template: str | None, specials: Sequence[str], scheme: str, **named: str) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer with ▁ for spaces and bytes for other characters, as sentencepiece has them.

    Args:
        template: its chat template.
        specials: its special tokens.
        scheme: where ▁ is put in front of a text: always, first or never.
        named: bos_token, eos_token, pad_token.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    letters = "< | > / _ - [ ] ! , ; . : a b c d e f g h i j k l m n o p q r s t u v w x y z"
    learner.train_from_iterator([*_WORDS, letters], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {text: number for number, text in enumerate([*first, *learnt["vocab"]])}
    merges = [tuple(each) for each in learnt["merges"]]
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **named)
    made.chat_template = template
    return made


def of_template(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose added tokens are what looks like one in `template`; tags such as <think> are not special."""
    specials = sorted({*_CONTROL.findall(template), "<s>", "</s>", "<pad>"})
    made = byte_level(template, specials, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_tokens([AddedToken(tag, normalized=False) for tag in sorted(set(_TAGS.findall(template)))])
    return made
