"""Tool calls that stand in an assistant's text, as Hermes' data has them."""

import json
from typing import Any

import pytest

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec.rows import RowsReport, canonical
from tests.spec.test_rows_formats import call, said, told, user

SYSTEM = 'You call functions. <tools>[{"name": "tide", "parameters": {}}]</tools>'
NOTES = {"tool calls": 1, "tool calls read from text": 1}


def typed(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def response(*texts: str) -> str:
    return "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def shared(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def calls(text: str | None, *made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return said(text, tool_calls=list(made), **more)


BREST, DOVER = call("tide", port="Brest"), call("tide", port="Dover")
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "Hermes": (
        shared(
            ("system", SYSTEM), ("human", "Tide at Brest and Dover?"),
            ("gpt", f"I look.\n{typed('tide', port='Brest')}\n{typed('tide', port='Dover')}\n"),
            ("tool", response("5 m", '{"height": 6}')), ("gpt", "5 m and 6 m."),
        ),
        [told(SYSTEM), user("Tide at Brest and Dover?"), calls("I look.", BREST, DOVER), result("5 m"),
         result('{"height": 6}'), said("5 m and 6 m.")],
    ),
    "results in messages of their own, and a call that ends the row": (
        {"messages": [
            user("Both?"), said(typed("tide", port="Brest") + typed("tide", port="Dover"), weight=0), result("5 m"),
            result(response("6 m")), said("<think>Again.</think>\n\nI ask. " + typed("tide", port="Dover") + " Wait."),
        ]},
        [user("Both?"), calls(None, BREST, DOVER, weight=0), result("5 m"), result("6 m"),
         calls("<think>Again.</think>\n\nI ask.\nWait.", DOVER)],
    ),
    "words about calls in a thought": (
        {"messages": [user("Tide?"), said("<think>A <tool_call> is due.</think>" + typed("tide", port="Brest")),
                      result("about <tool_response>x</tool_response>"), said("5 m")]},
        [user("Tide?"), calls("<think>A <tool_call> is due.</think>", BREST),
         result("about <tool_response>x</tool_response>"), said("5 m")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_calls_become_tool_calls_and_results_messages(name: str) -> None:
    row, expected = ROWS[name]
    report = RowsReport()
    assert canonical(row, 1, "sft", "auto", report=report) == {"messages": expected}
    assert NOTES.items() <= report.notes.items()


def test_a_column_of_tools_stays_as_it_is() -> None:
    row, expected = ROWS["Hermes"]
    tools = [{"type": "function", "function": {"name": "tide"}}]
    assert canonical({**row, "tools": json.dumps(tools)}, 1, "sft", "auto") == {"messages": expected, "tools": tools}


def test_a_preference_has_them_in_prompt_and_answers() -> None:
    asked = [user("Tide?"), said(typed("tide", port="Brest")), result(response("5 m"))]
    row = {
        "prompt": asked,
        "chosen": [said(typed("tide", port="Dover")), result(response("6 m")), said("6 m")],
        "rejected": "None.",
    }
    assert canonical(row, 1, "dpo", "auto") == {
        "prompt": [user("Tide?"), calls(None, BREST, weight=0), result("5 m")],
        "chosen": [calls(None, DOVER), result("6 m"), said("6 m")],
        "rejected": [said("None.")],
    }


@pytest.mark.parametrize(
    "messages",
    [
        [user("Tide?"), said(typed("tide", port="Brest"))],
        [user("How do I call?"), said("Write <tool_call> and </tool_call>."), user("Thanks"), said("Bye.")],
    ],
)
def test_a_text_that_no_result_follows_stays_a_text(messages: list[dict[str, Any]]) -> None:
    report = RowsReport()
    assert canonical({"messages": messages}, 1, "sft", "auto", report=report) == {"messages": messages}
    assert report.notes == {}


BAD: dict[str, tuple[str, str]] = {
    "not JSON": ("<tool_call>{'name': 'tide'}</tool_call>", "[1] has a <tool_call> that is not JSON (Expec"),
    "one of two": (typed("tide") + "<tool_call>[]</tool_call>", "that is not an object with name and arguments"),
    "no arguments": ('<tool_call>{"name": "tide"}</tool_call>', "that is not an object with name and arguments"),
    "a list of arguments": (
        '<tool_call>{"name": "tide", "arguments": [1]}</tool_call>', "<tool_call>.arguments is [1]; expected an object"
    ),
    "open": ('<tool_call>{"name": "tide", "arguments": {}}', "has a <tool_call> without its end"),
    "ToolACE": ('[tide(port="Brest")]', "no other text, such as [name(argument=1)], is read as a call"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_call_that_cannot_be_read_is_told_at_its_result(name: str) -> None:
    text, reason = BAD[name]
    found = canonical(shared(("human", "Tide?"), ("gpt", text), ("tool", "5 m"), ("gpt", "5 m")), 7, "sft", "auto")
    assert isinstance(found, RowProblem)
    assert (found.row, found.field) == (7, "conversations[2]")
    assert found.reason.startswith("is a tool's result, but no call without a result is before it")
    assert reason in found.reason


def test_a_problem_behind_several_results_names_the_message_of_the_file() -> None:
    both = typed("tide", port="Brest") + typed("tide", port="Dover")
    row = shared(
        ("human", "Tide?"), ("gpt", both), ("tool", response("5 m", "6 m")), ("gpt", "Done."), ("tool", "7 m"),
        ("gpt", "Bye."),
    )  # fmt: skip
    found = canonical(row, 1, "sft", "auto")
    assert isinstance(found, RowProblem)
    assert found.field == "conversations[4]"
    few = shared(("human", "Tide?"), ("gpt", both), ("tool", response("5 m")), ("gpt", "5 m."))
    found = canonical(few, 1, "sft", "auto")
    assert isinstance(found, RowProblem)
    assert found.field == "conversations[1].tool_calls"
    assert "its result is missing before conversations[3]" in found.reason
