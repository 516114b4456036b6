"""Each format: a small row as people write it, and its canonical row by hand."""

import json
from typing import Any

import pytest

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec import Recipe, RowFormat
from llama_stack_provider_moe.spec.rows import RowsReport, canonical, conversation


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def told(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def call(name: str, number: str | None = None, **arguments: Any) -> dict[str, Any]:
    named = {} if number is None else {"id": number}
    return {"type": "function", **named, "function": {"name": name, "arguments": arguments}}


HH = "\n\nHuman: Tide at Brest?\n\nAssistant: Which day?\n\nHuman: Today.\n\nAssistant: "
HH_PROMPT = [user("Tide at Brest?"), said("Which day?", weight=0), user("Today.")]

CHATS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "messages": (
        "messages",
        {"messages": [told("Be brief."), user("7 x 8?"), said("56")]},
        {"messages": [told("Be brief."), user("7 x 8?"), said("56")]},
    ),
    "messages as JSON text": (
        "messages",
        {"messages": '[{"role": "user", "content": "7 x 8?"}, {"role": "assistant", "content": "56"}]'},
        {"messages": [user("7 x 8?"), said("56")]},
    ),
    "the assistant speaks first": (
        "messages",
        {"messages": [said("Harbour office."), user("Is berth 4 free?"), said("Until noon.")]},
        {"messages": [said("Harbour office."), user("Is berth 4 free?"), said("Until noon.")]},
    ),
    "OpenAI's chat": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Use "}, {"text": "tools."}]},
                {"role": "user", "content": "Tide at Brest and Dover?", "name": "ann"},
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "reasoning_content": "Two ports.",
                    "tool_calls": [
                        {"id": "c1", "function": {"name": "tide", "arguments": '{"port": "Brest"}'}},
                        {"id": "c2", "type": "function", "function": {"name": "tide", "arguments": {"port": "Dover"}}},
                    ],
                },
                {"role": "tool", "tool_call_id": "c2", "content": "5 m"},
                {"role": "tool", "tool_call_id": "c1", "content": ""},
                {"role": "assistant", "content": "5 m at Dover.", "weight": 1},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "Bye.", "weight": 0},
            ],
            "tools": [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}],
            "parallel_tool_calls": True,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "messages": [
                {"role": "developer", "content": "Use tools."},
                {"role": "user", "content": "Tide at Brest and Dover?", "name": "ann"},
                said(
                    None,
                    reasoning="Two ports.",
                    tool_calls=[call("tide", "c1", port="Brest"), call("tide", "c2", port="Dover")],
                ),
                {"role": "tool", "content": "5 m", "tool_call_id": "c2"},
                {"role": "tool", "content": "", "tool_call_id": "c1"},
                said("5 m at Dover."),
                user("Thanks"),
                said("Bye.", weight=0),
            ],
            "tools": [tool("tide", parameters={"type": "object"})],
            "chat_template_kwargs": {"enable_thinking": False, "parallel_tool_calls": True},
        },
    ),
    "OpenAI's older functions": (
        "messages",
        {
            "messages": [
                user("Tide?"),
                {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": "{}"}},
                {"role": "function", "name": "tide", "content": "5 m"},
                said("5 m."),
            ]
        },
        {
            "messages": [
                user("Tide?"),
                said(None, tool_calls=[call("tide")]),
                {"role": "tool", "content": "5 m", "name": "tide"},
                said("5 m."),
            ]
        },
    ),
    "the last answer is a call": (
        "messages",
        {"messages": [user("Tide?"), said("", tool_calls=[call("tide")])], "tools": [{"name": "tide"}]},
        {"messages": [user("Tide?"), said(None, tool_calls=[call("tide")])], "tools": [tool("tide")]},
    ),
    "columns of a data frame": (
        "messages",
        {
            "messages": [{**user("7 x 8?"), "tool_calls": None, "weight": float("nan")}, said("56", tool_calls=[])],
            "tools": float("nan"),
            "system": None,
        },
        {"messages": [user("7 x 8?"), said("56")]},
    ),
    "UltraChat": (
        "messages",
        {"prompt": "7 x 8?", "prompt_id": "f0e", "messages": [user("7 x 8?"), said("56"), user("Sure?"), said("Yes")]},
        {"messages": [user("7 x 8?"), said("56"), user("Sure?"), said("Yes")]},
    ),
    "dialog": (
        "llama_stack",
        {"dialog": [user("7 x 8?"), said("56")]},
        {"messages": [user("7 x 8?"), said("56")]},
    ),
    "dialog as JSON text": (
        "llama_stack",
        {"dialog": json.dumps([user("7 x 8?"), said("56")])},
        {"messages": [user("7 x 8?"), said("56")]},
    ),
    "chat_completion_input": (
        "llama_stack",
        {
            "chat_completion_input": json.dumps([user("7 x 8?"), said("54"), user("Again.")]),
            "expected_answer": "56",
        },
        {"messages": [user("7 x 8?"), said("54", weight=0), user("Again."), said("56")]},
    ),
    "prompt and completion": (
        "prompt_completion",
        {"prompt": "7 x 8?", "completion": "56"},
        {"messages": [user("7 x 8?"), said("56")]},
    ),
    "prompt and completion as messages": (
        "prompt_completion",
        {"prompt": [user("7 x 8?"), said("54"), user("Check again.")], "completion": [said("56")]},
        {"messages": [user("7 x 8?"), said("54", weight=0), user("Check again."), said("56")]},
    ),
    "prompt and completion with a system text": (
        "prompt_completion",
        {"system": "Be brief.", "prompt": "7 x 8?", "completion": {"role": "assistant", "content": "56"}},
        {"messages": [told("Be brief."), user("7 x 8?"), said("56")]},
    ),
    "ShareGPT": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "7 x 8?", "weight": 0},
                {"from": "gpt", "value": "56", "weight": 1.0},
                {"from": "user", "value": "Sure?"},
                {"from": "chatgpt", "value": "Yes"},
            ],
            "system": "Be brief.",
            "id": "x1",
        },
        {"messages": [told("Be brief."), user("7 x 8?"), said("56"), user("Sure?"), said("Yes")]},
    ),
    "ShareGPT with tools": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Tide?"},
                {"from": "function_call", "value": '{"name": "tide", "arguments": {"port": "Brest"}}'},
                {"from": "observation", "value": "5 m"},
                {"from": "gpt", "value": "5 m."},
            ],
            "tools": '[{"name": "tide", "description": "Tides", "parameters": {"type": "object"}}]',
        },
        {
            "messages": [
                user("Tide?"),
                said(None, tool_calls=[call("tide", port="Brest")]),
                {"role": "tool", "content": "5 m"},
                said("5 m."),
            ],
            "tools": [tool("tide", description="Tides", parameters={"type": "object"})],
        },
    ),
    "Alpaca": (
        "alpaca",
        {
            "instruction": "Add them.",
            "input": "7 and 8",
            "output": "15",
            "system": "Be brief.",
            "history": [["Ready?", "Yes."]],
        },
        {"messages": [told("Be brief."), user("Ready?"), said("Yes."), user("Add them.\n7 and 8"), said("15")]},
    ),
    "Alpaca with the text that the authors made of it": (
        "alpaca",
        {
            "instruction": "Add them.",
            "input": "",
            "output": "15",
            "text": "Below is an instruction.\n\n### Instruction:\nAdd them.\n\n### Response:\n15",
        },
        {"messages": [user("Add them."), said("15")]},
    ),
    "text": ("text", {"text": "Rivers run.\n", "title": "Rivers"}, {"text": "Rivers run.\n"}),
}  # fmt: skip

PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "texts": (
        "preference",
        {"prompt": "7 x 8?", "chosen": "56", "rejected": "54"},
        {"prompt": [user("7 x 8?")], "chosen": [said("56")], "rejected": [said("54")]},
    ),
    "a text and message answers": (
        "preference",
        {"prompt": "7 x 8?", "chosen": [said("56")], "rejected": {"role": "assistant", "content": "54"}},
        {"prompt": [user("7 x 8?")], "chosen": [said("56")], "rejected": [said("54")]},
    ),
    "messages with an earlier answer": (
        "preference",
        {"prompt": [user("7 x 8?"), said("?"), user("7 x 8!")], "chosen": [said("56")], "rejected": [said("54")]},
        {
            "prompt": [user("7 x 8?"), said("?", weight=0), user("7 x 8!")],
            "chosen": [said("56")],
            "rejected": [said("54")],
        },
    ),
    "UltraFeedback": (
        "preference",
        {
            "prompt": "7 x 8?",
            "prompt_id": "f0e",
            "chosen": [user("7 x 8?"), said("56")],
            "rejected": [user("7 x 8?"), said("54")],
            "messages": [user("7 x 8?"), said("56")],
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        },
        {"prompt": [user("7 x 8?")], "chosen": [said("56")], "rejected": [said("54")]},
    ),
    "no prompt": (
        "preference",
        {
            "chosen": [told("Be brief."), user("7 x 8?"), said("Hm."), user("So?"), said("56")],
            "rejected": [told("Be brief."), user("7 x 8?"), said("Hm."), user("So?"), said("54")],
        },
        {
            "prompt": [told("Be brief."), user("7 x 8?"), said("Hm.", weight=0), user("So?")],
            "chosen": [said("56")],
            "rejected": [said("54")],
        },
    ),
    "HH-RLHF": (
        "hh_rlhf",
        {"chosen": f"{HH}High at noon.", "rejected": f"{HH}No idea. "},
        {"prompt": HH_PROMPT, "chosen": [said("High at noon.")], "rejected": [said("No idea.")]},
    ),
    "HH-RLHF with its prompt": (
        "hh_rlhf",
        {"prompt": HH.rstrip(" "), "chosen": " High at noon.", "rejected": " No idea."},
        {"prompt": HH_PROMPT, "chosen": [said("High at noon.")], "rejected": [said("No idea.")]},
    ),
    "OpenAI": (
        "openai_preference",
        {
            "input": {"messages": [user("Tide?")], "tools": [tool("tide")], "parallel_tool_calls": False},
            "preferred_output": [said(None, tool_calls=[call("tide", "c1")])],
            "non_preferred_output": [said("No idea.")],
        },
        {
            "prompt": [user("Tide?")],
            "chosen": [said(None, tool_calls=[call("tide", "c1")])],
            "rejected": [said("No idea.")],
            "tools": [tool("tide")],
            "chat_template_kwargs": {"parallel_tool_calls": False},
        },
    ),
    "ShareGPT": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "7 x 8?"}],
            "chosen": {"from": "gpt", "value": "56"},
            "rejected": {"from": "gpt", "value": "54"},
        },
        {"prompt": [user("7 x 8?")], "chosen": [said("56")], "rejected": [said("54")]},
    ),
    "Alpaca": (
        "alpaca",
        {"instruction": "Add them.", "input": "7 and 8", "chosen": "15", "rejected": "16"},
        {"prompt": [user("Add them.\n7 and 8")], "chosen": [said("15")], "rejected": [said("16")]},
    ),
}


def read(row: object, recipe: Recipe = "sft", row_format: RowFormat = "auto", **more: Any) -> Any:
    return canonical(row, 1, recipe, row_format, **more)


@pytest.mark.parametrize(("name", "row", "right"), CHATS.values(), ids=CHATS)
def test_a_row_to_learn(name: RowFormat, row: dict[str, Any], right: dict[str, Any]) -> None:
    report = RowsReport()
    assert read(row, report=report) == right
    assert read(row, row_format=name) == right
    assert report.formats == {name: 1}
    assert read(right) == right


@pytest.mark.parametrize(("name", "row", "right"), PAIRS.values(), ids=PAIRS)
def test_a_pair(name: RowFormat, row: dict[str, Any], right: dict[str, Any]) -> None:
    report = RowsReport()
    assert read(row, "dpo", report=report) == right
    assert read(row, "dpo", name) == right
    assert report.formats == {name: 1}
    assert read(right, "dpo") == right


@pytest.mark.parametrize("kind", ["instruct", "dialog"])
def test_a_text_with_message_answers_has_both_kinds(kind: RowFormat) -> None:
    row = PAIRS["a text and message answers"][1]
    assert read(row, "dpo", kind) == PAIRS["a text and message answers"][2]


def test_the_stated_kind_decides_between_formats() -> None:
    row = {"prompt": "7 x 8?", "completion": "56", "messages": [user("9 x 9?"), said("81")]}
    assert read(row, row_format="dialog") == {"messages": [user("9 x 9?"), said("81")]}
    assert read(row, row_format="prompt_completion") == {"messages": [user("7 x 8?"), said("56")]}


def test_the_chosen_transcript_is_learnt_where_the_job_says_so() -> None:
    row = PAIRS["HH-RLHF"][1]
    assert isinstance(read(row), RowProblem)
    turns = [*HH_PROMPT, said("High at noon.")]
    assert read(row, row_format="hh_rlhf") == {"messages": [{k: v for k, v in each.items() if k != "weight"}
                                                            for each in turns]}  # fmt: skip


def test_prompts_without_an_answer() -> None:
    for row in ({"prompt": "7 x 8?"}, {"messages": [user("7 x 8?")]}, {"instruction": "7 x 8?"}):
        assert conversation(row, 1, "auto", answered=False) == {"messages": [user("7 x 8?")]}
        assert isinstance(conversation(row, 1, "auto"), RowProblem)


def test_texts_are_for_sft_alone() -> None:
    for recipe in ("circuit_breaker", "routing_analysis"):
        problem = read({"text": "Rivers run."}, recipe)
        assert problem == RowProblem(1, "text", "is a row of plain text, which has no answer; expected a conversation "
                                     f"with recipe {recipe!r}")  # fmt: skip
    assert "chosen" in str(read({"text": "Rivers run."}, "dpo"))


def test_other_names_of_columns() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    row = {"question": "7 x 8?", "answer": "56", "prompt": "the old one", "id": 3}
    report = RowsReport()
    assert read(row, columns=columns, report=report) == {"messages": [user("7 x 8?"), said("56")]}
    assert report.read == {"question": 1, "answer": 1}
    assert report.not_read == {"id": 1, "prompt": 1}
    assert read({"question": "7 x 8?", "answer": " "}, columns=columns) == RowProblem(1, "answer", "is empty")
    assert read({"question": "7 x 8?"}, columns=columns) == RowProblem(1, "answer", "is missing beside 'prompt'")
