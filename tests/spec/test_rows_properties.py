"""Whatever a file holds becomes a canonical row or a problem; and a canonical row is its own canonical form."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec.rows import canonical
from tests.spec.test_rows_formats import CHATS, PAIRS

HALF = "\ud83d"
# Anything that a JSON file or a data frame may hold, with the columns and keys that formats know.
WORDS = st.sampled_from([
    "role", "content", "messages", "dialog", "prompt", "completion", "chosen", "rejected", "conversations", "from",
    "value", "instruction", "input", "output", "history", "system", "tools", "tool_calls", "function", "name",
    "arguments", "id", "tool_call_id", "weight", "reasoning", "thinking", "text", "type", "label", "preferred_output",
    "non_preferred_output", "chat_template_kwargs", "parallel_tool_calls", "function_call", "chat_completion_input",
    "expected_answer", "user", "assistant", "tool", "developer", "human", "gpt", "observation", "[]", "{}", "", " ",
    "\n\nHuman: a\n\nAssistant: b", HALF, '[{"role": "user", "content": "a"}]',
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=4) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.integers(), inner, max_size=5),
    max_leaves=12,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
TEXTS = st.sampled_from(["a", "b", "", "ü", None, [{"type": "text", "text": "c"}]])
ARGUMENTS = st.sampled_from(["{}", '{"x": 1}', {"x": [None]}, "[", None])
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.sampled_from("fg"), "arguments": ARGUMENTS})},
                          optional={"id": st.sampled_from("xy")}), max_size=2)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": TEXTS},
        optional={"tool_calls": CALLS, "weight": st.sampled_from([0, 1, 0.0]), "thinking": TEXTS,
                  "tool_call_id": st.sampled_from("xy")},
    ),
    max_size=5,
)  # fmt: skip
SIDES = MESSAGES | st.sampled_from(["a", "b", "\n\nHuman: a\n\nAssistant: b"])
LIKELY = st.dictionaries(
    st.sampled_from(["messages", "prompt", "completion", "chosen", "rejected", "system", "conversations", "text"]),
    SIDES,
)
GOOD = [row for _, row, _ in [*CHATS.values(), *PAIRS.values()]]


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    row = dict(draw(st.sampled_from(GOOD)))
    row[draw(st.sampled_from([*row, "tools", "system", "label"]))] = draw(VALUES)
    return row


@given(
    row=VALUES | LIKELY | damaged(), recipe=st.sampled_from(["sft", "dpo", "circuit_breaker"]), answered=st.booleans()
)
@settings(max_examples=1500, deadline=None)
def test_any_row_is_canonical_or_a_problem(row: Any, recipe: Any, answered: bool) -> None:
    found = canonical(row, 1, recipe, "auto", answered)
    if isinstance(found, RowProblem):
        assert str(found).startswith("row 1: ")
        return
    assert canonical(found, 1, recipe, "auto", answered) == found


NAMES = st.sampled_from(["tide", "wind"])
SAID = st.sampled_from(["a", "b\n", "ü", "Where? "])


@st.composite
def turn(draw: st.DrawFn, first: int) -> list[dict[str, Any]]:
    """A question and its answer, perhaps by calls, as people write them."""
    asked = draw(SAID)
    question = draw(st.sampled_from([asked, [asked], [{"type": "text", "text": asked}], {"text": asked}]))
    answer: dict[str, Any] = {"role": "assistant", "content": draw(SAID)}
    if draw(st.booleans()):
        answer[draw(st.sampled_from(["thinking", "reasoning_content", "reasoning"]))] = draw(SAID)
    if draw(st.booleans()):
        answer["weight"] = draw(st.sampled_from([0, 1, 1.0, None]))
    made: list[dict[str, Any]] = [{"role": "user", "content": question}]
    names = draw(st.lists(NAMES, max_size=2))
    if names:
        with_ids, as_text = draw(st.booleans()), draw(st.booleans())
        arguments: Any = '{"port": "Brest"}' if as_text else {"port": "Brest"}
        calls: list[dict[str, Any]] = [{"function": {"name": name, "arguments": arguments}} for name in names]
        results = [{"role": "tool", "content": draw(SAID), "name": name} for name in names]
        for number, (call, result) in enumerate(zip(calls, results, strict=True), start=first):
            if with_ids:
                call["id"] = result["tool_call_id"] = f"c{number}"
        if with_ids:
            results = draw(st.permutations(results))
        made += [{"role": "assistant", "content": draw(st.sampled_from([None, "", "I look."])), "tool_calls": calls}]
        made += results
    return [*made, answer]


@st.composite
def talk(draw: st.DrawFn) -> list[dict[str, Any]]:
    turns = [draw(turn(first)) for first in range(0, 2 * draw(st.integers(1, 3)), 2)]
    first = [("system", "Be brief."), ("developer", ""), ("assistant", "Harbour office.")]
    begins = draw(st.sampled_from([[], *([{"role": role, "content": content}] for role, content in first)]))
    return [*begins, *(message for one in turns for message in one)]


@st.composite
def likely(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A row that somebody means, and its recipe."""
    said = draw(talk())
    said[-1]["weight"] = 1
    more = draw(st.fixed_dictionaries({}, optional={
        "tools": st.sampled_from([[{"name": "tide"}], '[{"type": "function", "function": {"name": "wind"}}]', []]),
        "parallel_tool_calls": st.booleans(),
        "chat_template_kwargs": st.sampled_from([{"enable_thinking": False}, '{"x": [1, null]}', {}]),
        "source": SAID,
    }))  # fmt: skip
    other = {"role": "assistant", "content": "another answer"}
    form = draw(st.sampled_from(["messages", "text", "prompt", "pair", "whole"]))
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "messages": ("sft", {"messages": said}),
        "text": ("sft", {"messages": json.dumps(said)}),
        "prompt": ("sft", {"prompt": said[:-1], "completion": said[-1:]}),
        "pair": ("dpo", {"prompt": said[:-1], "chosen": said[-1], "rejected": other["content"]}),
        "whole": ("dpo", {"chosen": said, "rejected": [*said[:-1], other]}),
    }
    recipe, row = rows[form]
    return recipe, {**row, **more}


@given(made=likely())
@settings(max_examples=600, deadline=None)
def test_a_row_that_somebody_means_is_canonical(made: tuple[Any, dict[str, Any]]) -> None:
    recipe, row = made
    found = canonical(row, 1, recipe, "auto")
    assert not isinstance(found, RowProblem), found
    kept: Any = json.loads(json.dumps(found))
    assert kept == found
    assert canonical(kept, 1, recipe, "auto") == found
    assert ("tools" in found) == bool(row.get("tools"))
