"""Convert a Hugging Face folder into a GGUF file for llama.cpp, Ollama and others, verified before it appears.

    $ moe-train export gguf MODEL OUT.gguf --type q4_k_m

llama.cpp's converter writes F32, F16, BF16 and Q8_0; its llama_model_quantize writes the other types from a file that
keeps the model's dtype without loss. Both run in separate processes; `llama_cpp` obtains them.
"""

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

from llama_stack_provider_moe.compute.export.end_tokens import ending_as_learnt
from llama_stack_provider_moe.compute.export.gguf_file import read_header
from llama_stack_provider_moe.compute.export.projector import (
    NoProjector,
    ProjectorCheck,
    check_projector,
    vision_entries,
)
from llama_stack_provider_moe.compute.export.reference import Reference, read_reference
from llama_stack_provider_moe.compute.export.staging import staging_folder
from llama_stack_provider_moe.compute.export.tensors import TensorEntry, read_model
from llama_stack_provider_moe.compute.export.verify import GgufCheck, verify
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.errors import ExportError, InvalidInput, ModelError, MoeError, NoRoom, NoToolchain
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.small_files import read_config
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.jobdir.checkpoint_index import sync
from llama_stack_provider_moe.llama_cpp import CONVERTER, Toolchain, find_toolchain
from llama_stack_provider_moe.llama_cpp.install import missing_for_conversion
from llama_stack_provider_moe.llama_cpp.process import (
    Ended,
    allowed_environment,
    ask_llama,
    failure,
    run_bounded,
    scratch,
)
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.gguf_types import GGUF_TYPES, GgufType
from llama_stack_provider_moe.spec.local_commands import GgufCommand

Say = Callable[[str], None]
CONVERTED: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")  # `convert` writes these, `quantize` the others
# llama_ftype in llama.h
_FILE_TYPES: dict[GgufType, int] = {
    "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_m": 12, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
# Largest number of bits per weight, in rows of a multiple of 256 and in others, where K-quants fall back to types with
# blocks of 32.
_BITS: dict[GgufType, tuple[float, float]] = {
    "f32": (32, 32), "f16": (16, 16), "bf16": (16, 16), "q8_0": (8.5, 8.5), "q4_0": (4.5, 4.5), "q4_1": (5, 5),
    "q5_0": (5.5, 5.5), "q5_1": (6, 6), "q2_k": (3.5, 4.8), "q3_k_m": (4.3, 5.0), "q4_k_s": (4.9, 5.8),
    "q4_k_m": (5.2, 6.6), "q5_k_s": (5.6, 6.2), "q5_k_m": (5.9, 7.2), "q6_k": (6.6, 8.5),
}  # fmt: skip
_VOCABULARY_BITS = 8.5  # embeddings and head keep more bits
_VOCABULARY_ROWS = 16_384
_SLACK_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 30  # rows that llama_model_quantize holds in memory
# Both print the name of each tensor when they start it, and the largest takes seconds.
_SILENCE_S = 900.0


# Model type -> a setting that llama.cpp 0.5 fixes, whatever the config says: argument `norm_w` of `build_moe_ffn`, and
# `n_swa`, in its src/models/qwen3moe.cpp, olmoe.cpp, qwen2moe.cpp and llama4.cpp.
_FIXED: dict[str, tuple[str, int]] = {
    "qwen3_moe": ("norm_topk_prob", True), "olmoe": ("norm_topk_prob", False), "qwen2_moe": ("norm_topk_prob", False),
    "llama4_text": ("attention_chunk_size", 8192),
}  # fmt: skip


# Architectures whose experts the converter expects as their published files have them: (experts, in, out).
_TRANSPOSED = ("Qwen3VLMoeForConditionalGeneration",)


def lossless(model: Path) -> GgufType:
    """The smallest type that stores the folder's weights exactly; quantising starts from it."""
    dtypes = {entry.dtype for entry in read_model(model).values() if entry.dtype.is_floating_point}
    if dtypes <= {torch.bfloat16}:
        return "bf16"
    return "f16" if dtypes <= {torch.float16} else "f32"


def bytes_needed(model: Path, types: Iterable[GgufType]) -> int:
    """Upper bound of the bytes for files of `types` and their sources in one folder."""
    entries = list(read_model(model).values())
    wanted = set(types)
    if wanted - set(CONVERTED):
        wanted.add(lossless(model))
    beside = sum(file.stat().st_size for file in model.glob("*token*"))
    return sum(_estimate(entries, type_) + beside + _SLACK_BYTES for type_ in wanted)


def knows(model: Path, tools: Toolchain) -> None:
    """Check that the converter knows the architecture and the tokenizer, by writing only the vocabulary.

    Raises:
        ExportError: the converter does not know one of them.
        NoToolchain: this Python lacks a package that the converter imports.
    """
    with scratch() as folder:
        _by_converter(model, Path(folder) / "vocabulary.gguf", ("--vocab-only", "--outtype", "f32"), tools)


def convert(model: Path, out: Path, type: GgufType, tools: Toolchain, say: Say = lambda line: None) -> None:
    """Write `model` as `out` in one of the types of `CONVERTED`; `out` appears when it is complete.

    Args:
        model: folder with config.json, safetensors and tokenizer.
        out: the new file.
        type: type of its weights.
        tools: llama.cpp.
        say: gets a line for each step.

    Raises:
        InvalidInput: the converter does not write `type`, or `out` exists.
        ExportError: the converter does not know the model, failed, or printed nothing for too long.
        ModelError: `model` is not a folder with config.json and safetensors.
        NoToolchain: this Python lacks a package that the converter imports.
        NoRoom: the disk has too few free bytes.
    """
    if type not in CONVERTED:
        raise InvalidInput("type", type, f"one of {', '.join(CONVERTED)}; `quantize` writes the others")
    with _making(out) as folder:
        _check_room(out, model, [type])
        _converted(model, folder / out.name, type, tools, say)


def quantize(source: Path, out: Path, type: GgufType, tools: Toolchain, say: Say = lambda line: None) -> None:
    """Write the GGUF file `source` (F32, F16 or BF16) as `out` in a quantised type; `out` appears when it is complete.

    Args:
        source: the file to quantise.
        out: the new file.
        type: type of its weights.
        tools: llama.cpp.
        say: gets a line for each step.

    Raises:
        InvalidInput: `type` is one of the converter's, or `out` exists.
        ExportError: llama.cpp refused, crashed or printed nothing for too long.
        NoRoom: the disk has too few free bytes.
    """
    if type not in _FILE_TYPES:
        raise InvalidInput("type", type, f"one of {', '.join(_FILE_TYPES)}; `convert` writes the others")
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
    """Convert or quantise, verify, and rename to `out`; if anything fails, nothing is left behind.

    Args:
        model: folder with config.json, safetensors and tokenizer.
        out: the new file.
        type: type of its weights.
        tools: llama.cpp.
        source: verified F32, F16 or BF16 file of the same model to quantise from; default: one is written, verified and
            removed again.
        reference: reference of `model`, if it was read before.
        say: gets a line for each step.

    Raises:
        The errors of `convert`, `quantize` and `verify`.
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
                # In a small or nearly uniform model a wrong result can look like rounding to few bits.
                reference = reference or read_reference(model, say=say)
                verify(source, model, tools, reference=reference, type=exact, say=say)
            _quantized(source, part, type, tools, say)
            if source.parent == folder:
                source.unlink()
        return verify(part, model, tools, reference=reference, type=type, say=say)


def make_projector(model: Path, out: Path, tools: Toolchain, say: Say = lambda line: None) -> ProjectorCheck:
    """Write vision tower and projector of `model` as `out`, in the folder's own precision, and check the file.

    Raises:
        NoProjector: the model has none, or the converter knows no such file for its family.
        The errors of `convert` and `check_projector`.
    """
    entries = vision_entries(model)
    if not entries:
        raise NoProjector(f"{model.name} has no vision tower, and so no projector file")
    _require_free(out, sum(entry.nbytes for entry in entries) + _SLACK_BYTES)
    type_ = lossless(model)
    with _making(out) as folder, liveness.stage("making the projector file"):
        say(f"projector: converting {model.name} to {type_}")
        _by_converter(model, folder / out.name, ("--mmproj", "--outtype", type_), tools)
        return check_projector(folder / out.name, model)


def _converted(model: Path, out: Path, type: GgufType, tools: Toolchain, say: Say) -> None:
    say(f"{type}: converting {model.name}")
    size = _estimate(list(read_model(model).values()), type)
    with liveness.stage(f"converting to {type}", size, "bytes") as counter, ending_as_learnt(model) as folder:
        _by_converter(folder, out, ("--outtype", type), tools, lambda: counter.at(_size(out)))
    read_header(out)
    say(f"{type}: {out.stat().st_size:,} bytes")


def _quantized(source: Path, out: Path, type: GgufType, tools: Toolchain, say: Say) -> None:
    header = read_header(source)
    kinds = set(header.type_counts())
    if not kinds <= {"F32", "F16", "BF16", "I32", "MXFP4"}:
        raise InvalidInput("source", source.name, f"a file of F32, F16 or BF16, not of {', '.join(sorted(kinds))}")
    weights = sum(prod(tensor.shape) for tensor in header.tensors)
    needed = int(weights * max(_BITS[type]) / 8) + _SLACK_BYTES
    _require_free(out, needed)
    say(f"{type}: quantising {source.name}")
    request = {
        "do": "quantize", "source": str(source), "out": str(out), "ftype": _FILE_TYPES[type],
        "buffer_bytes": _BUFFER_BYTES,
    }  # fmt: skip
    with scratch() as folder, liveness.stage(f"quantising to {type}", needed, "bytes") as counter:
        ask_llama(tools.library, request, Path(folder), _SILENCE_S, lambda: counter.at(_size(out)))
    read_header(out)
    say(f"{type}: {out.stat().st_size:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _by_converter(
    model: Path, out: Path, options: Sequence[str], tools: Toolchain, heard: Callable[[], None] = liveness.alive
) -> None:
    if missing := missing_for_conversion():
        raise NoToolchain(
            f"llama.cpp's converter needs {', '.join(missing)}, which {sys.executable} lacks; "
            "pip install 'llama-stack-provider-moe[export]'"
        )
    architecture = _architecture(model, has_experts="--mmproj" not in options)
    # The converter's own `gguf` package: PyPI's of the same version lacks functions that the converter uses.
    paths = [str(tools.converter / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = run_bounded(
        [sys.executable, str(tools.converter / CONVERTER), str(model.absolute()), "--outfile", str(out), *options],
        _SILENCE_S,
        allowed_environment(
            PYTHONPATH=os.pathsep.join(paths), HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
        ),
        heard=heard,
    )  # fmt: skip
    if ended.code or ended.timed_out or not out.is_file():
        raise _converter_error(architecture, ended, tools, "--mmproj" in options)


def _converter_error(architecture: str, ended: Ended, tools: Toolchain, projector: bool) -> MoeError:
    """A clear sentence for mistakes that a person can fix; else the end of the converter's output."""
    output, version = ended.tail, f"llama.cpp {tools.version}"
    if re.search(r"Model \S+ is not supported|Architecture '\S+' not supported", output):
        if projector:
            return NoProjector(f"the converter of {version} makes no projector file (mmproj) of {architecture}")
        return ExportError(f"the converter of {version} does not know the architecture {architecture}")
    if "pre-tokenizer was not recognized" in output:
        return ExportError(
            f"the converter of {version} does not know this tokenizer: it recognises published models by a hash, and "
            "a tokenizer that was retrained or splits text differently has another hash"
        )
    if match := re.search(r"No module named '([\w.]+)'", output):
        return NoToolchain(
            f"llama.cpp's converter needs {match[1]}, which {sys.executable} lacks; "
            "pip install 'llama-stack-provider-moe[export]'"
        )
    return failure(f"the converter of {version}, on {architecture},", ended)


def _architecture(model: Path, has_experts: bool) -> str:
    """Name of a model's class by its config; checks that a file with, or without, its experts can be made of it."""
    try:
        config = read_config(model / "config.json")
        architecture = str(config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(f"model: {model} has no config.json with an architecture: {error}") from error
    if not any(model.glob("*.safetensors")):
        raise ModelError(f"model: {model} has no safetensors files; merge the adapter into its base first")
    text = config.get("text_config") or config
    name, value = _FIXED.get(str(text.get("model_type")), ("", 0))
    if text.get(name, value) != value:
        raise ExportError(
            f"llama.cpp computes every {text['model_type']} model with {name} {json.dumps(value)}, but the config of "
            f"this one says {json.dumps(text[name])}: its GGUF file would be a different model"
        )
    if has_experts and architecture in _TRANSPOSED:
        _require_published_order(model, architecture, int(text["hidden_size"]))
    return architecture


def _require_published_order(model: Path, architecture: str, hidden: int) -> None:
    for name, entry in read_model(model).items():
        if name.endswith(".experts.gate_up_proj") and entry.shape[1] != hidden:
            raise ExportError(
                f"llama.cpp's converter reads experts of {architecture} as published files have them (experts, in, "
                f"out), and {name} has the order of transformers 5 (experts, out, in): {list(entry.shape)} where the "
                f"second is not the hidden size {hidden}. An adapter that is merged into the published files keeps "
                "their order"
            )


def _estimate(entries: list[TensorEntry], type: GgufType) -> int:
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
    _require_free(out, bytes_needed(model, types))


def _require_free(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise NoRoom(f"out: {out.name} needs {needed:,} bytes, and its disk has {free:,} free; nothing was written")


@contextmanager
def _making(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`; its file with the name of `out` is synced and renamed to it, or nothing is left."""
    if os.path.lexists(out):
        raise InvalidInput("out", str(out), "a file that does not exist yet")
    with staging_folder(out, "making", "a file that no other export is writing") as folder:
        try:
            yield folder
            sync(folder / out.name)
            os.rename(folder / out.name, out)
            sync(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`moe-train export gguf`; the exit code is 0 if OUT was written, 2 for a mistake in the command line."""
    logging.disable_progress_bar()
    return answered(GgufCommand, argv, "export gguf", _run, (InvalidInput, NoToolchain))


def _run(command: GgufCommand) -> int:
    command.require_one_file()
    tools = find_toolchain()
    model, out = model_folder(local_names.whole_model(command.model), "model"), Path(command.out)

    say: Say = lambda line: None if command.as_json else print(line, file=sys.stderr, flush=True)  # noqa: E731
    check: GgufCheck | ProjectorCheck
    if command.type is None:
        check = make_projector(model, out, tools, say)
    else:
        check = make(model, out, command.type, tools, say=say)
    if command.as_json:
        print(json.dumps({"file": command.out, **check.model_dump(mode="json")}))
    else:
        print(f"{check.text()}\nsaved to {command.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
