"""The file of rules: what its checker refuses, what a closed schema closes, and that no pattern takes long."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidConfig, InvalidInput
from llama_stack_provider_moe.shields.closed_schema import ClosedSchema
from llama_stack_provider_moe.shields.examples import failures
from llama_stack_provider_moe.shields.rules import open_places, read_rules
from llama_stack_provider_moe.spec.linear_patterns import matcher
from tests.support.host_harness import RUN_CONFIGS

TOOL: dict[str, Any] = {"parameters": {"properties": {"path": {"type": "string", "maxLength": 9}}}}


def written(folder: Path, content: Any) -> Path:
    path = folder / "rules.yaml"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def with_tool(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "tools": {"read": {**TOOL, **changes}}}


def with_rule(**rule: Any) -> dict[str, Any]:
    return with_tool(rules=[{"argument": "/path", **rule}])


BAD: list[tuple[Any, str]] = [
    ("version: 1\ntools: {a: {parameters: {}}\n", "a YAML file of rules"),
    ("version: 1\nversion: 1\ntools: {}\n", "line 2: key 'version' is given twice"),
    ("a: &a [1]\nb: *a\n", "alias *a"),
    ("[" * 2000, "a YAML file of rules"),
    ("- 1\n", "an object with `version` and `tools`; this is a list"),
    ("", "an object with `version` and `tools`; the file is empty"),
    ("# a comment\n", "an object with `version` and `tools`; the file is empty"),
    ({"tools": {}}, "version: is missing"),
    ({"version": 2, "tools": {}}, "version: 2 is not valid"),
    ({"version": 1, "tools": {}, "tool": 1}, "tool: unknown key"),
    ({"version": 1, "tools": {"read": {}}}, "tools.read.parameters: is missing"),
    (with_tool(principal="ann"), "tools.read.principal: unknown key"),
    (with_tool(max_calls=0), "tools.read.max_calls: 0 is not valid; expected >= 1"),
    ({"version": 1, "tools": {"réad": TOOL}}, "'réad' is not the name of a tool"),
    ({"version": 1, "tools": {"read": TOOL, "rea-d": TOOL, "Read": TOOL}}, "'Read' looks like 'read'"),
    (with_tool(parameters={"type": "array"}), "tools.read.parameters.type: 'array'"),
    (with_tool(parameters={"requried": ["path"]}), "tools.read.parameters.requried"),
    (with_tool(parameters={"properties": {"a": {"type": "txt"}}}), "tools.read.parameters.properties.a.type: 'txt'"),
    (with_tool(parameters={"properties": {"a": {"format": "zip"}}}), "one of date, date-time"),
    (with_tool(parameters={"properties": {"a": {"format": ["date"]}}}), "one of date, date-time"),
    (with_tool(parameters={"properties": {"a": {"pattern": "(a"}}}), "without look-around"),
    (with_tool(parameters={"properties": {"a": {"pattern": "(?=a)"}}}), "without look-around"),
    (with_tool(parameters={"properties": {"a": {"$ref": "http://example.org"}}}), "a reference inside this schema"),
    (with_tool(parameters={"properties": {"a": {"$ref": "#/$defs/no"}}}), "a reference to a schema that is there"),
    (with_tool(parameters={"allOf": [{"$ref": "#"}]}), "do not lead in a circle"),
    (with_tool(parameters={"patternProperties": {"a": {}}}), "a keyword of JSON Schema"),
    (with_rule(), "argument '/path' has no test"),
    (with_rule(one_of=[]), "tools.read.rules.0.one_of: [] is not valid"),
    (with_rule(none_of=[]), "tools.read.rules.0.none_of: [] is not valid"),
    (with_rule(hosts=[]), "tools.read.rules.0.hosts: [] is not valid"),
    (with_rule(matches="(a"), "without look-around"),
    (with_rule(matches="a", maches="b"), "maches: unknown key"),
    (with_rule(inside="docs"), "expected an absolute folder"),
    (with_rule(inside="/srv/../docs"), "expected an absolute folder"),
    (with_tool(rules=[{"argument": "path", "max_length": 1}]), "expected a JSON Pointer"),
    (with_tool(rules=[{"argument": "/pth", "max_length": 1}]), "an argument that `parameters` names: ['path']"),
]

# What a call may have, for rules that could never hold or never break.
PLACES = {
    "text": {"type": "string", "maxLength": 9}, "whole": {"type": "integer"}, "share": {"type": "number"},
    "on": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}, "maybe": {"type": ["string", "null"], "maxLength": 9},
    "inner": {"properties": {"key": {"type": "string", "maxLength": 9}}}, "open": {"additionalProperties": True},
    "texts": {"type": "array", "items": {"type": "string", "maxLength": 9}}, "any": {},
    "pair": {"prefixItems": [{"type": "string", "maxLength": 9}, {"type": "integer"}], "items": False},
    "either": {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "integer"}]},
}  # fmt: skip
IDLE: list[tuple[dict[str, Any], str]] = [
    ({"argument": "/inner/kee", "inside": "/srv"}, "an argument that `parameters` names: ['key']"),
    ({"argument": "/inner/key/*", "inside": "/srv"}, "argument: '/inner/key/*' is not valid"),
    ({"argument": "/texts/key", "matches": "a"}, "argument: '/texts/key' is not valid"),
    ({"argument": "/text/0", "matches": "a"}, "argument: '/text/0' is not valid"),
    ({"argument": "/pair/2", "matches": "a"}, "argument: '/pair/2' is not valid"),
    ({"argument": "/pair/1", "matches": "a"}, "rules.0.matches: 'a' is not valid"),
    ({"argument": "/text", "at_least": 3}, "rules.0.at_least: 3 is not valid"),
    ({"argument": "/whole", "matches": "3"}, "of type integer; no value could pass"),
    ({"argument": "/whole", "does_not_match": "3"}, "rules.0.does_not_match: '3' is not valid"),
    ({"argument": "/whole", "max_length": 3}, "rules.0.max_length: 3 is not valid"),
    ({"argument": "/on", "at_most": 1}, "rules.0.at_most: 1 is not valid"),
    ({"argument": "/texts", "inside": "/srv"}, "rules.0.inside: '/srv' is not valid"),
    ({"argument": "/texts/*", "at_most": 1}, "rules.0.at_most: 1 is not valid"),
    ({"argument": "/whole", "none_of": [7, "8"]}, "rules.0.none_of: '8' is not valid; expected a value that '/whole'"),
    ({"argument": "/whole", "none_of": [1.5]}, "rules.0.none_of: 1.5 is not valid"),
    ({"argument": "/on", "none_of": ["true"]}, "rules.0.none_of: 'true' is not valid"),
    ({"argument": "/on", "none_of": [1]}, "rules.0.none_of: 1 is not valid"),
    ({"argument": "/kind", "one_of": [3]}, "rules.0.one_of: 3 is not valid"),
    ({"argument": "/text", "hosts": ["https://a.org"]}, "'https://a.org' is not valid; expected a host such as"),
    ({"argument": "/text", "hosts": ["a.org:443"]}, "without scheme, port and path"),
    ({"argument": "/text", "hosts": ["a.*.org"]}, "without scheme, port and path"),
    ({"argument": "/text", "hosts": ["*"]}, "without scheme, port and path"),
]
BUSY: list[dict[str, Any]] = [
    {"argument": "/inner/key", "inside": "/srv"}, {"argument": "/inner/*", "matches": "a"},
    {"argument": "/open/x/y", "at_most": 3}, {"argument": "/any/0", "at_most": 3}, {"argument": "/any", "matches": "a"},
    {"argument": "/texts/0", "matches": "a"}, {"argument": "/texts", "max_length": 3},
    {"argument": "/pair/*", "at_most": 3},
    {"argument": "/either", "at_most": 3}, {"argument": "/either/x", "at_most": 3},
    {"argument": "/share", "none_of": [1, 1.5]}, {"argument": "/whole", "none_of": [1.0]},
    {"argument": "/maybe", "none_of": [None, "x"]}, {"argument": "/*", "matches": "a"},
    {"argument": "/text", "hosts": ["A.org", "*.b.org", "localhost", "10.0.0.1"]},
]  # fmt: skip


@pytest.mark.parametrize(("rule", "says"), IDLE, ids=lambda each: str(each)[:40])
def test_a_rule_that_never_holds_or_never_breaks_is_refused(tmp_path: Path, rule: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        read_rules(written(tmp_path, with_tool(parameters={"properties": PLACES}, rules=[rule])))
    (problem,) = refused.value.problems
    assert problem.startswith("tools.read.rules.0."), problem
    assert says in problem


@pytest.mark.parametrize("rule", BUSY, ids=str)
def test_a_rule_that_may_hold_and_may_break_is_taken(tmp_path: Path, rule: dict[str, Any]) -> None:
    read_rules(written(tmp_path, with_tool(parameters={"properties": PLACES}, rules=[rule])))


@pytest.mark.parametrize(("content", "says"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_wrong_file_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_rules(written(tmp_path, content))
    assert says in str(refused.value), str(refused.value)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    content = {"version": 3, "tools": {"a": {}}, "max_calls": 999}
    with pytest.raises(InvalidConfig) as refused:
        read_rules(written(tmp_path, content))
    assert len(refused.value.problems) == 3


def test_rules_and_schemas_of_all_tools_are_named_at_once(tmp_path: Path) -> None:
    schema = {"foo": 1, "properties": {"path": {"type": "strin", "maxLength": -3, "format": "zip", "pattern": "(a"}}}
    rules = [{"argument": "/nope", "one_of": []}, {"argument": "/path", "at_least": 3, "at_most": 1}]
    content = {"version": 1, "tool": 1, "tools": {
        "read": {"parameters": schema, "rules": rules, "max_calls": 0},
        "mail": {"parameters": {"requried": ["a"], "properties": []}},
        "Read": {},
        "búy": {"parameters": {}},
    }}  # fmt: skip
    with pytest.raises(InvalidConfig) as refused:
        read_rules(written(tmp_path, content))
    told = refused.value.problems
    for says in (
        "tool: unknown key", "tools.read.parameters.foo: ", "tools.read.parameters.properties.path.type: 'strin'",
        "tools.read.parameters.properties.path.maxLength: -3", "tools.read.parameters.properties.path.format: 'zip'",
        "tools.read.parameters.properties.path.pattern: '(a'", "tools.read.max_calls: 0",
        "tools.read.rules.0.argument: '/nope'", "tools.read.rules.0.one_of: ", "tools.read.rules.1: at_least: 3.0",
        "tools.mail.parameters.requried: ", "tools.mail.parameters.properties: ", "tools.Read.parameters: is missing",
        "tools: 'Read' looks like 'read'", "tools: 'búy' is not the name of a tool",
    ):  # fmt: skip
        assert len([each for each in told if each.startswith(says)]) == 1, (says, told)
    assert len(told) == 15, told


def test_a_checker_names_more_than_a_few_problems(tmp_path: Path) -> None:
    content = with_tool(rules=[{"argument": "/path"}] * 30)
    with pytest.raises(InvalidConfig) as refused:
        read_rules(written(tmp_path, content))
    assert len(refused.value.problems) == 30


OPEN: list[dict[str, Any]] = [
    {"properties": {"a": {}}, "required": ["a", "b"], "additionalProperties": True},
    {"allOf": [{"properties": {"a": {}, "b": {}}}], "required": ["b"]},
    {"properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"properties": {"a": {"minimum": 1, "maximum": 1}, "b": {}}},
]
CLOSED: list[tuple[dict[str, Any], str]] = [
    ({"properties": {"path": {}}, "required": ["path", "pth"]}, "schema.required: 'pth'"),
    ({"required": ["pth"]}, "schema.required: 'pth'"),
    ({"properties": {"a": {"properties": {}, "required": ["b"]}}}, "schema.properties.a.required: 'b'"),
    ({"required": ["b"], "additionalProperties": False, "allOf": [{"properties": {"b": {}}}]}, "schema.required: 'b'"),
    ({"properties": {"a": {"minLength": 3, "maxLength": 2}}}, "schema.properties.a.minLength: 3"),
    ({"properties": {"a": {"minimum": 3, "maximum": 2}}}, "schema.properties.a.minimum: 3"),
    ({"properties": {"a": {"enum": []}}}, "schema.properties.a.enum: []"),
]


@pytest.mark.parametrize(("schema", "says"), CLOSED)
def test_a_schema_that_no_call_can_pass_is_refused(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        ClosedSchema(schema, "schema")
    assert says in str(refused.value)


@pytest.mark.parametrize("schema", OPEN)
def test_a_schema_that_a_call_can_pass_is_not(schema: dict[str, Any]) -> None:
    assert list(ClosedSchema(schema, "schema").mismatches({"a": 1, "b": 2})) == []


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        read_rules(tmp_path / "no.yaml")
    with pytest.raises(InvalidInput, match="a folder, not a regular file"):
        read_rules(tmp_path)


def test_our_own_rules_hold_and_limit_every_text() -> None:
    rules = read_rules(RUN_CONFIGS / "shields" / "tools.yaml")
    assert len(rules.examples) == 10
    assert failures(rules) == []
    assert open_places(rules) == []


def test_an_example_that_fails_is_told(tmp_path: Path) -> None:
    content = with_rule(inside="/srv")
    content["examples"] = [
        {"tool": "read", "arguments": {"path": "/srv/a"}, "verdict": "refused"},
        {"tool": "read", "arguments": '{"path": "/x"}', "principal": "ann", "verdict": "allowed"},
        {"tool": "read", "arguments": {"path": "/srv/a"}, "verdict": "allowed"},
    ]
    assert failures(read_rules(written(tmp_path, content))) == [
        "examples.0: read for anonymous is allowed; expected refused",
        "examples.1: read for ann is refused by tools.read.rules.0.inside; expected allowed",
    ]


def test_texts_without_a_limit_are_found(tmp_path: Path) -> None:
    properties = {"a": {"type": "string"}, "b": {"enum": ["x"]}, "c": {"type": "integer"}, "d": True, "e": {}}
    content = with_tool(parameters={"properties": properties}, rules=[{"argument": "/e", "max_length": 3}])
    assert [each.argument for each in open_places(read_rules(written(tmp_path, content)))] == ["a", "d"]


def test_a_schema_full_of_unknown_keywords_is_refused_at_once() -> None:
    with pytest.raises(InvalidInput) as refused:
        ClosedSchema({f"keyword{number}": 1 for number in range(20_000)}, "schema")
    assert str(refused.value).count("there is none of this name") <= 100


def test_arguments_that_double_the_work_are_too_large(tmp_path: Path) -> None:
    inner = {"allOf": [{"properties": {"x": {"$ref": "#/$defs/a"}}}] * 2}
    tool = with_tool(parameters={"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": inner}}, rules=[])
    arguments: dict[str, Any] = {}
    for _ in range(25):
        arguments = {"x": arguments}
    tool["examples"] = [{"tool": "read", "arguments": arguments, "verdict": "allowed"}]
    assert failures(read_rules(written(tmp_path, tool))) == [
        "examples.0: read for anonymous is refused by too_large; expected allowed"
    ]


def pointers(schema: dict[str, Any], arguments: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(each) for each in ClosedSchema(schema, "schema").mismatches(arguments)]


def test_a_schema_is_closed_at_every_depth() -> None:
    inner = {"properties": {"b": {"type": "integer"}}}
    extra = [("/a", "unevaluatedProperties")]
    assert pointers({"properties": {"a": inner}}, {"a": {"b": 1, "c": 2}}) == extra
    assert pointers({"properties": {"a": {"type": "array", "items": inner}}}, {"a": [{"b": 1, "c": 2}]}) == [
        ("/a/0", "unevaluatedProperties")
    ]
    assert pointers({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": inner}}, {"a": {"c": 2}}) == extra
    both = {"allOf": [inner, {"properties": {"c": {}}}]}
    assert pointers({"properties": {"a": both}}, {"a": {"b": 1, "c": 2}}) == [], "the parts see each other"
    assert pointers({"properties": {"a": both}}, {"a": {"b": 1, "c": 2, "d": 3}}) == extra
    assert pointers({"properties": {"a": {}}}, {"a": {"b": 1}}) == extra, "{} takes any value but unnamed keys"


def test_a_schema_that_says_so_stays_open() -> None:
    assert pointers({"additionalProperties": True}, {"a": {"b": 1}}) == []
    assert pointers({"additionalProperties": {"type": "integer"}}, {"a": 1, "b": 2}) == []
    assert pointers({"additionalProperties": {"type": "integer"}}, {"a": "x"}) == [("/a", "type")]


def test_a_schema_that_holds_itself_ends() -> None:
    tree = {"properties": {"child": {"$ref": "#"}, "name": {"type": "string"}}}
    assert pointers(tree, {"child": {"child": {"name": "a"}}}) == []
    assert pointers(tree, {"child": {"child": {"name": 1}}}) == [("/child/child/name", "type")]


def test_no_pattern_takes_long() -> None:
    """With Python's engine the first takes years, and the second minutes."""
    began = time.process_time()
    for pattern, text in ((r"(a+)+$", "a" * 100_000 + "!"), (r".*.*.*.*=", "a" * 100_000), (r"(a|a)*b", "a" * 100_000)):
        assert not matcher(pattern, "pattern", whole=True)(text)
    assert time.process_time() - began < 5


def test_a_pattern_of_the_whole_text_is_anchored() -> None:
    whole = matcher("a|b", "pattern", whole=True)
    assert [whole(text) for text in ("a", "b", "ab", "xa", "b\n", "")] == [True, True, False, False, False, False]
    part = matcher("a|b", "pattern")
    assert [part(text) for text in ("xa", "b\n", "c")] == [True, True, False]
