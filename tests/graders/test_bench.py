"""Processes that grade: right values, and an end in bounded time and memory for whatever is hostile, by name."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.graders import bounded
from llama_stack_provider_moe.graders.bench import Bench, Limits, Task
from llama_stack_provider_moe.graders.samples import Failure


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench(Limits(deadline_s=5.0, memory_mb=512, processes=2, retries=0))
    yield made
    made.close()


def task(name: str, **given: Any) -> Task:
    return {"do": name, "with": given}


def math(text: str, reference: str) -> Task:
    return task("math", text=text, reference=reference, precision=6, limit_s=1.0)


def schema(of: dict[str, Any], text: str, closed: bool = False) -> Task:
    return task("json_schema", schema=json.dumps(of), closed=closed, text=text)


def similar(metric: str, text: str, reference: str) -> Task:
    return task("similarity", metric=metric, text=text, reference=reference)


NUMBERS = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("asked", "value"),
    [
        (task("regex", pattern=r"\d{3}", whole=False, text="a 123"), 1.0),
        (task("regex", pattern=r"\d{3}", whole=True, text="a 123"), 0.0),
        (schema(NUMBERS, '{"n": 1, "m": 2}'), 1.0),
        (schema(NUMBERS, '{"n": 1, "m": 2}', closed=True), 0.0),
        (schema(NUMBERS, '{"n": 1, "n": 2}'), 0.0),
        (schema(NUMBERS, "n is 1"), 0.0),
        (schema({}, "[1]"), 1.0),
        (schema({}, "NaN"), 0.0),
        (similar("fuzzy_match", "abcd", "abcx"), 0.75),
        (similar("rouge_1", "the cat sat", "the cat ran off"), 4 / 7),
        (similar("rouge_2", "the cat sat", "the cat ran off"), 2 / 5),
        (similar("rouge_5", "a b c d e", "a b c d e"), 1.0),
        (similar("rouge_l", "a b c d", "a c e d"), 0.75),
        (similar("rouge_l", "", "a"), 0.0),
        (similar("rouge_1", "猫が好き", "猫が嫌い"), 0.5),
        (similar("bleu", "a b c d e", "a b c d e"), 1.0),
        (similar("gleu", "a b c d", "a b c d"), 1.0),
        (similar("gleu", "a b", "a c"), 1 / 3),
        (math(r"So the answer is $\frac{1}{2}$.", "0.5"), 1.0),
        (math("It is 42", "42"), 1.0),
        (math("It is 43", "42"), 0.0),
        (math("", "42"), 0.0),
        (math(r"$x = 2\sqrt{2}$", r"\sqrt{8}"), 1.0),
        (math("0", "x^2+1=0"), 0.0),
        (math("$x^2 + 1 = 0$", "x^2+1=0"), 1.0),
        (math("It is 2", "2 + 2i"), 0.0),
        (math("$2 + 2i$", "2 + 2i"), 1.0),
        (math("It is 3", "x = 3"), 1.0),
        (math("It is 0.5", "It is 1/2"), 1.0),
    ],
)
def test_values_by_hand(bench: Bench, asked: Task, value: float) -> None:
    (found,) = bench.run([asked])
    assert not isinstance(found, Failure), found
    assert found == pytest.approx(value, abs=1e-6)


HOSTILE = {
    "backtracking": task("regex", pattern="(a|a)*(a|aa)+$", whole=True, text="a" * 1_000_000 + "b"),
    "counted": task("regex", pattern="(?:a{0,40}){0,40}b", whole=False, text="a" * 1_000_000),
    "unique items": schema({"items": {"uniqueItems": True}}, json.dumps([[{"a": [n]} for n in range(20_000)]])),
    "deep json": schema({"items": {"$ref": "#"}}, "[" * 100_000 + "]" * 100_000),
    "deep valid json": schema({"items": {"$ref": "#"}}, "[" * 900 + "]" * 900),
    "branches": schema(
        {"$defs": {"t": {"anyOf": [{"items": {"$ref": "#/$defs/t"}, "minItems": 1}] * 2 + [{"const": 0}]}},
         "$ref": "#/$defs/t"},
        "[" * 60 + "1" + "]" * 60,
    ),
    "a megabyte of words": similar("rouge_l", "a b " * 250_000, "b a " * 250_000),
    "a megabyte of letters": similar("fuzzy_match", "ab" * 500_000, "ba" * 500_000),
    "a megabyte to gleu": similar("gleu", "a b " * 250_000, "b a " * 250_000),
    "a tower": math("$9^{9^{9^{9}}}$", "1"),
    "a factorial": math("$100000000!$", "1"),
    "a megabyte of mathematics": math("$" + "(" * 500_000 + "1" + ")" * 500_000 + "$", "1"),
    "a long sum": math("$" + "+".join(["x"] * 100_000) + "$", "x"),
    "a product": math(r"$\prod_{k=1}^{100000000} k$", "1"),
    "an integral": math(r"$\int_0^1 \sin(\sin(\sin(x^x))) dx$", r"\int_0^1 e^{x^{x^x}} dx"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_ends_in_time_and_has_a_name(bench: Bench, name: str) -> None:
    bench.run([task("regex", pattern="a", whole=False, text="a")] * 2)  # its processes have started
    began = time.monotonic()
    (found,) = bench.run([HOSTILE[name]])
    assert time.monotonic() - began < 60, "5 s of its own, and whatever else this machine does"
    if isinstance(found, Failure):
        assert found.code in ("deadline", "memory", "ended", "raised", "bad_reference"), found
        assert found.message
    else:
        assert 0 <= found <= 1
    assert bench.run([task("regex", pattern="a", whole=False, text="a")]) == [1.0], "the next one is graded"


def test_a_process_that_needs_too_much_memory_is_named() -> None:
    bench = Bench(Limits(deadline_s=60.0, memory_mb=256, processes=1, retries=0))
    numbers = " ".join(map(str, range(1_000_000)))
    try:
        (found,) = bench.run([similar("gleu", numbers, numbers[::-1])])
        assert isinstance(found, Failure)
        assert found.code == "memory"
    finally:
        bench.close()


def test_a_task_that_is_too_large_is_not_sent(bench: Bench) -> None:
    (found,) = bench.run([task("regex", pattern="a", whole=False, text="a" * 20_000_000)])
    assert isinstance(found, Failure)
    assert found.code == "too_large"


NO_RESULTS = ["", "null", "None", "not math at all", "hello", "?", "{}", "-", "$?$", "true", "No solution", "x is good"]


@pytest.mark.parametrize("reference", NO_RESULTS)
def test_a_reference_that_is_no_result_is_named(bench: Bench, reference: str) -> None:
    (found,) = bench.run([math("1", reference)])
    assert isinstance(found, Failure)
    assert found.code == "bad_reference"


@pytest.mark.parametrize(
    "reference", ["x+1", "(1,2)", "{1,2}", r"\pi", "ab", "sqrt(2)", r"\text{none}", "A", r"\infty", r"\sin x"]
)
def test_a_reference_without_signs_of_latex_is_read(bench: Bench, reference: str) -> None:
    assert bench.run([math(f"It is ${reference}$.", reference)]) == [1.0]


def test_a_remote_reference_is_refused_and_nothing_is_fetched() -> None:
    for ref in ("https://example.org/schema.json", "file:///etc/passwd", "other.json#/x"):
        with pytest.raises(ValueError, match="a reference inside this schema"):
            bounded.checked_schema({"$ref": ref}, False, "json_schema")
    with pytest.raises(ValueError, match="keyword of JSON Schema"):
        bounded.checked_schema({"$dynamicRef": "https://example.org"}, False, "json_schema")
    with pytest.raises(ValueError, match="circle"):
        bounded.checked_schema({"$ref": "#"}, False, "json_schema")


def doubling(levels: int) -> dict[str, Any]:
    defs: dict[str, Any] = {f"a{at}": {"allOf": [{"$ref": f"#/$defs/a{at + 1}"}] * 2} for at in range(levels)}
    return {"$ref": "#/$defs/a0", "$defs": {**defs, f"a{levels}": {"type": "object"}}}


def test_definitions_that_double_are_refused_at_once() -> None:
    began = time.monotonic()
    for levels in (18, 40):
        with pytest.raises(ValueError, match=r"at most 10,000 schemas to try at one value"):
            bounded.checked_schema(doubling(levels), False, "json_schema")
    assert time.monotonic() - began < 5
    assert bounded.checked_schema(doubling(6), False, "json_schema").mismatches({}) == []


def test_a_line_of_definitions_that_look_at_keys_doubles_too() -> None:
    defs: dict[str, Any] = {
        f"a{at}": {"allOf": [{"$ref": f"#/$defs/a{at + 1}"}], "unevaluatedProperties": False} for at in range(40)
    }
    with pytest.raises(ValueError, match="at most 10,000 schemas"):
        bounded.checked_schema({"$ref": "#/$defs/a0", "$defs": {**defs, "a40": {}}}, False, "json_schema")


def test_a_long_line_of_references_is_refused_by_name() -> None:
    for levels in (150, 900):
        defs: dict[str, Any] = {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(levels)}
        with pytest.raises(ValueError, match="at most 100 schemas inside one another"):
            bounded.checked_schema({"$ref": "#/$defs/a0", "$defs": {**defs, f"a{levels}": {}}}, False, "json_schema")


@pytest.mark.parametrize("ref", ["#/default", "#/allOf", "#/$defs", "#name", "#/$defs/b"])
def test_a_reference_leads_to_a_checked_schema(ref: str) -> None:
    of = {"allOf": [{"$ref": ref}], "default": {"patternProperties": {"(a+)+$": {}}}, "$defs": {"a": {}}}
    with pytest.raises(ValueError, match=r"a reference (to a schema that is there|inside this schema)"):
        bounded.checked_schema(of, False, "json_schema")


def test_a_value_that_doubles_the_work_ends_by_name(bench: Bench) -> None:
    nested = '{"x": ' * 40 + "1" + "}" * 40
    (found,) = bench.run([schema({"allOf": [{"properties": {"x": {"$ref": "#"}}}] * 2}, nested)])
    assert isinstance(found, Failure)
    assert found.code == "deadline"


def test_many_threads_share_a_few_processes(bench: Bench) -> None:
    found: list[float | Failure] = []
    threads = [
        threading.Thread(target=lambda: found.extend(bench.run([similar("fuzzy_match", "ab", "ab")] * 20)))
        for _ in range(8)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [1.0] * 160


def test_what_hangs_is_retried_and_does_not_hold_the_others() -> None:
    bench = Bench(Limits(deadline_s=1.0, memory_mb=512, processes=1, retries=1))
    try:
        hangs = math("$9^{9^{9^{9}}}$ or " + "$100000000!$", "100000000!")
        found = bench.run([similar("fuzzy_match", "a", "a"), hangs, similar("fuzzy_match", "a", "a")])
        assert found[0] == found[2] == 1.0
    finally:
        bench.close()


def test_a_closed_bench_leaves_no_process_behind() -> None:
    bench = Bench(Limits(processes=2))
    before = children()
    bench.run([task("regex", pattern="a", whole=False, text="a")] * 4)
    assert children() > before
    bench.close()
    assert children() == before
    (found,) = bench.run([task("regex", pattern="a", whole=False, text="a")])
    assert isinstance(found, Failure)


def children() -> int:
    return len(Path("/proc/self/task").joinpath(str(threading.get_native_id()), "children").read_text().split()) + sum(
        len(Path(f"/proc/self/task/{each.native_id}/children").read_text().split())
        for each in threading.enumerate()
        if each.native_id not in (None, threading.get_native_id())
        and Path(f"/proc/self/task/{each.native_id}/children").exists()
    )
