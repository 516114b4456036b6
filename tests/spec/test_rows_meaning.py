"""What a person can't mean: each row has a problem that names the path and the reason, and none is dropped silently."""

from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidInput, RowProblem
from llama_stack_provider_moe.spec import Recipe, RowFormat
from llama_stack_provider_moe.spec.rows import canonical, check_columns
from tests.spec.test_rows_formats import HH, call, said, told, tool, user

HALF = "\ud83d"


def result(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **more}


def calls(*names: str) -> dict[str, Any]:
    return said(None, tool_calls=[call(name, f"c{number}") for number, name in enumerate(names, 1)])


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


ASKED = user("Tide?")
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": (chat(), "messages", "is an empty list"),
    "not a list": ({"messages": 3}, "messages", "is int; expected text or a list of messages"),
    "not JSON": ({"messages": "hello"}, "messages", "is text, but not the JSON of a list of messages"),
    "not a message": (chat("hello"), "messages[0]", "is str; expected an object with role and content"),
    "no role": (chat({"content": "hello"}), "messages[0].role", "is None; expected one of system, developer, user"),
    "a strange role": (chat({"role": ["user"], "content": "hello"}), "messages[0].role", "is ['user']; expected"),
    "no content": (chat({"role": "user"}), "messages[0].content", "is not text"),
    "white space": (chat(user("\n ")), "messages[0].content", "is empty"),
    "no answer": (chat(ASKED), "messages", "ends with a user turn; the last turn must be the assistant's"),
    "a result at the end": (chat(ASKED, calls("tide"), result("5 m")), "messages", "ends with a tool turn"),
    "an image": (
        chat(user("x") | {"content": [{"type": "image_url", "image_url": {"url": "u"}}]}, said("y")),
        "messages[0].content[0]", "is a part of type 'image_url'; jobs train on text and on images that came with",
    ),
    "a strange part": (
        chat(user("x") | {"content": [{"type": "thinking", "thinking": "t"}]}),
        "messages[0].content[0]", "is a part of type 'thinking'; expected type text",
    ),
    "images of a message": (chat(user("x") | {"images": ["a.png"]}, said("y")), "messages[0].images", "would change"),
    "half a character": (chat(user("a" + HALF)), "messages[0].content", "contains half of a surrogate pair"),
    "half a character in an answer": (
        {"prompt": "a", "completion": HALF}, "completion", "contains half of a surrogate pair"
    ),
    "half a character in arguments": (
        chat(ASKED, said(None, tool_calls=[call("tide", port=HALF)])),
        "messages[1].tool_calls[0].function.arguments", "contains half of a surrogate pair",
    ),
    "half a character in a tool": (
        chat(ASKED, said("a"), tools=[tool("tide", description=HALF)]), "tools[0]", "contains half of a surrogate pair"
    ),
    "a result without a call": (
        chat(ASKED, result("5 m"), said("5 m")), "messages[1]", "is a tool's result, but no call without a result"
    ),
    "two results of one call": (
        chat(ASKED, calls("tide"), result("5 m"), result("6 m"), said("5 m")), "messages[3]", "is a tool's result"
    ),
    "a result of another call": (
        chat(ASKED, calls("tide"), result("5 m", tool_call_id="c9"), said("5 m")),
        "messages[2].tool_call_id", "is 'c9'; expected the id of a call before it: ['c1']",
    ),
    "a result of another function": (
        chat(ASKED, calls("tide"), result("5 m", name="wind"), said("5 m")),
        "messages[2].name", "is 'wind'; expected the function of a call before it: ['tide']",
    ),
    "a call without a result": (
        chat(ASKED, calls("tide", "wind"), result("5 m"), said("5 m")),
        "messages[1].tool_calls", "calls 'wind' (id 'c2'), but its result is missing before messages[3]",
    ),
    "two calls with one id": (
        chat(ASKED, said(None, tool_calls=[call("a", "c"), call("b", "c")])),
        "messages[1].tool_calls", "has two calls with id 'c'",
    ),
    "a user who calls": (
        chat(user("x") | {"tool_calls": [call("tide")]}), "messages[0].tool_calls", "is in a user message"
    ),
    "arguments that are a list": (
        chat(ASKED, said(None, tool_calls=[{"function": {"name": "tide", "arguments": "[1]"}}])),
        "messages[1].tool_calls[0].function.arguments", "is [1]; expected an object, or the JSON text of one",
    ),
    "arguments that are not JSON": (
        chat(ASKED, said(None, tool_calls=[{"function": {"name": "tide", "arguments": "{port"}}])),
        "messages[1].tool_calls[0].function.arguments", "is text, but not the JSON of an object",
    ),
    "arguments that JSON does not have": (
        chat(ASKED, said(None, tool_calls=[{"function": {"name": "tide", "arguments": '{"x": NaN}'}}])),
        "messages[1].tool_calls[0].function.arguments", "is nan, which JSON does not have",
    ),
    "a call of no function": (
        chat(ASKED, said(None, tool_calls=[{"type": "code", "code": "1"}])),
        "messages[1].tool_calls[0].type", "is 'code'; expected 'function'",
    ),
    "an old and a new call": (
        chat(ASKED, calls("tide") | {"function_call": {"name": "tide"}}), "messages[1].function_call", "is beside"
    ),
    "an id in a question": (
        chat(user("x") | {"tool_call_id": "c1"}), "messages[0].tool_call_id", "is in a user message"
    ),
    "two thoughts": (
        chat(ASKED, said("5 m", thinking="a", reasoning="b")), "messages[1]", "has different texts as reasoning and"
    ),
    "a user's thought": (chat(user("x") | {"thinking": "a"}), "messages[0].thinking", "is in a user message"),
    "a weight of 2": (chat(ASKED, said("a", weight=2)), "messages[1].weight", "is 2; expected 0 or 1"),
    "a weight that is true": (chat(ASKED, said("a", weight=True)), "messages[1].weight", "is True; expected 0 or 1"),
    "a user's weight": (chat(user("x") | {"weight": 1}), "messages[0].weight", "is 1 in a user message"),
    "nothing to learn": (chat(ASKED, said("a", weight=0)), "messages", "has no answer to learn"),
    "a strange speaker": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "conversations[0].from", "is 'narrator'; expected one of system, developer, human",
    ),
    "calls that are text": (
        {"conversations": [{"from": "human", "value": "Tide?"}, {"from": "function_call", "value": "tide()"}]},
        "conversations[1].value", "is text, but not the JSON of a function's name and arguments",
    ),
    "two system texts": (
        chat(told("Be brief."), ASKED, said("a"), system="Be long."),
        "system", "differs from the system message at messages[0]; keep one of them",
    ),
    "two tools of one name": (
        chat(ASKED, said("a"), tools=[tool("tide"), tool("tide")]), "tools[1].function.name", "is 'tide', as that of an"
    ),
    "a tool without a name": (chat(ASKED, said("a"), tools=[{"type": "function", "function": {}}]),
                              "tools[0].function.name", "is not text"),
    "a tool that is not a function": (
        chat(ASKED, said("a"), tools=[{"type": "web", "function": {"name": "x"}}]), "tools[0].type", "is 'web';"
    ),
    "a variable that is ours": (
        chat(ASKED, said("a"), chat_template_kwargs={"add_generation_prompt": True}),
        "chat_template_kwargs.add_generation_prompt", "is not a variable of a chat template that a row can set",
    ),
    "two values": (
        chat(ASKED, said("a"), parallel_tool_calls=True, chat_template_kwargs={"parallel_tool_calls": False}),
        "parallel_tool_calls", "differs from the value in chat_template_kwargs",
    ),
    "history that is not pairs": (
        {"instruction": "a", "output": "b", "history": [["c"]]}, "history[0]", "is ['c']; expected a pair"
    ),
    "an answer that is a question": (
        {"prompt": "a", "completion": [user("a"), said("b")]}, "completion", "begins with a user turn; give the answer"
    ),
    "a prompt that is answered": (
        {"prompt": [user("a"), said("b")], "completion": "c"}, "prompt", "ends with an assistant turn; expected the"
    ),
    "a pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "completion",
               "is missing beside 'prompt'; chosen and rejected are for recipes dpo and reward"),
    "a pair without a prompt": ({"chosen": HH + "b", "rejected": HH + "c"}, "row",
                                "has columns ['chosen', 'rejected']; expected one of {messages}"),
    "no column": ({}, "row", "has columns []; expected one of {messages}, {dialog}, {conversations}, {instruction,"),
    "an empty text": ({"text": " "}, "text", "is empty"),
    "a column without a name": ({"text": "a", 3: 4}, "row", "has a column named 3; expected text"),  # type: ignore[dict-item]
    "two formats": (
        {"prompt": "a", "completion": "b", "messages": [user("c"), said("d")]},
        "row", "is ambiguous: 'messages' makes it a row of format messages, 'prompt' one of prompt_completion",
    ),
    "a text and another conversation": (
        {"text": "Rivers run.", "messages": [user("c"), said("d")]}, "row", "is ambiguous: 'messages' makes it a row of"
    ),
    "a label": ({"prompt": "a", "completion": "b", "label": False}, "label", "would change the meaning, but"),
    "a weight of the row": (chat(ASKED, said("a"), weight=0.5), "weight", "would change the meaning, but messages"),
    "images": (chat(ASKED, said("a"), images=["a.png"]), "images", "would change the meaning, but messages rows"),
    "an input": ({"prompt": "a", "input": "b", "completion": "c"}, "input", "would change the meaning, but"),
    "a history": (chat(ASKED, said("a"), history=[["a", "b"]]), "history", "would change the meaning, but messages"),
    "tools of a text": ({"text": "a", "tools": [tool("tide")]}, "tools", "would change the meaning, but text rows"),
    "a system text of a text": ({"text": "a", "system": "b"}, "system", "would change the meaning, but text rows have"),
}  # fmt: skip

BAD_PAIRS: dict[str, tuple[dict[str, Any], str, str]] = {
    "one answer": ({"prompt": "a", "chosen": "b"}, "rejected", "is missing; a preference row has prompt, chosen,"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "prompt", "is missing; a preference row has prompt, chosen,"),
    "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected", "is the same as chosen"),
    "whole and the same": (
        {"chosen": [user("a"), said("b")], "rejected": [user("a"), said("b")]}, "rejected", "is the same as chosen"
    ),
    "one whole conversation": (
        {"prompt": "a", "chosen": [user("a"), said("b")], "rejected": "c"},
        "chosen", "begins with a user turn, but rejected with the answer; give both alone, without the prompt, or both",
    ),
    "no common beginning": (
        {"chosen": [user("a"), said("b")], "rejected": [user("c"), said("b")]}, "rejected", "does not begin as chosen"
    ),
    "one is the other's beginning": (
        {"chosen": [user("a"), said("b")], "rejected": [user("a"), said("b"), user("c"), said("d")]},
        "chosen", "is only the beginning of the other conversation",
    ),
    "another question": (
        {"chosen": [user("a"), said("b"), user("c"), said("d")],
         "rejected": [user("a"), said("b"), user("e"), said("d")]},
        "chosen", "differs from the other conversation first at turn 3, a user turn",
    ),
    "another prompt": (
        {"prompt": "z", "chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]},
        "prompt", "is not in the common beginning of chosen and rejected",
    ),
    "a prompt that is answered": (
        {"prompt": [user("a"), said("x")], "chosen": "b", "rejected": "c"}, "prompt", "ends with an assistant turn"
    ),
    "a system prompt alone": (
        {"prompt": [told("a")], "chosen": "b", "rejected": "c"}, "prompt", "ends with a system turn; expected the"
    ),
    "an answer that is not learnt": (
        {"prompt": "a", "chosen": [said("b", weight=0)], "rejected": "c"}, "chosen", "has a message of weight 0"
    ),
    "an answer that ends with a question": (
        {"prompt": "a", "chosen": [said("b"), user("c")], "rejected": "d"}, "chosen", "ends with a user turn"
    ),
    "a call in the middle of an answer": (
        {"prompt": "a", "chosen": [calls("tide"), said("b")], "rejected": "d"}, "chosen[0].tool_calls", "calls 'tide'"
    ),
    "a transcript of somebody else": (
        {"prompt": HH, "chosen": "\n\nHuman: Hi\n\nAssistant: b", "rejected": "c"}, "chosen", "is a transcript that"
    ),
    "an empty turn": (
        {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "chosen, turn 2", "is"
    ),
    "OpenAI's without messages": (
        {"input": {"tools": []}, "preferred_output": [said("a")], "non_preferred_output": [said("b")]},
        "input.messages", "is missing",
    ),
    "OpenAI's with one answer": (
        {"input": {"messages": [user("a")]}, "preferred_output": [said("a")]}, "non_preferred_output", "is missing"
    ),
    "a bad tool inside the input": (
        {"input": {"messages": [user("a")], "tools": [3]}, "preferred_output": [said("a")],
         "non_preferred_output": [said("b")]}, "input.tools[0]", "is int; expected a function's name",
    ),
    "a label": ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 1}, "label", "would change the meaning"),
    "two prompts": (
        {"prompt": "a", "instruction": "z", "chosen": "b", "rejected": "c"},
        "row", "is ambiguous: 'prompt' makes it a row of format preference, 'instruction' one of alpaca",
    ),
}  # fmt: skip


def problem(row: object, recipe: Recipe) -> RowProblem:
    found = canonical(row, 7, recipe, "auto")
    assert isinstance(found, RowProblem), found
    assert found.row == 7
    return found


@pytest.mark.parametrize(("row", "field", "reason"), BAD.values(), ids=BAD)
def test_a_row_that_nobody_means(row: dict[str, Any], field: str, reason: str) -> None:
    found = problem(row, "sft")
    assert found.field == field
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(("row", "field", "reason"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_pair_that_nobody_means(row: dict[str, Any], field: str, reason: str) -> None:
    found = problem(row, "dpo")
    assert found.field == field
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("row", "recipe", "row_format", "told"),
    [
        (
            {"text": "a"},
            "sft",
            "openai_preference",
            "row: can't be of data.format 'openai_preference', which is for rec",
        ),
        ({"prompt": "a"}, "dpo", "text", "row: can't be of data.format 'text', which is for recipe sft"),
        ({"text": "a"}, "sft", "sharegpt", "row: has columns ['text']; expected one of {conversations}; data.columns"),
        (
            {"prompt": "a", "completion": "b"},
            "sft",
            "dialog",
            "prompt: is an instruct row, but data_format is 'dialog'",
        ),
        (
            {"messages": [user("a"), said("b")]},
            "sft",
            "instruct",
            "messages: is a dialog row, but data_format is 'inst",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "dpo",
            "dialog",
            "prompt: is an instruct row, but data_format",
        ),
        (
            {"prompt": "a", "completion": "b"},
            "dpo",
            "auto",
            "chosen: is missing; a preference row has prompt, chosen, re",
        ),
        ("a", "sft", "auto", "row: is str, not an object"),
        (None, "dpo", "auto", "row: is NoneType, not an object"),
    ],
)
def test_a_row_of_another_format(row: object, recipe: Recipe, row_format: RowFormat, told: str) -> None:
    found = canonical(row, 7, recipe, row_format)
    assert isinstance(found, RowProblem)
    assert str(found).startswith(f"row 7: {told}")


def test_values_that_say_nothing_change_nothing() -> None:
    row = {"prompt": "a", "completion": "b", "input": "", "history": [], "images": [], "weight": 1.0, "system": "",
           "tools": []}  # fmt: skip
    assert canonical(row, 1, "sft", "auto") == {"messages": [user("a"), said("b")]}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"promt": "question"},
            "data.columns: 'promt' is not valid; expected a column of the formats of recipe 'sft': me",
        ),
        ({"chosen": "good"}, "data.columns: 'chosen' is not valid"),
        (
            {"prompt": "a", "completion": "a"},
            "data.columns.completion: 'a' is not valid; expected a column other than ",
        ),
    ],
)
def test_names_of_columns_that_no_format_has(columns: dict[str, str], told: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_columns(columns, "sft", "prompt_completion" if "chosen" in columns else "auto", "data.columns")
    assert str(caught.value).startswith(told)
