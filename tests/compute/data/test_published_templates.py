"""Every published chat template that TRL ships, with every kind of conversation: what it can render, trains.

What a template can render, and what is learnt, is found here with transformers and TRL alone.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template, has_generation_markers, supports_tool_calling

from llama_stack_provider_moe.compute.data.rendering import Rendered, Renderer, Tokens, Unrenderable
from llama_stack_provider_moe.spec.rows import Conversation
from tests.support.template_tokenizers import of_template, published

TEMPLATES = published()
Chat = list[dict[str, Any]]


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(number: int, port: str) -> dict[str, Any]:
    return {"type": "function", "id": f"call0000{number}", "function": {"name": "tide", "arguments": {"port": port}}}


PORT = {"type": "object", "properties": {"port": {"type": "string", "description": "a port"}}, "required": ["port"]}
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "High water", "parameters": PORT}}]
PLAIN = [said("user", "Which sea is it?"), said("assistant", "The Baltic.")]
MORE = [said("user", "And this one?"), said("assistant", "The Irish Sea.")]
CALLED = said("assistant", None, tool_calls=[call(1, "Brest")])
RESULT = said("tool", "noon", name="tide", tool_call_id="call00001")
BOTH = said("assistant", None, tool_calls=[call(1, "Brest"), call(2, "Kiel")])
RESULTS = [RESULT, said("tool", "dusk", name="tide", tool_call_id="call00002")]
CONVERSATIONS: dict[str, Chat] = {
    "one turn": PLAIN,
    "system": [said("system", "Be short."), *PLAIN],
    "two turns": [*PLAIN, *MORE],
    "reasoning": [
        PLAIN[0], {**PLAIN[1], "reasoning": "Low salt."}, MORE[0], {**MORE[1], "reasoning": "Near Wales."},
    ],
    "tool call": [PLAIN[0], CALLED, RESULT, MORE[1]],
    "parallel": [PLAIN[0], BOTH, *RESULTS, MORE[1]],
    "developer": [said("developer", "Be short."), *PLAIN],
}  # fmt: skip
# Pairs that train, of 41 templates; the others refuse such a conversation, or leave a part of it out.
TRAINED = {
    "one turn": 41, "system": 40, "two turns": 41, "reasoning": 37, "tool call": 28, "parallel": 25, "developer": 40
}  # fmt: skip


def spellings(chat: Chat, template: str) -> Iterator[Chat]:
    """The conversation in each way that templates take it; <think> tags only where a template names no reasoning."""
    named = re.search(r"reasoning_content|[.'\"](?:thinking|reasoning)\b", template)
    keys = ("reasoning_content", "thinking") if named else ("<think>",)
    nothing: tuple[str | None, ...] = (None, "")
    spelt = product((False, True), nothing, (False, True), ("developer", "system"), keys)
    for parts, empty, text, developer, key in spelt:
        made = []
        for message in chat:
            one = {name: value for name, value in message.items() if name != "reasoning"}
            if "reasoning" in message and key != "<think>":
                one[key] = message["reasoning"]
            elif "reasoning" in message:
                one["content"] = f"<think>\n{message['reasoning']}\n</think>\n\n{message['content']}"
            if one["role"] == "developer":
                one["role"] = developer
            if one["content"] is None:
                one["content"] = empty
            elif parts:
                one["content"] = [{"type": "text", "text": one["content"]}]
            if text and "tool_calls" in one:
                one["tool_calls"] = [
                    {**each, "function": {**each["function"], "arguments": json.dumps(each["function"]["arguments"])}}
                    for each in one["tool_calls"]
                ]
            made.append(one)
        yield made


def words(chat: Chat) -> Counter[str]:
    """What a rendering must contain, and how often."""
    found: Counter[str] = Counter(message["content"] for message in chat if message["content"])
    found.update(each["function"]["arguments"]["port"] for message in chat for each in message.get("tool_calls", ()))
    if "reasoning" in chat[-1]:
        found[chat[-1]["reasoning"]] += 1
    return found


def render(tokenizer: PreTrainedTokenizerFast, chat: Chat, template: str, tools: Any, **more: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(chat, tools=tools, chat_template=template, tokenize=False, **more)
    except (TemplateError, TypeError, AttributeError):
        return ""
    return text


def rendered_by(tokenizer: PreTrainedTokenizerFast, chat: Chat, template: str, tools: Any) -> Chat | None:
    """The first spelling of the conversation that the template renders whole."""
    for spelling in spellings(chat, tokenizer.chat_template):
        text = render(tokenizer, spelling, template, tools)
        if all(text.count(word) >= count for word, count in words(chat).items()):
            return spelling
    return None


def answers(chat: Chat) -> list[int]:
    return [index for index, message in enumerate(chat) if message["role"] == "assistant"]


def can(tokenizer: PreTrainedTokenizerFast, chat: Chat, templates: list[str], tools: Any) -> bool:
    """Whether a template renders the conversation up to each answer whole."""
    return all(
        any(rendered_by(tokenizer, chat[: index + 1], template, tools) for template in templates)
        for index in answers(chat)
    )


def runs(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    found: list[list[int]] = []
    for index, learnt in enumerate(tokens.said):
        if learnt and (index == 0 or not tokens.said[index - 1]):
            found.append([])
        if learnt:
            found[-1].append(tokens.ids[index])
    return [tokenizer.decode(run) for run in found]


def behind_prompt(tokenizer: PreTrainedTokenizerFast, chat: Chat, template: str, tools: Any) -> set[str]:
    """What the template renders behind its generation prompt, for each spelling of the conversation."""
    found = set()
    for spelling in spellings(chat, tokenizer.chat_template):
        before = render(tokenizer, spelling[:-1], template, tools, add_generation_prompt=True)
        whole = render(tokenizer, spelling, template, tools)
        if before and whole.startswith(before):
            found.add(whole[len(before) :].rstrip())
    return found


def by_marks(tokenizer: PreTrainedTokenizerFast, chat: Chat, marks: str, tools: Any, made: Tokens) -> None:
    spelling = rendered_by(tokenizer, chat, marks, tools)
    assert spelling is not None
    told = tokenizer.apply_chat_template(spelling, tools=tools, chat_template=marks, return_assistant_tokens_mask=True)
    assert made.ids == told["input_ids"]
    assert made.said == [bool(each) for each in told["assistant_masks"]]


def by_prompts(tokenizer: PreTrainedTokenizerFast, chat: Chat, tools: Any, made: list[Tokens]) -> None:
    """Each answer is what is rendered behind the prompt; a template without an own end leaves it to the next role."""
    learnt = [run for tokens in made for run in runs(tokens, tokenizer)]
    places = answers(chat)
    assert len(learnt) == len(places)
    for index, run in zip(places, learnt, strict=True):
        expected = behind_prompt(tokenizer, chat[: index + 1], tokenizer.chat_template, tools)
        assert run in expected or any(
            run.removeprefix(each) in tokenizer.added_tokens_encoder for each in expected if run.startswith(each)
        )


def rendered(renderer: Renderer, row: Conversation) -> tuple[list[Rendered], str]:
    try:
        return renderer.row(row), ""
    except Unrenderable as problem:
        return [], str(problem)


def trained(name: str, kind: str) -> str:
    """How the pair trains ("marks", "prompts"), or why not; asserts its labels."""
    tokenizer = of_template(TEMPLATES[name])
    try:
        training = get_training_chat_template(tokenizer)
    except ValueError:
        training = None
    own = TEMPLATES[name]
    marks = training or (own if has_generation_markers(own) else None)
    chat, tools = CONVERSATIONS[kind], TOOLS if kind in ("tool call", "parallel") else None
    row: Conversation = {"messages": chat}  # type: ignore[typeddict-item]
    if tools:
        row["tools"] = tools  # type: ignore[typeddict-item]
    able = can(tokenizer, chat, [own, *([training] if training else [])], tools)
    renderer = Renderer(tokenizer)
    rows, problem = rendered(renderer, row)
    assert able == bool(rows), f"{name}, {kind}: the template renders it: {able}; {problem or 'it trains'}"
    if not rows:
        return f"no: {problem}"
    assert renderer.row(row) == rows
    made = renderer.tokens(rows)
    if len(made) == 1 and marks:
        by_marks(tokenizer, chat, marks, tools, made[0])
    else:
        by_prompts(tokenizer, chat, tools, made)
    ends = set(renderer.ends())
    for tokens in made:
        last = len(tokens.said) - 1 - tokens.said[::-1].index(True)
        assert ends & set(tokens.ids[max(0, last - 2) : last + 1]), "the token that ends a turn is not learnt"
        assert tokens.ids.count(tokenizer.bos_token_id) <= 1
        assert tokenizer.pad_token_id not in tokens.ids
    return "marks" if len(made) == 1 and marks else "prompts"


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_what_a_published_template_renders_trains_with_its_labels(kind: str) -> None:
    found = {name: trained(name, kind) for name in TEMPLATES}
    for name, how in found.items():
        print(f"{name:24} {kind:10} {how[:110]}")
    assert len(found) == 41
    assert sum(how in ("marks", "prompts") for how in found.values()) == TRAINED[kind]


def test_a_prompt_is_what_is_sent_and_an_answer_to_it_is_learnt_alone() -> None:
    """For preference pairs and broken answers: the model's own template, not the one for training."""
    behind = 0
    for name, template in TEMPLATES.items():
        tokenizer = of_template(template)
        renderer = Renderer(tokenizer)
        asked: Conversation = {"messages": CONVERSATIONS["two turns"][:3]}  # type: ignore[typeddict-item]
        spelling = rendered_by(tokenizer, CONVERSATIONS["two turns"][:3], template, None)
        prompt = render(tokenizer, spelling or [], template, None, add_generation_prompt=True)
        assert renderer.prompt(asked).text == prompt
        made = renderer.answer(asked, CONVERSATIONS["two turns"][3:])  # type: ignore[arg-type]
        [run] = runs(renderer.tokens([made])[0], tokenizer)
        assert "The Irish Sea." in run, name
        assert "And this one?" not in run, name
        behind += made.text.startswith(prompt) and made.spans[0][0] == len(prompt)
    assert behind == 35  # the others open a thought in the prompt that they don't render for such an answer


def test_templates_that_trl_calls_fit_for_tools_train_a_tool_call() -> None:
    for name, template in TEMPLATES.items():
        if supports_tool_calling(of_template(template)):
            assert trained(name, "tool call") in ("marks", "prompts"), name
