"""ToolGuard: the tool calls of the last assistant message, against rules.

Everything that the rules do not allow is a violation: a tool without rules, arguments that are no strict JSON object,
a key that the schema does not name, a caller whom the tool does not name. A name must be equal to a rule's, character
by character; one that only looks like it is refused and said to.
"""

from typing import NamedTuple

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.shields import strict_json
from llama_stack_provider_moe.shields.argument_tests import is_for
from llama_stack_provider_moe.shields.lookalikes import skeleton
from llama_stack_provider_moe.shields.messages import Conversation, ToolCall, last_assistant
from llama_stack_provider_moe.shields.rules import ToolRules, ToolRulesFile
from llama_stack_provider_moe.shields.schema_references import MOST_REFERENCES, TooMuchWork
from llama_stack_provider_moe.shields.verdict import Level, Verdict, Violation, worst

MAX_VALUES = 2 * strict_json.MAX_VALUES  # in the arguments of all calls of a message
SHOWN = 8  # findings of an answer
CATEGORY = "tool_call"


class Finding(NamedTuple):
    """One thing that the rules do not allow.

    Attributes:
        call: number of the tool call in its message, from 0.
        tool: its name, shortened; None where it has none.
        rule: the rule that it breaks: a word, or `tools.NAME.rules.NUMBER.TEST`.
        at: JSON Pointer to the argument; None: the call as a whole.
        level: of the rule.
        message: for the user.
    """

    call: int
    tool: str | None
    rule: str
    at: str | None
    level: Level
    message: str


class ToolGuard:
    """Checks tool calls.

    Args:
        rules: the rules.
    """

    def __init__(self, rules: ToolRulesFile) -> None:
        self._rules = rules

    def verdict(self, conversation: Conversation, principal: str) -> Verdict:
        """Return the verdict about the tool calls of the last assistant message.

        Args:
            conversation: the messages.
            principal: who would run the calls.
        """
        message = last_assistant(conversation)
        calls = message.tool_calls if message is not None else ()
        found = self._of_message(calls)
        values = 0
        for number, call in enumerate(calls):
            findings, count = self._of_call(number, call, principal)
            found += findings
            values += count
            if values > MAX_VALUES:
                found.append(self._whole(number, call, "too_large"))
                break
        if not found:
            return Verdict(None, 0.0, {CATEGORY: 0.0})
        level = worst([each.level for each in found])
        told = next(each.message for each in found if each.level == level)
        metadata: dict[str, object] = {
            "shield": "tool_guard", "rule": next(each.rule for each in found if each.level == level),
            "violations": [_shown(each) for each in found[:SHOWN]], "count": len(found),
        }  # fmt: skip
        return Verdict(Violation(level, told, metadata), 1.0, {CATEGORY: 1.0})

    def _of_message(self, calls: tuple[ToolCall, ...]) -> list[Finding]:
        if len(calls) > self._rules.max_calls:
            return [self._whole(self._rules.max_calls, calls[self._rules.max_calls], "max_calls")]
        for name, tool in self._rules.tools.items():
            numbers = [number for number, call in enumerate(calls) if call.name == name]
            if tool.max_calls is not None and len(numbers) > tool.max_calls:
                first = numbers[tool.max_calls]
                return [self._of_tool(first, name, tool, f"tools.{name}.max_calls", None)]
        return []

    def _of_call(self, number: int, call: ToolCall, principal: str) -> tuple[list[Finding], int]:
        """What is wrong with a call, and how many values its arguments have."""
        if call.kind != "function":
            return [self._whole(number, call, "unsupported_type")], 0
        if call.name is None:
            return [self._whole(number, call, "no_name")], 0
        tool = self._rules.tools.get(call.name)
        if tool is None:
            looks_known = skeleton(call.name) in self._rules.skeletons
            return [self._whole(number, call, "lookalike_name" if looks_known else "unknown_tool")], 0
        name = call.name
        if not is_for(tool.principals, principal):
            return [self._of_tool(number, name, tool, f"tools.{name}.principals", None)], 0
        if call.arguments is None:
            return [self._of_tool(number, name, tool, "no_arguments", None)], 0
        try:
            arguments = strict_json.parsed(call.arguments)
        except strict_json.NotStrict as error:
            return [self._of_tool(number, name, tool, error.code, None)], 0
        try:
            mismatches = self._rules.schemas[name].mismatches(arguments, most_references=MOST_REFERENCES)
        except RecursionError:
            return [self._of_tool(number, name, tool, "too_deep", None)], 0
        except TooMuchWork:
            return [self._of_tool(number, name, tool, "too_large", None)], 0
        found = [
            self._of_tool(number, name, tool, f"tools.{name}.parameters.{each.keyword}", each.pointer)
            for each in mismatches
        ]
        for index, rule in enumerate(tool.rules):
            if is_for(rule.principals, principal):
                found += [
                    Finding(number, name, f"tools.{name}.rules.{index}.{test}", pointer, rule.level or tool.level,
                            rule.message or tool.message or self._rules.message)
                    for pointer, test in rule.broken(arguments)
                ]  # fmt: skip
        return found, strict_json.count(arguments)

    def _whole(self, number: int, call: ToolCall, rule: str) -> Finding:
        name = None if call.name is None else shorten(call.name)[1:-1]
        return Finding(number, name, rule, None, self._rules.level, self._rules.message)

    def _of_tool(self, number: int, name: str, tool: ToolRules, rule: str, at: str | None) -> Finding:
        return Finding(number, name, rule, at, tool.level, tool.message or self._rules.message)


def _shown(finding: Finding) -> dict[str, object]:
    shown: dict[str, object] = {"call": finding.call, "tool": finding.tool, "rule": finding.rule}
    return shown if finding.at is None else shown | {"at": finding.at}
