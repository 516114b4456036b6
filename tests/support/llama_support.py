"""llama.cpp for tests: the toolchain, and tiny models with a tokenizer that its converter supports.

The converter knows tokenizers by a hash of how they encode a text, so a trained one does not work. GPT-2's is in the
toolchain, for its self-test; two ChatML tokens are added to it.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_stack_provider_moe.compute.export import gguf
from llama_stack_provider_moe.llama_cpp import Toolchain
from llama_stack_provider_moe.llama_cpp.install import install
from tests.support import tiny_models

CACHE = Path(os.environ.get("MOE_TRAIN_CACHE") or Path(__file__).parents[2] / ".cache")
# Rows long enough for K-quants, whose blocks have 256 numbers.
ALIGNED = {"hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": True}


@cache
def toolchain() -> Toolchain:
    """The toolchain of `make test`, installed if it is missing (some 20 s and two downloads)."""
    return install(cache=CACHE)[0]


@cache
def _gpt2() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gguf import GGUFReader

        reader = GGUFReader(toolchain().converter / "models" / "ggml-vocab-gpt-2.gguf")
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in
                                  ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])  # fmt: skip
    text: str = tokenizer.to_str()
    return text


def tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer with a ChatML template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_gpt2()), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=tiny_models.CHATML, padding_side="right",
    )  # fmt: skip


@contextmanager
def converting_once(kept: Path) -> Iterator[None]:
    """The converter, a process that imports torch, runs once for a model's content; later calls get a copy of its file.

    For tests of what comes after it: several exports of one job merge the same weights.
    """
    convert = gguf._by_converter

    def once(model: Path, out: Path, options: Sequence[str], *more: Any) -> None:
        content = hashlib.sha256(repr(options).encode())
        for path in sorted(model.glob("*.safetensors")) + sorted(model.glob("*.json")):
            content.update(path.name.encode() + path.read_bytes())
        file = kept / f"{content.hexdigest()}.gguf"
        if not file.exists():
            convert(model, out, options, *more)
            shutil.copy(out, file)
        else:
            shutil.copy(file, out)

    kept.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "_by_converter", once)
        yield


def build(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny random model of `family` with GPT-2's tokenizer, saved to `folder`."""
    known = tokenizer()
    shape = {"vocab_size": len(known), "max_position_embeddings": 512, "eos_token_id": known.eos_token_id,
             "pad_token_id": known.pad_token_id} | _FITTING.get(family, {}) | changes  # fmt: skip
    tiny_models.model(family, seed, **shape).save_pretrained(folder)
    known.save_pretrained(folder)
    return folder


# The shapes that llama.cpp needs, by family.
_FITTING: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4},  # the number of heads
    "qwen3_moe": {"norm_topk_prob": True},  # llama.cpp supports only this
    # Each fourth layer has no RoPE; llama.cpp supports only this chunk.
    "llama4_text": {"num_hidden_layers": 4, "attention_chunk_size": 8192},
}
