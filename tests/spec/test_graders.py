"""What a grader's spec refuses, and with which words; formulas and templates that are hostile."""

import math
import random
import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from llama_stack_provider_moe.errors import InvalidBody
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.formulas import Formula
from llama_stack_provider_moe.spec.grader_templates import Reference, parts_of
from llama_stack_provider_moe.spec.graders import GRADER, GRADER_TYPES, Grader
from llama_stack_provider_moe.spec.rewards import REWARDS, Rewards
from llama_stack_provider_moe.spec.validation_errors import validated

CHECK = {"type": "string_check", "name": "same", "reference": "{{item.answer}}", "operation": "eq"}


class Body(Block):
    """A body with rewards."""

    grader: Grader | None = None
    reward: Rewards | None = None


def refused(**body: Any) -> str:
    with pytest.raises(InvalidBody) as caught:
        validated(Body, body)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"operation": "near"}, "grader.operation: 'near' is not valid; expected 'eq', 'ne', 'like' or 'ilike'"),
        ({"colour": "red"}, "grader.colour: unknown key"),
        ({"name": "../x"}, "grader.name: '../x' is not valid; expected 1 to 64 letters, digits, spaces and . _ -"),
        ({"reference": "{{itm.a}}"}, "{{itm.a}} is not valid; expected {{item.NAME}} or {{sample.NAME}}"),
        ({"reference": "{{sample.text}}"}, "expected one of sample.output_text, sample.output_json"),
        ({"reference": "{{item.a"}, "has braces that do not close"),
        ({"type": "python", "source": "import os"}, "'python' is not valid, because this server runs no code of users"),
        ({"type": "pythn"}, "grader: {'type': 'pythn'"),
    ],
)
def test_a_bad_grader_is_refused_by_field_value_and_range(change: dict[str, Any], told: str) -> None:
    assert told in refused(grader={**CHECK, **change})


@pytest.mark.parametrize(("metric", "why"), [("cosine", "needs a model of embeddings"), ("meteor", "needs WordNet")])
def test_a_metric_that_is_not_here_is_refused_by_name(metric: str, why: str) -> None:
    grader = {"type": "text_similarity", "name": "s", "reference": "x", "evaluation_metric": metric}
    assert f"grader.evaluation_metric: {metric!r} {why}" in refused(grader=grader)


def test_a_pattern_that_could_backtrack_is_refused() -> None:
    grader = {"type": "regex", "name": "r", "pattern": r"(a+)+\1"}
    assert "a pattern without look-around and back-references" in refused(grader=grader)


def test_a_multi_takes_a_map_and_every_grader_has_an_effect() -> None:
    body: dict[str, Any] = {"type": "multi", "name": "m", "graders": {"a": CHECK, "b": CHECK},
                            "calculate_output": "0.5 * a + min(b, 1)"}  # fmt: skip
    made = validated(Body, {"grader": body}).grader
    assert made is not None
    assert made.limits() == (0.0, 1.5)
    assert "graders.b: has no effect" in refused(grader={**body, "calculate_output": "a"})
    assert "there is no grader 'c'; expected a, b" in refused(grader={**body, "calculate_output": "a + b + c"})
    inner = {**body, "graders": {"a": {"type": "multi", "name": "x"}, "b": CHECK}}
    assert "multi" in refused(grader=inner), "a multi holds no multi"
    told = refused(grader={**body, "graders": {"a": {**CHECK, "operation": 1}, "b": CHECK}})
    assert told.startswith("grader.graders.a.operation: 1 is not valid"), "pydantic's tags are in no path"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (" + ".join(["a"] * 10_000), "a formula of 39,997 characters; expected at most 2,000"),
        ("+".join(["a"] * 999), "more than 400 terms or 24 levels"),
        ("-" * 1_999 + "a", "is not a formula|more than 400 terms"),
        ("(" * 999 + "a" + ")" * 999, "is not a formula"),
        ("2 ** 9 ** 9", r"is not valid in a formula"),
        ("a // 2", "is not valid in a formula"),
        ("a.b", "is not valid in a formula"),
        ("__import__('os')", "is not valid in a formula"),
        ("print(a)", "is not valid in a formula"),
        ("a if b else c", "is not valid in a formula"),
        ("[a for a in b]", "is not valid in a formula"),
        ("1e999", "too large"),
        ("1if", "is not valid in a formula"),
        ("abs(1, 2)", "abs of 2 values; expected 1 to 1"),
        ("", "is not a formula"),
        ("a b", "is not a formula"),
        ("True", "is not valid in a formula"),
    ],
)
def test_a_formula_is_never_code(text: str, told: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=told):
        Formula(text)
    assert time.process_time() - began < 2


def test_a_formula_by_hand() -> None:
    formula = Formula("0.25 * a + 0.75 * max(b, floor(1.9)) - -sqrt(abs(-4)) / exp(0) + log(1) + ceil(0.2)")
    assert formula.names == {"a", "b"}
    assert formula.value({"a": 0.4, "b": 0.5}) == pytest.approx(0.1 + 0.75 + 2 + 1)


@pytest.mark.parametrize("text", ["1 / a", "log(a)", "sqrt(a - 1)", "exp(1000 + a)", "1e299 * 1e299 + a"])
def test_a_formula_without_a_value_says_so(text: str) -> None:
    with pytest.raises(ArithmeticError):
        Formula(text).value({"a": 0.0})


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("0.5 * a + 0.5 * b", 0, 1),
        ("a - b", -1, 1),
        ("-2 * c", -8, 4),
        ("c * c", -8, 16),
        ("min(a, c, 3)", -2, 1),
        ("max(a, c)", 0, 4),
        ("abs(c)", 0, 4),
        ("abs(c - 9)", 5, 11),
        ("floor(c / 3) + ceil(a)", -1, 2),
        ("a / (b + 1)", 0, 1),
        ("sqrt(c)", 0, 2),
        ("log(a)", -math.inf, 0),
        ("exp(c)", math.exp(-2), math.exp(4)),
        ("exp(1000 * a)", 1, math.inf),
        ("a / b", -math.inf, math.inf),
        ("log(-1 - a)", -math.inf, math.inf),
        ("a + any", -math.inf, math.inf),
        ("0 * any", 0, 0),
        ("max(0, any)", 0, math.inf),
        ("9e299 * 9e299 - 9e299 * 9e299", -math.inf, math.inf),
    ],
)
def test_a_formulas_range_by_hand(text: str, low: float, high: float) -> None:
    formula = Formula(text)
    found = formula.range({"a": (0, 1), "b": (0, 1), "c": (-2, 4), "any": (-math.inf, math.inf)})
    assert found == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))


def test_no_value_of_a_formula_is_outside_its_range() -> None:
    """Random formulas of all operations, at corners and inside."""
    order = random.Random(7)

    def text(depth: int) -> str:
        if depth == 0:
            return order.choice(["a", "b", f"{order.uniform(0, 3):.2f}"])
        one, other = text(depth - 1), text(depth - 1)
        sign = order.choice("+-*/")
        return order.choice([f"({one} {sign} {other})", f"-{one}", f"{order.choice(('min', 'max'))}({one}, {other})",
                             f"{order.choice(('abs', 'floor', 'ceil', 'exp', 'log', 'sqrt'))}({one})"])  # fmt: skip

    ranges, bounded = {"a": (-1.5, 2.0), "b": (0.25, 1.0)}, 0
    for _ in range(400):
        formula = Formula(text(4))
        low, high = formula.range(ranges)
        bounded += math.isfinite(low) and math.isfinite(high)
        for _ in range(20):
            scores = {name: order.choice([*ends, order.uniform(*ends)]) for name, ends in ranges.items()}
            try:
                value = formula.value(scores)
            except ArithmeticError:
                continue
            assert low <= value <= high
    assert bounded > 100


def test_templates_are_texts_and_paths() -> None:
    assert parts_of("a {{ item.x.0 }}{{sample.output_json.y}}!") == (
        "a ", Reference("item", ("x", "0")), Reference("sample", ("output_json", "y")), "!",
    )  # fmt: skip
    for hostile in ("{{" * 5_000, "{{item" + ".a" * 500 + "}}", "{{item.__class__()}}", "{{item.a}}" * 100):
        with pytest.raises(ValueError, match="expected"):
            parts_of(hostile)


def test_rewards_are_named_once_and_for_both_classes() -> None:
    reward = {"grader": CHECK}
    assert "'same' is named twice" in refused(reward=[reward, reward])
    assert "weight: 0 has no effect" in refused(reward=[{**reward, "weight": 0}])
    assert "all for 'refuse'; expected also one for 'help', else the model learns to refuse everything" in refused(
        reward=[{**reward, "prompts": "refuse"}]
    )
    other = {"grader": {**CHECK, "name": "other"}, "prompts": "help"}
    assert len(REWARDS.validate_python([{**reward, "prompts": "refuse"}, other])) == 2


def test_every_type_is_in_the_table() -> None:
    with pytest.raises(ValidationError) as caught:
        GRADER.validate_python({"type": "no"})
    (error,) = caught.value.errors()
    assert set(error["ctx"]["expected_tags"].replace("'", "").split(", ")) == GRADER_TYPES


def test_openais_own_graders_are_valid() -> None:
    openai = pytest.importorskip("openai.types.graders")
    pairs = {
        "StringCheckGrader": CHECK | {"input": "{{sample.output_text}}"},
        "TextSimilarityGrader": {"type": "text_similarity", "name": "s", "input": "a", "reference": "b",
                                 "evaluation_metric": "rouge_l"},
        "ScoreModelGrader": {"type": "score_model", "name": "j", "model": "judge", "range": [1, 7],
                             "input": [{"role": "user", "content": "{{sample.output_text}}", "type": "message"}],
                             "sampling_params": {"temperature": 0, "max_completions_tokens": 9}},
        "LabelModelGrader": {"type": "label_model", "name": "l", "model": "judge", "labels": ["good", "bad"],
                             "passing_labels": ["good"], "input": [{"role": "user", "content": "x"}]},
    }  # fmt: skip
    for name, body in pairs.items():
        theirs = TypeAdapter(getattr(openai, name)).validate_python(body).model_dump(exclude_none=True)
        GRADER.validate_python(theirs)
