"""Verify a GGUF file against the model it was made from: llama.cpp in a separate process, compared with transformers.

    loads     llama.cpp checks the data of every tensor
    tokens    equal for probe texts and a rendered conversation
    logits    on the same token ids, with fp32 keys and values and no flash attention

Differences of logits are in units of their spread (standard deviation). F32 is judged by the largest difference; F16
and BF16 by the largest in dense models, and in models with experts, where rounding may choose another expert at a near
tie, by the median over positions of each position's largest; quantised files by the mean over positions of
KL(transformers || llama.cpp), in nats. The coarsest matrix of a file decides which of these applies, not its name.
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

from llama_stack_provider_moe.compute.export.end_tokens import end_ids
from llama_stack_provider_moe.compute.export.gguf_file import GgufHeader, GgufTensor, read_header
from llama_stack_provider_moe.compute.export.reference import Reference, read_reference
from llama_stack_provider_moe.errors import ExportError, shorten
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.llama_cpp import Toolchain
from llama_stack_provider_moe.llama_cpp.process import ask_llama, scratch
from llama_stack_provider_moe.spec.gguf_types import GgufType

Say = Callable[[str], None]
_MOST_TOKENS = 32


class _Class(NamedTuple):
    """The largest allowed differences; see `_CLASSES`."""

    bits: float
    relative: float | None
    median: float | None
    kl: float
    share: float


# Coarsest tensor type -> bounds: largest and median difference in spreads, mean KL in nats and as a share of the
# squared spread (which limits KL in small, nearly uniform models: for a file of another seed the share is near 1).
# The largest values measured on tiny models with spread 0.56 and on SmolLM2-135M with spread 8.0 (`benchmarks.gguf`):
#   F32   largest 1.2e-5, 4.8e-4 in a chaotic model (weights of std 0.1, width 256); median 3.5e-5; KL 4.4e-10
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
# The type that most matrices of a file type should have.
_MAIN: dict[GgufType, str] = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0",
    "q5_1": "Q5_1", "q2_k": "Q2_K", "q3_k_m": "Q3_K", "q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_s": "Q5_K",
    "q5_k_m": "Q5_K", "q6_k": "Q6_K",
}  # fmt: skip
_SILENCE_S = 600.0


class LogitsCheck(BaseModel):
    """Differences of logits over `positions`, absolute and in units of the spread; `bounds` has the limits applied."""

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
    """The result for a correct file."""

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
        """The result in words."""
        types = ", ".join(f"{name} x{count}" for name, count in self.tensor_types.items())
        lines = [
            f"{self.described}, {self.bytes:,} bytes, tensors: {types}",
            f"loaded by llama.cpp {self.llama_cpp}; {self.tokens} tokens of {self.texts} texts equal transformers'",
        ]
        if (found := self.logits) is not None:
            lines.append(
                f"logits at {found.positions} positions against transformers in {found.computed_in}: largest "
                f"difference {found.max_difference:.2g} ({found.relative_difference:.2g} of their spread), mean KL "
                f"{found.mean_kl:.2g} nats, same top token {found.same_top_token:.0%}"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"llama.cpp continues {self.prompt[-60:]!r} greedily with: {self.continuation!r}")
        return "\n".join(lines)


def verify(
    gguf: Path,
    model: Path,
    tools: Toolchain,
    reference: Reference | None = None,
    type: GgufType | None = None,
    say: Say = lambda line: None,
) -> GgufCheck:
    """Compare the file with the folder that it was made from; the file does not change, whatever the result.

    Args:
        gguf: the file.
        model: the folder.
        tools: llama.cpp.
        reference: reference of the folder, if it was read before.
        type: the type that was asked for; default: no notes about fallbacks.
        say: gets a line for each step.

    Raises:
        ExportError: the file can't be read or loaded, or differs from the model (with figures).
        ModelError: the folder can't be loaded.
    """
    header = read_header(gguf)
    reference = reference or read_reference(model, say=say)
    say(f"verifying: {gguf.name} by llama.cpp")
    size = gguf.stat().st_size
    with scratch() as folder, liveness.stage(f"verifying {gguf.name}"):
        answer = ask_llama(
            tools.library,
            {
                "do": "run", "gguf": str(gguf), "texts": reference.texts, "ids": reference.ids,
                "prompt_ids": reference.prompt_ids, "most_tokens": _MOST_TOKENS, "ends": end_ids(model),
            },
            Path(folder), _SILENCE_S,
        )  # fmt: skip
        raw = (Path(folder) / "logits.f32").read_bytes()
    logits = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(len(reference.ids), -1)
    _check_tokens(gguf, reference, answer["tokens"])
    if not bool(logits.isfinite().all()):
        raise ExportError(f"{gguf.name}: llama.cpp's logits are not finite")
    notes = [*_fallbacks(header, type), *reference.quirks, *reference.left_out]
    if [*reference.tokens_with_special] != answer["tokens_with_special"]:
        notes.append("llama.cpp and transformers add different special tokens before or after a text")
    if answer["no_ends"]:
        notes.append(
            f"llama.cpp does not stop at the model's end token(s) {', '.join(map(repr, answer['no_ends']))}; give them "
            "to the server as stop texts"
        )
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
    """Compare two sets of logits [positions, vocabulary], row by row in fp64."""
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
            f"{gguf.name}: llama.cpp tokenises {shorten(text)} differently from transformers, from token {at} on: "
            f"{other[at : at + 8]}, expected {expected[at : at + 8]}"
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
                f"{gguf.name}: llama.cpp's logits differ from the model's: {name} is {getattr(found, name):.3g}, "
                f"expected at most {bound:.3g} for a file whose coarsest matrices are {_coarsest(header)}; {found!r}"
            )
    return found.model_copy(update={"bounds": bounds})


def _bounds(header: GgufHeader, reference: Reference, spread: float) -> dict[str, float]:
    """Name of a figure -> its upper bound."""
    classes = [_CLASSES[_coarsest(header)]]
    # Rounding and known differences on the transformers side are not faults of the file.
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
    """A note, with the reason, if most matrices do not have the type that was asked for."""
    if type is None:
        return []
    weights = [each for each in _matrices(header) if each.type != "F32" or type == "f32"]
    other = [each for each in weights if each.type != _MAIN[type]]
    if len(other) * 2 <= len(weights):
        return []
    counts = ", ".join(f"{count} {name}" for name, count in Counter(each.type for each in other).most_common())
    rows = sorted({each.shape[0] for each in other if each.shape[0] % 256})
    why = f"; rows of {', '.join(map(str, rows))} numbers do not fill blocks of 256" if rows and "_k" in type else ""
    return [f"asked for {type}, but only {len(weights) - len(other)} of {len(weights)} matrices are {_MAIN[type]}: "
            f"{counts}{why}"]  # fmt: skip
