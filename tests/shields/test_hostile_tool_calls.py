"""Sixty and more tool calls of a hostile model, each with the rule that refuses it, or None where it is allowed."""

import json
from typing import Any

import pytest

from llama_stack_provider_moe.shields.messages import canonical
from llama_stack_provider_moe.shields.rules import ToolRulesFile
from llama_stack_provider_moe.shields.tool_guard import ToolGuard

STRING = {"type": "string", "maxLength": 200}
RULES = ToolRulesFile.model_validate(
    {
        "version": 1,
        "max_calls": 4,
        "tools": {
            "read_file": {
                "parameters": {"type": "object", "properties": {"path": STRING}, "required": ["path"]},
                "rules": [{"argument": "/path", "inside": "/srv/docs"}],
            },
            "fetch": {
                "parameters": {"properties": {"url": STRING}, "required": ["url"]},
                "rules": [{"argument": "/url", "hosts": ["docs.example.org", "*.wiki.example.org"]}],
            },
            "mail": {
                "max_calls": 1,
                "principals": ["anonymous", "staff-*"],
                "parameters": {
                    "properties": {
                        "to": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
                        "text": {"type": "string"},
                    },
                    "required": ["to"],
                },
                "rules": [
                    {"argument": "/to/*", "matches": r"[a-z]+@example\.org"},
                    {"argument": "/text", "does_not_match": "(?i)password"},
                ],
            },
            "set": {
                "parameters": {
                    "properties": {
                        "level": {"type": "integer", "minimum": 0, "maximum": 10},
                        "on": {"type": "boolean"},
                        "options": {"properties": {"deep": {"properties": {"name": STRING}}}},
                        "mode": {"enum": ["slow", "fast"]},
                        "day": {"type": "string", "format": "date"},
                    }
                },
                "rules": [{"argument": "/level", "at_most": 5, "principals": ["anonymous"]}],
            },
            "nothing": {"parameters": {}},
            "admin": {"parameters": {}, "principals": ["root"]},
        },
    }
)
GUARD = ToolGuard(RULES)
READ, FETCH, MAIL, SET = "tools.read_file.", "tools.fetch.", "tools.mail.", "tools.set."
# name of the tool, arguments as the model wrote them, rule that refuses
CALLS: list[tuple[Any, Any, str | None]] = [
    ("read_file", '{"path": "/srv/docs/a.txt"}', None),
    ("read_file", '{"path": "/srv/docs"}', None),
    ("read_file", '\n {"path":\t"/srv/docs/é.txt"} ', None),
    ("nothing", "{}", None),
    ("set", '{"level": 5, "on": true, "mode": "slow", "day": "2026-01-31"}', None),
    ("fetch", '{"url": "https://a.wiki.example.org/x?y=1#z"}', None),
    ("mail", '{"to": ["ann@example.org"], "text": "hi"}', None),
    # names
    ("delete_everything", "{}", "unknown_tool"),
    ("", "{}", "unknown_tool"),
    (None, "{}", "no_name"),
    (7, "{}", "no_name"),
    (["read_file"], "{}", "no_name"),
    ("Read_File", '{"path": "/srv/docs/a"}', "lookalike_name"),
    ("read_filе", '{"path": "/srv/docs/a"}', "lookalike_name"),  # a Cyrillic е
    ("ｒead_file", '{"path": "/srv/docs/a"}', "lookalike_name"),  # full width
    ("read\u200b_file", '{"path": "/srv/docs/a"}', "lookalike_name"),
    ("read_file ", '{"path": "/srv/docs/a"}', "lookalike_name"),
    ("read-file", '{"path": "/srv/docs/a"}', "lookalike_name"),
    ("read_fi1e", '{"path": "/srv/docs/a"}', "lookalike_name"),
    ("rеаd_filе", "{}", "lookalike_name"),
    ("\u202eelif_daer", "{}", "unknown_tool"),
    ("read_file\0", '{"path": "/srv/docs/a"}', "lookalike_name"),
    ("read_file;rm", "{}", "unknown_tool"),
    ("x" * 100_000, "{}", "unknown_tool"),
    ("admin", "{}", "tools.admin.principals"),
    # arguments that are no strict JSON object
    ("nothing", None, "no_arguments"),
    ("nothing", {}, "no_arguments"),
    ("nothing", "", "not_json"),
    ("nothing", "null", "not_object"),
    ("nothing", "[]", "not_object"),
    ("nothing", '"{}"', "not_object"),
    ("nothing", "{'a': 1}", "not_json"),
    ("nothing", "{} {}", "not_json"),
    ("nothing", "{}; rm -rf /", "not_json"),
    ("nothing", "{/* */}", "not_json"),
    ("nothing", "\ufeff{}", "not_json"),
    ("read_file", '{"path": "/srv/docs/a",}', "not_json"),
    ("read_file", '{"path": "/srv/docs/a", "path": "/etc/passwd"}', "duplicate_key"),
    ("read_file", r'{"path": "/srv/docs/a", "p\u0061th": "/etc/passwd"}', "duplicate_key"),
    ("read_file", '{"path": "/srv/docs/a", "раth": "/etc/passwd"}', "lookalike_key"),  # Cyrillic р and а
    ("read_file", '{"path": "/srv/docs/a", "Path": "/etc/passwd"}', "lookalike_key"),
    ("read_file", r'{"path": "/srv/docs/a\u0000.txt"}', "null_byte"),
    ("read_file", '{"path": "/srv/docs/a\0.txt"}', "not_json"),
    ("read_file", r'{"path": "/srv/docs/\ud800"}', "not_text"),
    ("set", '{"level": NaN}', "not_json"),
    ("set", '{"level": Infinity}', "not_json"),
    ("set", '{"level": 1e999}', "huge_number"),
    ("set", '{"level": ' + "9" * 30 + "}", "huge_number"),
    ("set", '{"level": ' + "9" * 6000 + "}", "huge_number"),
    ("set", '{"options": ' + "[" * 900 + "]" * 900 + "}", "too_deep"),
    ("set", '{"options": ' + '{"deep": ' * 40 + "1" + "}" * 40 + "}", "too_deep"),
    ("set", "[" * 200_000, "too_large"),
    ("set", "[" * 9_000, "too_deep"),
    ("set", '{"options": [' + "1," * 3000 + "1]}", "too_large"),
    ("mail", json.dumps({"to": ["ann@example.org"], "text": "x" * (1 << 20)}), "too_large"),
    # the schema
    ("read_file", "{}", READ + "parameters.required"),
    ("read_file", '{"path": 1}', READ + "parameters.type"),
    ("read_file", '{"path": null}', READ + "parameters.type"),
    ("read_file", '{"path": ["/srv/docs/a"]}', READ + "parameters.type"),
    ("read_file", '{"path": "/srv/docs/' + "a" * 200 + '"}', READ + "parameters.maxLength"),
    ("read_file", '{"path": "/srv/docs/a", "mode": "w"}', READ + "parameters.unevaluatedProperties"),
    ("read_file", '{"path": "/srv/docs/a", "__proto__": {}}', READ + "parameters.unevaluatedProperties"),
    ("nothing", '{"a": 1}', "tools.nothing.parameters.unevaluatedProperties"),
    ("set", '{"level": true}', SET + "parameters.type"),
    ("set", '{"level": 1.5}', SET + "parameters.type"),
    ("set", '{"level": 11}', SET + "parameters.maximum"),
    ("set", '{"on": "true"}', SET + "parameters.type"),
    ("set", '{"mode": "FAST"}', SET + "parameters.enum"),
    ("set", '{"day": "20260131"}', SET + "parameters.format"),
    ("set", '{"options": {"deep": {"name": "a", "other": 1}}}', SET + "parameters.unevaluatedProperties"),
    # rules on arguments
    ("set", '{"level": 6}', SET + "rules.0.at_most"),
    ("read_file", '{"path": "/etc/passwd"}', READ + "rules.0.inside"),
    ("read_file", '{"path": "docs/a"}', READ + "rules.0.inside"),
    ("read_file", '{"path": "/srv/docs/../../etc/passwd"}', READ + "rules.0.inside"),
    ("read_file", '{"path": "/srv/docs/..\\\\etc"}', READ + "rules.0.inside"),
    ("read_file", '{"path": "/srv/docs/%2e%2e/etc"}', READ + "rules.0.inside"),
    ("read_file", '{"path": "/srv/docs2/a"}', READ + "rules.0.inside"),
    ("read_file", '{"path": "//srv/docs/a"}', READ + "rules.0.inside"),
    ("read_file", '{"path": "/srv/docs/a\\nb"}', READ + "rules.0.inside"),
    ("fetch", '{"url": "https://docs.example.org@evil.example/"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "https://docs.example.org:8080/"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "https://docs.example.org.evil.example/"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "https://evil.example/docs.example.org"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "https:/\\\\evil.example/"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "file:///etc/passwd"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "javascript:alert(1)"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "https://wiki.example.org/"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "https://[::1/"}', FETCH + "rules.0.hosts"),
    ("fetch", '{"url": "https://d\u043ecs.example.org/"}', FETCH + "rules.0.hosts"),
    ("mail", '{"to": ["ann@example.org", "eve@evil.example"]}', MAIL + "rules.0.matches"),
    ("mail", '{"to": ["ann@example.org\\n"]}', MAIL + "rules.0.matches"),
    ("mail", '{"to": ["ann@example.org.evil"]}', MAIL + "rules.0.matches"),
    ("mail", '{"to": ["ann@example.org"], "text": "the PassWord is"}', MAIL + "rules.1.does_not_match"),
]  # fmt: skip


def call(name: Any, arguments: Any, kind: str = "function") -> dict[str, Any]:
    return {"id": "call", "type": kind, "function": {"name": name, "arguments": arguments}}


def rule_of(*calls: dict[str, Any], principal: str = "anonymous", **more: Any) -> str | None:
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": list(calls), **more}]
    violation = GUARD.verdict(canonical(messages), principal).violation
    if violation is None:
        return None
    assert violation.level == "error"
    assert len(json.dumps(violation.metadata)) < 4000, "an attacker does not choose the size of an answer"
    return str(violation.metadata["rule"])


def test_there_are_enough() -> None:
    assert len([rule for _, _, rule in CALLS if rule is not None]) >= 60


@pytest.mark.parametrize(("name", "arguments", "rule"), CALLS, ids=lambda each: repr(each)[:40])
def test_a_call_gets_its_verdict(name: Any, arguments: Any, rule: str | None) -> None:
    assert rule_of(call(name, arguments)) == rule


def test_calls_of_other_kinds_and_forms() -> None:
    assert rule_of(call("nothing", "{}", kind="custom")) == "unsupported_type"
    assert rule_of({"type": "function"}) == "no_name"
    assert rule_of({}) == "no_name"
    assert rule_of(function_call={"name": "rm", "arguments": "{}"}) == "unknown_tool", "the form before tool_calls"
    assert rule_of(function_call={"name": "nothing", "arguments": "{}"}) is None


def test_one_bad_call_among_good_ones_is_found() -> None:
    good = call("nothing", "{}")
    assert rule_of(good, good) is None
    assert rule_of(good, call("rm", "{}"), good) == "unknown_tool"
    assert rule_of(*[good] * 5) == "max_calls"
    mail = call("mail", '{"to": ["ann@example.org"]}')
    assert rule_of(mail, good) is None
    assert rule_of(mail, good, mail) == MAIL + "max_calls"


def test_rules_hold_for_the_callers_they_name() -> None:
    assert rule_of(call("set", '{"level": 9}'), principal="ann") is None
    assert rule_of(call("set", '{"level": 9}'), principal="anonymous") == SET + "rules.0.at_most"
    mail = call("mail", '{"to": ["ann@example.org"]}')
    assert rule_of(mail, principal="staff-ann") is None
    assert rule_of(mail, principal="guest") == MAIL + "principals"
    assert rule_of(mail, principal="Staff-ann") == MAIL + "principals"
    assert rule_of(call("admin", "{}"), principal="root") is None


def test_only_the_last_assistant_message_counts() -> None:
    bad, good = [call("rm", "{}")], [call("nothing", "{}")]
    after = {"role": "tool", "tool_call_id": "call", "content": "done"}
    for calls, refused in (([bad, good], False), ([good, bad], True)):
        messages = [each for group in calls for each in ({"role": "assistant", "tool_calls": group}, after)]
        assert (GUARD.verdict(canonical(messages), "anonymous").violation is not None) == refused
    assert GUARD.verdict(canonical([{"role": "user", "content": "hi"}]), "anonymous").violation is None


def test_values_of_arguments_are_not_repeated() -> None:
    violation = GUARD.verdict(
        canonical([{"role": "assistant", "tool_calls": [call("read_file", '{"path": "/home/ann/secret"}')]}]),
        "anonymous",
    ).violation
    assert violation is not None
    assert "secret" not in json.dumps(violation.metadata) + violation.user_message
    assert violation.metadata["violations"] == [
        {"call": 0, "tool": "read_file", "rule": READ + "rules.0.inside", "at": "/path"}
    ]
