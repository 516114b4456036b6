"""Is a GGUF file the model it was made from? llama.cpp, in a process of its own, against transformers.

    loads     every tensor's data is checked by llama.cpp
    tokens    of probe texts and of a rendered conversation, equal
    logits    on the same token ids, with fp32 keys and values and no flash attention

Differences of logits are told in units of their spread (standard deviation). F32 is judged by the largest of them; F16
and BF16 by the largest in dense models, and by the median over positions of each position's largest in models with
experts, where a rounding may choose another expert at a near tie; quantised files by the mean over positions of
KL(transformers || llama.cpp), in nats. Which of these a file is, its coarsest matrix says, not its name.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llama_stack_provider_moe.errors import ExportError, shorten
from llama_stack_provider_moe.export.gguf_file import GgufHeader, GgufTensor, read_header
from llama_stack_provider_moe.export.reference import Reference, read_reference
from llama_stack_provider_moe.llama_cpp import GgufType, Toolchain
from llama_stack_provider_moe.llama_cpp.process import ask_llama, scratch

Say = Callable[[str], None]
_MOST_TOKENS = 32


class _Class(NamedTuple):
    """The most that a file may differ; see `_CLASSES`."""

    bits: float
    relative: float | None
    median: float | None
    kl: float
    share: float


# Coarsest tensor type -> bounds: largest and median difference in spreads, mean KL in nats and as a share of the
# spread's square (what small, nearly uniform models can have at all: that of a file of another seed is near 1).
# Measured on tiny models of spread 0.56 and on SmolLM2-135M of spread 8.0 (`benchmarks.gguf`), the most of each:
#   F32   largest 1.2e-5, 4.8e-4 in a chaotic one (weights of std 0.1, 256 wide); median 3.5e-5; KL 4.4e-10
#   F16   largest, dense, 9.9e-3; median 2.9e-2; KL 3.2e-4, share 1e-3
#   BF16  largest, dense, 6.7e-2; median 5.1e-2; KL 9.5e-4, share 3e-3
#   KL    Q8_0 5.7e-3, Q6_K 1.6e-2, Q5_0 and Q5_1 0.17, Q4_0 0.46, q4_k_m 0.09, q3_k_m 0.21, q2_k 0.59
#   share Q8_0 2.7e-3, Q5 1.8e-2, Q4_0 5e-2
_CLASSES: dict[str, _Class] = {
    "F32": _Class(32, 2e-3, 5e-4, 1e-6, 1e-6), "F16": _Class(16, 0.1, 0.1, 5e-3, 5e-3),
    "BF16": _Class(15.9, 0.5, 0.2, 1e-2, 1e-2), "Q8_0": _Class(8.5, None, None, 0.03, 0.01),
    "Q6_K": _Class(6.56, None, None, 0.1, 0.03), "Q5": _Class(5.5, None, None, 0.6, 0.06),
    "Q4": _Class(4.5, None, None, 1.5, 0.15), "Q3": _Class(3.44, None, None, 2.0, 0.25),
    "Q2": _Class(2.6, None, None, 2.5, 0.4),
}  # fmt: skip
_CLASS_OF = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_0": "Q5", "Q5_1": "Q5",
    "Q5_K": "Q5", "Q4_0": "Q4", "Q4_1": "Q4", "Q4_K": "Q4", "IQ4_NL": "Q4", "MXFP4": "Q4", "Q3_K": "Q3", "Q2_K": "Q2",
}  # fmt: skip
# What the matrices of a file type are meant to be, mostly.
_MAIN: dict[GgufType, str] = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0",
    "q5_1": "Q5_1", "q2_k": "Q2_K", "q3_k_m": "Q3_K", "q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_s": "Q5_K",
    "q5_k_m": "Q5_K", "q6_k": "Q6_K",
}  # fmt: skip
_SECONDS, _BYTES_PER_SECOND = 600.0, 2_000_000


class LogitsCheck(BaseModel):
    """Differences over `positions`: the largest of each, its median over positions, in units of the spread too; and
    the figures that judged, with the most that each may be.
    """

    model_config = ConfigDict(frozen=True)

    positions: int
    computed_in: str
    spread: float
    max_difference: float
    relative_difference: float
    median_relative_difference: float
    mean_kl: float
    max_kl: float
    same_top_token: float
    bounds: dict[str, float] = {}


class GgufCheck(BaseModel):
    """What was found out about a file that is right."""

    model_config = ConfigDict(frozen=True)

    type: GgufType | None
    bytes: int
    llama_cpp: str
    described: str
    tensor_types: dict[str, int]
    texts: int
    tokens: int
    logits: LogitsCheck | None
    prompt: str
    continuation: str
    notes: tuple[str, ...]

    def text(self) -> str:
        """For a person."""
        types = ", ".join(f"{name} x{count}" for name, count in self.tensor_types.items())
        lines = [
            f"{self.described}, {self.bytes:,} bytes, tensors: {types}",
            f"loaded by llama.cpp {self.llama_cpp}; {self.tokens} tokens of {self.texts} texts as in transformers",
        ]
        if (found := self.logits) is not None:
            lines.append(
                f"logits at {found.positions} positions against transformers in {found.computed_in}: largest "
                f"difference {found.max_difference:.2g} ({found.relative_difference:.2g} of their spread), mean KL "
                f"{found.mean_kl:.2g} nats, same top token {found.same_top_token:.0%}"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"llama.cpp, greedy, goes on after {self.prompt[-60:]!r}: {self.continuation!r}")
        return "\n".join(lines)


def verify(
    gguf: Path,
    model: Path,
    tools: Toolchain,
    reference: Reference | None = None,
    type: GgufType | None = None,
    say: Say = lambda line: None,
) -> GgufCheck:
    """Hold the file against the folder that it was made from; the file is left as it is, right or wrong.

    Args:
        gguf: the file.
        model: the folder.
        tools: llama.cpp.
        reference: of the folder, where it was read before.
        type: that was asked for; left out: nothing is said about fallbacks.
        say: is told of each step.

    Raises:
        ExportError: the file can't be read or loaded, or does not do what the model does; with the figures.
        ModelError: the folder can't be loaded.
    """
    header = read_header(gguf)
    reference = reference or read_reference(model, say=say)
    say(f"verifying: {gguf.name} by llama.cpp")
    size = gguf.stat().st_size
    with scratch() as folder:
        answer = ask_llama(
            tools.library,
            {
                "do": "run", "gguf": str(gguf), "texts": reference.texts, "ids": reference.ids,
                "prompt_ids": reference.prompt_ids, "most_tokens": _MOST_TOKENS,
            },
            Path(folder), _SECONDS + size / _BYTES_PER_SECOND,
        )  # fmt: skip
        raw = (Path(folder) / "logits.f32").read_bytes()
    logits = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(len(reference.ids), -1)
    _check_tokens(gguf, reference, answer["tokens"])
    if not bool(logits.isfinite().all()):
        raise ExportError(f"{gguf.name}: llama.cpp's logits are not finite")
    notes = [*_fallbacks(header, type), *reference.quirks]
    if [*reference.tokens_with_special] != answer["tokens_with_special"]:
        notes.append("llama.cpp and transformers differ in the special tokens that they add before or after a text")
    if (
        reference.chat_template is not None
        and header.metadata.get("tokenizer.chat_template") != reference.chat_template
    ):
        notes.append("the file's chat template is not the tokenizer's")
    found = None
    if reference.logits is None:
        notes.append(f"logits are finite, but were not compared: {reference.why_not}")
    else:
        found = _check_logits(gguf, header, reference, logits)
    return GgufCheck(
        type=type, bytes=size, llama_cpp=answer["version"], described=answer["described"],
        tensor_types=header.type_counts(), texts=len(reference.texts), tokens=sum(map(len, reference.tokens)),
        logits=found, prompt=reference.prompt, continuation=answer["continuation"], notes=tuple(notes),
    )  # fmt: skip


def compare(expected: Tensor, found: Tensor, computed_in: str) -> LogitsCheck:
    """Figures of two logits [positions, vocabulary], a row at a time in fp64."""
    differences, divergences, same = [], [], 0
    for row, other in zip(expected.double(), found.double(), strict=True):
        log_p, log_q = row.log_softmax(-1), other.log_softmax(-1)
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum()))
        differences.append(float((row - other).abs().max()))
        same += int(row.argmax() == other.argmax())
    spread = max(float(expected.std()), 1e-30)
    return LogitsCheck(
        positions=len(differences), computed_in=computed_in, spread=spread, max_difference=max(differences),
        relative_difference=max(differences) / spread, median_relative_difference=median(differences) / spread,
        mean_kl=math.fsum(divergences) / len(divergences), max_kl=max(divergences),
        same_top_token=same / len(differences),
    )  # fmt: skip


def _check_tokens(gguf: Path, reference: Reference, found: list[list[int]]) -> None:
    for text, expected, other in zip(reference.texts, reference.tokens, found, strict=True):
        if expected == other:
            continue
        pairs = zip(expected, other, strict=False)
        at = next((i for i, (one, two) in enumerate(pairs) if one != two), min(len(expected), len(other)))
        raise ExportError(
            f"{gguf.name}: llama.cpp tokenises {shorten(text)} otherwise than transformers, from token {at} on: "
            f"{other[at : at + 8]}, not {expected[at : at + 8]}"
        )


def _check_logits(gguf: Path, header: GgufHeader, reference: Reference, logits: Tensor) -> LogitsCheck:
    assert reference.logits is not None
    if logits.shape != reference.logits.shape:
        expected = reference.logits.shape[1]
        raise ExportError(f"{gguf.name}: llama.cpp's vocabulary has {logits.shape[1]} tokens, transformers' {expected}")
    found = compare(reference.logits, logits, reference.computed_in)
    bounds = _bounds(header, reference, found.spread)
    for name, bound in bounds.items():
        if not getattr(found, name) <= bound:
            raise ExportError(
                f"{gguf.name}: llama.cpp's logits are not the model's: {name} is {getattr(found, name):.3g}, and at "
                f"most {bound:.3g} is expected of a file whose coarsest matrices are {_coarsest(header)}; {found!r}"
            )
    return found.model_copy(update={"bounds": bounds})


def _bounds(header: GgufHeader, reference: Reference, spread: float) -> dict[str, float]:
    """Name of a figure -> the most that it may be."""
    classes = [_CLASSES[_coarsest(header)]]
    # What the other side rounds, or is known to compute otherwise, this file can't be blamed for.
    classes += [_CLASSES["BF16"]] if reference.computed_in != "float32" else []
    classes += [_CLASSES["F16"]] if reference.quirks else []
    judged = min(classes, key=lambda each: each.bits)
    bounds = {"mean_kl": min(judged.kl, judged.share * spread**2)}
    steady = judged.bits == 32 or not (any("_exps" in each.name for each in header.tensors) or reference.quirks)
    if judged.relative is not None and steady and reference.computed_in == "float32":
        bounds["relative_difference"] = judged.relative
    if judged.median is not None:
        bounds["median_relative_difference"] = judged.median
    return bounds


def _coarsest(header: GgufHeader) -> str:
    """The class of the matrices with the fewest bits."""
    return min((_CLASS_OF[each.type] for each in _matrices(header)), key=lambda name: _CLASSES[name].bits)


def _matrices(header: GgufHeader) -> list[GgufTensor]:
    found = [each for each in header.tensors if len(each.shape) > 1 and each.type in _CLASS_OF]
    if not found:
        raise ExportError("the file has no matrices")
    return found


def _fallbacks(header: GgufHeader, type: GgufType | None) -> list[str]:
    """A note where most matrices are not of the type that was asked for, with why."""
    if type is None:
        return []
    weights = [each for each in _matrices(header) if each.type != "F32" or type == "f32"]
    other = [each for each in weights if each.type != _MAIN[type]]
    if len(other) * 2 <= len(weights):
        return []
    counts = ", ".join(f"{count} {name}" for name, count in Counter(each.type for each in other).most_common())
    rows = sorted({each.shape[0] for each in other if each.shape[0] % 256})
    why = f"; rows of {', '.join(map(str, rows))} numbers do not fill blocks of 256" if rows and "_k" in type else ""
    return [f"asked for {type}, and only {len(weights) - len(other)} of {len(weights)} matrices are {_MAIN[type]}: "
            f"{counts}{why}"]  # fmt: skip
