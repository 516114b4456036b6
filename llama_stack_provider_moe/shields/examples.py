"""The examples in a file of rules: calls with the verdict that they must get."""

import json

from llama_stack_provider_moe.shields.messages import Message, ToolCall
from llama_stack_provider_moe.shields.rules import ToolRulesFile
from llama_stack_provider_moe.shields.tool_guard import ToolGuard


def failures(rules: ToolRulesFile) -> list[str]:
    """Return a line for each example that gets another verdict than it says."""
    guard = ToolGuard(rules)
    found = []
    for number, example in enumerate(rules.examples):
        given = example.arguments
        arguments = given if isinstance(given, str) else json.dumps(given)
        call = ToolCall(example.tool, arguments, "function")
        violation = guard.verdict((Message("assistant", "", (), (call,)),), example.principal).violation
        verdict = "allowed" if violation is None else "refused"
        if verdict != example.verdict:
            why = "" if violation is None else f" by {violation.metadata['rule']}"
            who = f"{example.tool} for {example.principal}"
            found.append(f"examples.{number}: {who} is {verdict}{why}; expected {example.verdict}")
    return found
