"""The work of a process that grades: what may take long, or much memory, for the wrong text.

Only `child` runs it, so that a deadline and a limit of memory hold. Each function takes and returns what JSON has.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from llama_stack_provider_moe.graders.samples import BadAnswer, as_json
from llama_stack_provider_moe.shields.closed_schema import CheckedSchema
from llama_stack_provider_moe.spec.linear_patterns import matcher

_SIGN = re.compile(r"[^\W_]|[\\∞∅]")  # something of a result: a letter, a digit or a command
_FUNCTIONS = {
    "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "log",
    "exp", "min", "max", "gcd", "lcm", "mod", "abs", "det", "dim", "lim", "frac", "infty", "inf",
}  # fmt: skip
# A sign of a formula that math-verify passes over outside LaTeX: it would read a number beside it as the result.
_OPERATOR = re.compile(r"[=<>≤≥≠^+*/]|\\(?:le|ge|ne|lt|gt|leq|geq|neq)\b|[\w)\]}]\s*-\s*[\w(\\]")
_PROSE = re.compile(r"(?:^|\s)[^\W\d_]{2,}\s+\w")  # a word before another one
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class BadReference(ValueError):
    """The right result of a row can't be read."""


def regex(pattern: str, whole: bool, text: str) -> float:
    """Whether a pattern matches."""
    return float(matcher(pattern, "pattern", whole)(text))


def json_schema(schema: str, closed: bool, text: str) -> float:
    """Whether a text is JSON that a schema (as JSON text) describes."""
    try:
        value = as_json(text)
    except BadAnswer:
        return 0.0
    try:
        return float(not _schema(schema, closed).mismatches(value, 1))
    except RecursionError:
        return 0.0  # nested deeper than the schema can be followed


def checked_schema(schema: Mapping[str, object], closed: bool, field: str) -> CheckedSchema:
    """Return a schema that is ready.

    Raises:
        InvalidInput: it is not valid, or has what is not supported, such as a reference to another document.
    """
    if schema.get("$schema") in (DIALECT, f"{DIALECT}#"):
        schema = {key: value for key, value in schema.items() if key != "$schema"}
    return CheckedSchema(schema, field, closed)


@lru_cache(maxsize=32)
def _schema(schema: str, closed: bool) -> CheckedSchema:
    return checked_schema(json.loads(schema), closed, "json_schema")


def similarity(metric: str, text: str, reference: str) -> float:
    """How similar two texts are, from 0 to 1."""
    if metric == "fuzzy_match":
        from rapidfuzz import fuzz

        return fuzz.ratio(text, reference) / 100
    one, other = _words(text), _words(reference)
    if not one or not other:
        return float(one == other)
    if metric == "rouge_l":
        from rapidfuzz.distance import LCSseq

        return _f1(LCSseq.similarity(one, other), len(one), len(other))
    if metric.startswith("rouge_"):
        size = int(metric.removeprefix("rouge_"))
        mine, theirs = _ngrams(one, size), _ngrams(other, size)
        return _f1((mine & theirs).total(), mine.total(), theirs.total())
    if metric == "bleu":
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

        return float(sentence_bleu([other], one, smoothing_function=SmoothingFunction().method1))
    from nltk.translate.gleu_score import sentence_gleu

    return float(sentence_gleu([other], one))


def math(reference: str, text: str, precision: int, limit_s: float) -> float:
    """Whether the last result in a text equals a reference, by math-verify."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    seconds = max(1, int(limit_s))
    kinds = [LatexExtractionConfig(), ExprExtractionConfig()]
    readings = [reference] if _SIGN.search(reference) else []
    if _is_bare_result(reference):
        readings.insert(0 if _is_bare_formula(reference) else 1, f"${reference}$")
    right: list[object] = []
    for reading in readings:
        right = parse(reading, kinds, parsing_timeout=seconds)
        if any(not isinstance(each, str) for each in right):
            break
        right = []  # only math-verify's copy of the text: it read nothing
    if not right:
        raise BadReference(f"{reference[:80]!r} is no result that math-verify can read")
    return float(verify(right, parse(text, kinds, parsing_timeout=seconds), precision, timeout_seconds=seconds))


def _is_bare_result(reference: str) -> bool:
    """Whether a text may be a formula without `$`: as one, math-verify reads any word as a product of its letters."""
    without_commands = re.sub(r"\\(text|mathrm|mathbf|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", reference)
    words = re.findall(r"[^\W\d_]{3,}", without_commands)
    return bool(_SIGN.search(reference)) and all(word.lower() in _FUNCTIONS for word in words)


def _is_bare_formula(reference: str) -> bool:
    """Whether a text that may be a formula has more than a number: `x^2 + 1 = 0` is not 0, nor `2 + 2i` 2."""
    return "$" not in reference and bool(_OPERATOR.search(reference)) and not _PROSE.search(reference)


def _words(text: str) -> list[str]:
    """Words in small letters; a sign of a script without spaces is a word."""
    found: list[str] = []
    word: list[str] = []
    for each in text.lower():
        is_sign = "\u3040" <= each <= "\u9fff"
        if each.isalnum() and not is_sign:
            word.append(each)
            continue
        if word:
            found.append("".join(word))
            word = []
        if is_sign:
            found.append(each)
    return [*found, "".join(word)] if word else found


def _ngrams(words: list[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[at:] for at in range(size)), strict=False))


def _f1(shared: int, one: int, other: int) -> float:
    return 2 * shared / (one + other) if shared else 0.0


TASKS: dict[str, Callable[..., float]] = {
    "regex": regex, "json_schema": json_schema, "similarity": similarity, "math": math
}  # fmt: skip


def run(task: Mapping[str, Any]) -> float:
    """Run one task, `{"do": name, "with": {...}}`."""
    return TASKS[task["do"]](**task["with"])
