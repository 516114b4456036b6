"""The transformers side of a verification: the tokens of texts, and the logits of a prompt."""

import gc
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llama_stack_provider_moe.compute.export.tensors import read_model
from llama_stack_provider_moe.compute.models.chat_templates import default_template
from llama_stack_provider_moe.compute.moe.model_types import class_of, is_composite
from llama_stack_provider_moe.compute.runtime.library_signs import transformers_counts, watch_layers
from llama_stack_provider_moe.errors import ModelError, shorten
from llama_stack_provider_moe.ground import liveness

# Plain text, spaces and line ends, digits, scripts and combined characters, emoji, code, and markup-like text.
PROBES = (
    "The expert that answers is not always the one you asked; the router decides.",
    "  two leading spaces,\ttabs\t\tand\n\n\nthree line ends, trailing   \n",
    "In 1969 3.14159 and 1,234,567.89 were written 0x7fff, 1e-05 and 12345678901234567890.",
    "Größe, naïve café, Ελληνικά, Привет мир, नमस्ते, 你好，世界, こんにちは, 안녕하세요, עברית, العربية",
    "e\u0301 \u00e9 \u200b\u200d 👩‍👩‍👧‍👦 🏳️‍🌈 ½ ² № ﷺ \u2028 …",
    "def f(x: int) -> dict[str, int]:\n    return {'a': x ** 2, \"b\": x // 3}  # done\n\n\tif (a != b) { c += 1; }",
    "I'm, you're, he'll, WE'VE, don't; <b>bold</b> [INST] not a tag [/INST] &amp; a@b.example/path?x=1&y=2",
)
_CHAT = (
    {"role": "user", "content": "What is the capital of France? Answer in 3 words."},
    {"role": "assistant", "content": "It is Paris!"},
    {"role": "user", "content": "Thanks, and of Italy?"},
)
_QUESTION = "What is the capital of France?"
_MOST_POSITIONS = 160
_LEFT_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Reference:
    """The reference that a GGUF file is compared with.

    Attributes:
        texts: probe texts; the last one is rendered by the chat template if there is one.
        tokens: tokens of each text, without special tokens.
        tokens_with_special: tokens of each text, with the special tokens that the tokenizer adds.
        ids: a prompt made of the probes' tokens.
        prompt: text that both sides continue, to show to people.
        prompt_ids: its tokens.
        chat_template: the tokenizer's chat template.
        logits: fp32 [positions, vocabulary] for `ids`; None if the model was not run.
        computed_in: dtype of that computation.
        why_not: why the model was not run.
        quirks: known differences between the two sides for this model.
        left_out: what the file does not have of this model.
    """

    texts: tuple[str, ...]
    tokens: tuple[list[int], ...]
    tokens_with_special: tuple[list[int], ...]
    ids: list[int]
    prompt: str
    prompt_ids: list[int]
    chat_template: str | None
    logits: Tensor | None
    computed_in: str
    why_not: str
    quirks: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def read_reference(
    model: Path, prompt: str | None = None, available_bytes: int | None = None, say: Callable[[str], None] = print
) -> Reference:
    """Load the folder with transformers and run it, in fp32 if that fits into memory, else in its own dtype.

    Args:
        model: folder with config.json, safetensors and tokenizer.
        prompt: text to continue; default: a question, rendered by the chat template.
        available_bytes: available memory; default: that of this machine, or of this process's control group.
        say: gets a line for each step.

    Raises:
        ModelError: the folder can't be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model: {model} can't be loaded: {shorten(str(error), 300)[1:-1]}") from error
    template = default_template(tokenizer)
    texts, asked = [*PROBES], _QUESTION if prompt is None else prompt
    if template is not None:
        texts.append(_rendered(tokenizer, list(_CHAT), False))
        if prompt is None:
            asked = _rendered(tokenizer, [{"role": "user", "content": _QUESTION}], True)
    plain = tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    special = tuple(tokenizer(text)["input_ids"] for text in texts)
    inner = config.get_text_config()
    most = min(_MOST_POSITIONS, getattr(inner, "max_position_embeddings", None) or _MOST_POSITIONS)
    ids = [token for each in (plain[-1], *plain[:-1]) for token in each][:most]
    prompt_ids = tokenizer(asked, add_special_tokens=False)["input_ids"][: most // 2]
    dtype, why_not = _fitting_dtype(model, available_memory() if available_bytes is None else available_bytes)
    logits = None
    if dtype is not None:
        say(f"verifying: transformers' logits of {len(ids)} tokens, in {_name(dtype)}")
        logits = _logits(model, config, ids, dtype)
    return Reference(
        tuple(texts), plain, special, ids, asked, prompt_ids, template, logits,
        "" if dtype is None else _name(dtype), why_not, _quirks(inner), _left_out(config),
    )  # fmt: skip


def available_memory() -> int:
    """Bytes that this process can still allocate, by the machine and by its control group (version 2)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such group, or "max"
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found)


def _fitting_dtype(model: Path, available: int) -> tuple[torch.dtype | None, str]:
    """fp32, which adds no rounding; else the weights' dtype; else None and the reason."""
    entries = [entry for entry in read_model(model).values() if entry.dtype.is_floating_point]
    numbers = sum(entry.nbytes // entry.dtype.itemsize for entry in entries)
    largest = max((entry.nbytes for entry in entries), default=0)
    stored = max(entries, key=lambda entry: entry.nbytes).dtype if entries else torch.float32
    for dtype in dict.fromkeys((torch.float32, stored)):
        if numbers * dtype.itemsize + largest + _LEFT_FREE_BYTES <= available:
            return dtype, ""
    needed = numbers * stored.itemsize + largest + _LEFT_FREE_BYTES
    return None, f"the model needs {needed:,} bytes of memory to run in transformers, and {available:,} are free"


def _logits(model: Path, config: PreTrainedConfig, ids: list[int], dtype: torch.dtype) -> Tensor:
    # A composite model runs whole, on tokens of text alone.
    kind = class_of(config) if is_composite(config) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            with liveness.stage("opening the model", unit="files"), transformers_counts():
                loaded: PreTrainedModel = (kind or AutoModelForCausalLM).from_pretrained(model, dtype=dtype).eval()
        watch_layers(loaded)
        with liveness.stage("computing logits"), torch.inference_mode():
            logits: Tensor = loaded(torch.tensor([ids]), use_cache=False).logits[0].float().clone()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {model} can't be run: {shorten(str(error), 300)[1:-1]}") from error
    del loaded
    gc.collect()
    return logits


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generate: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    return text


def _quirks(config: PreTrainedConfig) -> tuple[str, ...]:
    """Differences with a known cause.

    YaRN with `truncate: false` (gpt-oss): llama.cpp 0.5 always rounds the two dimensions between which frequencies are
    blended (`ggml_rope_yarn_corr_dims`, ggml.c). In a tiny gpt-oss with a logits' spread of 0.57, logits differ by
    4.8e-2 with it, and by 2.0e-6 without YaRN.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and rope.get("truncate", True) is False:
        return ("llama.cpp rounds YaRN's correction dimensions, although this model's config says truncate: false",)
    return ()


def _left_out(config: PreTrainedConfig) -> tuple[str, ...]:
    """The parts of a composite model beside its language model, and the way to a file of them."""
    if not is_composite(config):
        return ()
    parts = [name.removesuffix("_config") for name in config.sub_configs if name != "text_config"]
    return (
        f"the file has the language model of this {config.model_type} model and reads text alone; its other parts "
        f"({', '.join(parts)}) are not in it. For images llama.cpp needs a projector file beside it: artifact "
        "`gguf-mmproj` of an export, or `moe-train export gguf --mmproj`",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
