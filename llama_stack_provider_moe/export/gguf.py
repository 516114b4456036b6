"""A Hugging Face folder -> a GGUF file for llama.cpp, Ollama and their like, verified before it appears.

    $ moe-train export gguf MODEL OUT.gguf --type q4_k_m

F32, F16, BF16 and Q8_0 are written by llama.cpp's converter, the other types by its llama_model_quantize from a file
that loses nothing of the model's own dtype. Both run in processes of their own: see `llama_cpp`, which obtains them.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from transformers.utils import logging

from llama_stack_provider_moe.errors import ExportError, InvalidInput, ModelError, MoeError, NoRoom, NoToolchain
from llama_stack_provider_moe.experts.upcycle import model_folder
from llama_stack_provider_moe.export.gguf_file import read_header
from llama_stack_provider_moe.export.hidden import hidden_folder, sync
from llama_stack_provider_moe.export.reference import Reference, read_reference
from llama_stack_provider_moe.export.tensors import Entry, read_model
from llama_stack_provider_moe.export.verify import GgufCheck, verify
from llama_stack_provider_moe.llama_cpp import CONVERTER, GGUF_TYPES, GgufType, Toolchain, find_toolchain
from llama_stack_provider_moe.llama_cpp.install import missing_for_conversion
from llama_stack_provider_moe.llama_cpp.process import (
    Ended,
    allowed_environment,
    ask_llama,
    failure,
    run_bounded,
    scratch,
)

Say = Callable[[str], None]
CONVERTED: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")  # of these `convert` writes, of the rest `quantize`
# llama_ftype of llama.h
_FILE_TYPES: dict[GgufType, int] = {
    "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_m": 12, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
# Bits of a weight at most, in rows of a multiple of 256 and in others: K-quants fall back to types of blocks of 32.
_BITS: dict[GgufType, tuple[float, float]] = {
    "f32": (32, 32), "f16": (16, 16), "bf16": (16, 16), "q8_0": (8.5, 8.5), "q4_0": (4.5, 4.5), "q4_1": (5, 5),
    "q5_0": (5.5, 5.5), "q5_1": (6, 6), "q2_k": (3.5, 4.8), "q3_k_m": (4.3, 5.0), "q4_k_s": (4.9, 5.8),
    "q4_k_m": (5.2, 6.6), "q5_k_s": (5.6, 6.2), "q5_k_m": (5.9, 7.2), "q6_k": (6.6, 8.5),
}  # fmt: skip
_VOCABULARY_BITS = 8.5  # embeddings and head keep more of theirs
_VOCABULARY_ROWS = 16_384
_SLACK_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 30  # of rows that llama_model_quantize holds
# Slower than what this is meant for: 540 MB took 20 s at most to quantise, on one busy core.
_SECONDS, _BYTES_PER_SECOND = 900.0, 2_000_000


# Model type -> what llama.cpp 0.5 computes whatever the config says: argument `norm_w` of `build_moe_ffn`, and `n_swa`,
# in its src/models/qwen3moe.cpp, olmoe.cpp, qwen2moe.cpp and llama4.cpp.
_FIXED: dict[str, tuple[str, int]] = {
    "qwen3_moe": ("norm_topk_prob", True), "olmoe": ("norm_topk_prob", False), "qwen2_moe": ("norm_topk_prob", False),
    "llama4_text": ("attention_chunk_size", 8192),
}  # fmt: skip


def lossless(model: Path) -> GgufType:
    """The smallest type that holds the folder's weights exactly: what quantising starts from."""
    dtypes = {entry.dtype for entry in read_model(model).values() if entry.dtype.is_floating_point}
    if dtypes <= {torch.bfloat16}:
        return "bf16"
    return "f16" if dtypes <= {torch.float16} else "f32"


def bytes_needed(model: Path, types: Iterable[GgufType]) -> int:
    """Bytes that the files of `types` and what they are made from take at most, in one folder."""
    entries = list(read_model(model).values())
    wanted = set(types)
    if wanted - set(CONVERTED):
        wanted.add(lossless(model))
    beside = sum(file.stat().st_size for file in model.glob("*token*"))
    return sum(_estimate(entries, type_) + beside + _SLACK_BYTES for type_ in wanted)


def knows(model: Path, tools: Toolchain) -> None:
    """Raise where the converter does not know the architecture or the tokenizer; it writes the vocabulary alone.

    Raises:
        ExportError: it does not.
        NoToolchain: this Python lacks a package that it imports.
    """
    with scratch() as folder:
        _by_converter(model, Path(folder) / "vocabulary.gguf", ("--vocab-only", "--outtype", "f32"), tools)


def convert(model: Path, out: Path, type: GgufType, tools: Toolchain, say: Say = lambda line: None) -> None:
    """Write `model` as `out` in one of the types of `CONVERTED`; `out` appears when it is whole.

    Raises:
        InvalidInput: `type` is not the converter's, or `out` is there.
        ExportError: the converter does not know the model, failed, or took too long.
        ModelError: `model` is no folder with config.json and safetensors.
        NoToolchain: this Python lacks a package that the converter imports.
        NoRoom: the disk is too small.
    """
    if type not in CONVERTED:
        raise InvalidInput("type", type, f"one of {', '.join(CONVERTED)}; the others are made by `quantize`")
    with _making(out) as folder:
        _check_room(out, model, [type])
        _converted(model, folder / out.name, type, tools, say)


def quantize(source: Path, out: Path, type: GgufType, tools: Toolchain, say: Say = lambda line: None) -> None:
    """Write the GGUF file `source` (F32, F16 or BF16) as `out` in a quantised type; `out` appears when it is whole.

    Raises:
        InvalidInput: `type` is one of the converter's, or `out` is there.
        ExportError: llama.cpp refused, crashed or took too long.
        NoRoom: the disk is too small.
    """
    if type not in _FILE_TYPES:
        raise InvalidInput("type", type, f"one of {', '.join(_FILE_TYPES)}; the others are made by `convert`")
    with _making(out) as folder:
        _quantized(source, folder / out.name, type, tools, say)


def make(
    model: Path,
    out: Path,
    type: GgufType,
    tools: Toolchain,
    source: Path | None = None,
    reference: Reference | None = None,
    say: Say = lambda line: None,
) -> GgufCheck:
    """Convert or quantise, verify, and let `out` appear; when anything fails, nothing of it is left.

    Args:
        model: folder with config.json, safetensors and tokenizer.
        out: the file to make.
        type: of its weights.
        tools: llama.cpp.
        source: F32, F16 or BF16 file of the same model to quantise from, verified before; left out: one is made,
            verified, and removed again.
        reference: of `model`, where it was read before.
        say: is told of each step.

    Raises:
        What `convert`, `quantize` and `verify` raise.
    """
    if type not in GGUF_TYPES:
        raise InvalidInput("type", type, f"one of {', '.join(GGUF_TYPES)}")
    with _making(out) as folder:
        part = folder / out.name
        if type in CONVERTED:
            _check_room(out, model, [type])
            _converted(model, part, type, tools, say)
        else:
            if source is None:
                _check_room(out, model, [type])
                source = folder / "lossless.gguf"
                exact = lossless(model)
                _converted(model, source, exact, tools, say)
                # What a small or nearly uniform model computes wrong may pass for the rounding to few bits.
                reference = reference or read_reference(model, say=say)
                verify(source, model, tools, reference=reference, type=exact, say=say)
            _quantized(source, part, type, tools, say)
            if source.parent == folder:
                source.unlink()
        return verify(part, model, tools, reference=reference, type=type, say=say)


def _converted(model: Path, out: Path, type: GgufType, tools: Toolchain, say: Say) -> None:
    say(f"{type}: converting {model.name}")
    _by_converter(model, out, ("--outtype", type), tools)
    read_header(out)
    say(f"{type}: {out.stat().st_size:,} bytes")


def _quantized(source: Path, out: Path, type: GgufType, tools: Toolchain, say: Say) -> None:
    header = read_header(source)
    kinds = set(header.type_counts())
    if not kinds <= {"F32", "F16", "BF16", "I32", "MXFP4"}:
        raise InvalidInput("source", source.name, f"a file of F32, F16 or BF16, not of {', '.join(sorted(kinds))}")
    weights = sum(prod(tensor.shape) for tensor in header.tensors)
    needed = int(weights * max(_BITS[type]) / 8) + _SLACK_BYTES
    if needed > (free := shutil.disk_usage(out.parent).free):
        raise NoRoom(f"out: {out.name} needs {needed:,} bytes, and its disk has {free:,} free; nothing was written")
    say(f"{type}: quantising {source.name}")
    request = {
        "do": "quantize", "source": str(source), "out": str(out), "ftype": _FILE_TYPES[type],
        "buffer_bytes": _BUFFER_BYTES,
    }  # fmt: skip
    with scratch() as folder:
        ask_llama(tools.library, request, Path(folder), _timeout(source.stat().st_size))
    read_header(out)
    say(f"{type}: {out.stat().st_size:,} bytes")


def _by_converter(model: Path, out: Path, options: Sequence[str], tools: Toolchain) -> None:
    if missing := missing_for_conversion():
        raise NoToolchain(
            f"llama.cpp's converter needs {', '.join(missing)}, which {sys.executable} lacks; "
            "pip install 'llama-stack-provider-moe[export]'"
        )
    architecture = _architecture(model)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    # Its own `gguf` and not PyPI's of the same version, which lacks what the converter asks of it.
    paths = [str(tools.converter / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = run_bounded(
        [sys.executable, str(tools.converter / CONVERTER), str(model.absolute()), "--outfile", str(out), *options],
        _timeout(size),
        allowed_environment(
            PYTHONPATH=os.pathsep.join(paths), HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
        ),
    )  # fmt: skip
    if ended.code or ended.timed_out or not out.is_file():
        raise _converter_error(architecture, ended, tools)


def _converter_error(architecture: str, ended: Ended, tools: Toolchain) -> MoeError:
    """What a person can do something about, told in a sentence; else the end of what the converter said."""
    said, version = ended.tail, f"llama.cpp {tools.version}"
    if re.search(r"Model \S+ is not supported|Architecture '\S+' not supported", said):
        return ExportError(f"the converter of {version} does not know the architecture {architecture}")
    if "pre-tokenizer was not recognized" in said:
        return ExportError(
            f"the converter of {version} does not know this tokenizer: it knows those of published models by a hash, "
            "and a tokenizer that was trained anew or split otherwise has another one"
        )
    if match := re.search(r"No module named '([\w.]+)'", said):
        return NoToolchain(
            f"llama.cpp's converter needs {match[1]}, which {sys.executable} lacks; "
            "pip install 'llama-stack-provider-moe[export]'"
        )
    return failure(f"the converter of {version}, on {architecture},", ended)


def _architecture(model: Path) -> str:
    """Name of the model's class, by its config; there are weights beside it."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        architecture = str(config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(f"model: {model} has no config.json that names an architecture: {error}") from error
    if not any(model.glob("*.safetensors")):
        raise ModelError(f"model: {model} has no safetensors files; merge the adapter into its base first")
    text = config.get("text_config") or config
    name, value = _FIXED.get(str(text.get("model_type")), ("", 0))
    if text.get(name, value) != value:
        raise ExportError(
            f"llama.cpp computes every {text['model_type']} model with {name} {json.dumps(value)}, and this one's "
            f"config says {json.dumps(text[name])}: its GGUF file would be another model"
        )
    return architecture


def _estimate(entries: list[Entry], type: GgufType) -> int:
    bits = 0.0
    for entry in entries:
        aligned, fallback = _BITS[type]
        each = aligned if entry.shape and entry.shape[-1] % 256 == 0 else fallback
        if len(entry.shape) < 2:
            each = 32
        elif entry.shape[-1] % 32 and type not in ("f32", "f16", "bf16"):
            each = 16
        elif entry.shape[0] >= _VOCABULARY_ROWS:
            each = max(each, _VOCABULARY_BITS)
        bits += prod(entry.shape) * each
    return int(bits / 8)


def _check_room(out: Path, model: Path, types: Sequence[GgufType]) -> None:
    needed = bytes_needed(model, types)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise NoRoom(f"out: {out.name} needs {needed:,} bytes, and its disk has {free:,} free; nothing was written")


def _timeout(size: int) -> float:
    return _SECONDS + size / _BYTES_PER_SECOND


@contextmanager
def _making(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`; the file of its name in it is synced and becomes `out`, or nothing is left."""
    if os.path.lexists(out):
        raise InvalidInput("out", str(out), "a file that does not exist yet")
    with hidden_folder(out, "making", "a file that no other export is making") as folder:
        try:
            yield folder
            sync(folder / out.name)
            os.rename(folder / out.name, out)
            sync(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`moe-train export gguf`; the exit code is 0 when OUT was made, 2 for a mistake in the command line."""
    parser = argparse.ArgumentParser(
        prog="moe-train export gguf", description="Write a Hugging Face folder as a verified GGUF file."
    )
    parser.add_argument("model", help="folder with config.json, safetensors and tokenizer, or a hub id")
    parser.add_argument("out", help="file to make")
    parser.add_argument("--type", required=True, help=f"of the weights: {', '.join(GGUF_TYPES)}")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    given = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        if given.type not in GGUF_TYPES:
            raise InvalidInput("--type", given.type, f"one of {', '.join(GGUF_TYPES)}")
        tools = find_toolchain()
        check = make(
            model_folder(given.model, "model"), Path(given.out), given.type, tools,
            say=lambda line: None if given.json else print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except MoeError as error:
        print(f"export gguf: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput | NoToolchain) else 1
    except OSError as error:
        print(f"export gguf: {error.filename or given.out}: {error.strerror}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps({"file": given.out, **check.model_dump(mode="json")}))
    else:
        print(f"{check.text()}\nsaved to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
