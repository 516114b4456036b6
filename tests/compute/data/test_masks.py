"""Which tokens of a conversation are learnt, for templates of every kind; expected texts are written by hand."""

import pickle
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.rendering import (
    ONE_ANSWER,
    OWN_MARKS,
    PREFIXES,
    Renderer,
    Rendering,
    Tokens,
    Unrenderable,
)
from llama_stack_provider_moe.compute.data.shown import shown
from llama_stack_provider_moe.compute.models.chat_templates import default_template, set_template
from llama_stack_provider_moe.errors import ModelError
from tests.support.template_tokenizers import byte_level, of_template, published

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
NEXT_ROLE = (
    "[GM]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AT_THE_VERY_END = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
REWRITTEN = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = ["Hello", "Hi.", "Which sea?", "The Baltic."]


def chat(*texts: str) -> Any:
    """Messages of user and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]}


def chatml(template: Any = CHATML) -> PreTrainedTokenizerBase:
    return byte_level(template, SPECIALS, eos_token="<|im_end|>", pad_token="<|pad|>")


def runs(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The runs of learnt tokens, as text."""
    found: list[list[int]] = []
    for index, learnt in enumerate(tokens.said):
        if learnt and (index == 0 or not tokens.said[index - 1]):
            found.append([])
        if learnt:
            found[-1].append(tokens.ids[index])
    return [tokenizer.decode(run) for run in found]


def learnt(tokenizer: PreTrainedTokenizerBase, row: Any, first: int = 0, **settings: Any) -> list[list[str]]:
    """The learnt runs of each text that a row becomes."""
    renderer = Renderer(tokenizer, Rendering(**settings))
    return [runs(tokens, tokenizer) for tokens in renderer.tokens(renderer.row(row, first))]


def test_a_role_that_ends_the_turn_before_it_is_learnt() -> None:
    specials = ["<|endoftext|>", "[GM]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
    tokenizer = byte_level(NEXT_ROLE, specials, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    assert learnt(tokenizer, chat(*TALK)) == [
        ["\n<think></think>\nHi.<|user|>", "\n<think></think>\nThe Baltic.<|user|>"]
    ]
    renderer = Renderer(tokenizer)
    assert renderer.ends() == tokenizer.convert_tokens_to_ids(["<|user|>"])
    assert any("'<|user|>', with which the next message begins" in line for line in renderer.plan())


def test_earlier_answers_of_a_prompt_are_context() -> None:
    row = chat("7 x 8?", "54", "Check again.", "56")
    row["messages"][1]["weight"] = 0
    for template in (CHATML, MARKED):
        assert learnt(chatml(template), row) == [["56<|im_end|>"]]
        assert learnt(chatml(template), chat("7 x 8?", "54", "Check again.", "56"), first=2) == [["56<|im_end|>"]]
    with pytest.raises(Unrenderable, match="no message of the assistant is to be learnt"):
        learnt(chatml(), row, first=4)


def test_tools_are_rendered_or_the_row_is_refused() -> None:
    tools = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}]
    row: Any = {**chat("Tide?", "High."), "tools": tools}
    with_tools = chatml("{% if tools %}TOOLS{{ tools | tojson }}\n{% endif %}" + CHATML)
    [rendered] = Renderer(with_tools).row(row)
    assert rendered.text.startswith('TOOLS[{"type": "function", "function": {"name": "tide"')
    assert Renderer(with_tools).prompt(row).text.startswith("TOOLS")
    with pytest.raises(Unrenderable, match="leaves out `tools`"):
        Renderer(chatml()).row(row)


def test_a_conversation_may_begin_with_the_assistant_where_the_template_takes_it() -> None:
    row: Any = {"messages": chat("", "Good morning.", "Berth 4?", "Free.")["messages"][1:]}
    for template in (CHATML, MARKED):
        assert learnt(chatml(template), row) == [["Good morning.<|im_end|>", "Free.<|im_end|>"]]
    refusing = chatml("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML)
    with pytest.raises(Unrenderable, match=r"the chat template refuses the conversation \(user first\)"):
        learnt(refusing, row)


def test_variables_of_the_row_reach_the_template() -> None:
    tokenizer = chatml("{{ mood }}" + CHATML)
    row: Any = {**chat("A", "B"), "chat_template_kwargs": {"mood": "calm"}}
    assert Renderer(tokenizer).row(row)[0].text.startswith("calm<|im_start|>")
    assert Renderer(tokenizer).prompt(row).text.startswith("calm<|im_start|>")


def test_of_named_templates_default_is_taken_and_tool_use_for_tools() -> None:
    tokenizer = chatml({"default": CHATML, "tool_use": "T{% for t in tools %}{{ t.name }}{% endfor %}" + CHATML})
    set_template(tokenizer, None, "m")
    assert default_template(tokenizer) == CHATML
    assert learnt(tokenizer, chat(*TALK)) == [["Hi.<|im_end|>", "The Baltic.<|im_end|>"]]
    row: Any = {**chat("A", "B"), "tools": [{"name": "tide"}]}
    assert Renderer(tokenizer).row(row)[0].text.startswith("Ttide<|im")
    with pytest.raises(ModelError, match=r"several chat templates \(rag, tool_use\), none of them 'default'"):
        set_template(chatml({"rag": CHATML, "tool_use": CHATML}), None, "m")


def test_a_token_behind_the_whole_conversation_is_not_in_the_way() -> None:
    specials = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = byte_level(AT_THE_VERY_END, specials, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    assert learnt(tokenizer, chat(*TALK)) == [["Hi.<|end|>\n<|endoftext|>"], ["The Baltic.<|end|>\n<|endoftext|>"]]
    assert set(Renderer(tokenizer).ends()) == set(tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"]))


def test_a_template_that_rewrites_history_learns_one_answer_at_a_time() -> None:
    tokenizer = byte_level(REWRITTEN, ["<|endoftext|>", *SPECIALS], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    row = chat(*TALK)
    for message, thought in zip(row["messages"][1::2], ("Greet.", "Low salt."), strict=True):
        message["reasoning"] = thought
    answers = ["<think>\nGreet.\n</think>\n\nHi.<|im_end|>", "<think>\nLow salt.\n</think>\n\nThe Baltic.<|im_end|>"]
    assert learnt(tokenizer, row) == [[answer] for answer in answers]
    assert learnt(tokenizer, row, turns="last") == learnt(tokenizer, row, first=2) == [[answers[1]]]
    renderer = Renderer(tokenizer)
    before, after = renderer.row(row)
    assert before.text.endswith("Hi.<|im_end|>\n")
    assert after.text.startswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n")
    assert renderer.counts == {f"rows by {ONE_ANSWER}": 2}


def test_an_answer_without_the_thought_that_the_prompt_opens_is_learnt_behind_the_header() -> None:
    specials = ["<s>", "</s>", "<U>", "<A>", "<think>", "</think>"]
    tokenizer = byte_level(OPENED, specials, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    assert learnt(tokenizer, chat("Which sea?", "The Baltic.")) == [["The Baltic.</s>"]]
    assert learnt(tokenizer, chat("Which sea?", "<think>\nLow salt.\n</think>\n\nThe Baltic.")) == [
        ["Low salt.\n</think>\n\nThe Baltic.</s>"]
    ]
    thought = chat("Which sea?", "The Baltic.")
    thought["messages"][1]["reasoning"] = "Low salt."
    assert learnt(tokenizer, thought) == [["Low salt.\n</think>\n\nThe Baltic.</s>"]]


def test_a_prompt_that_adds_more_than_a_thought_is_not_guessed_at() -> None:
    tokenizer = chatml(CHATML.replace("assistant\n{% endif", "assistant\nSure! {% endif"))
    with pytest.raises(Unrenderable, match=r"generation prompt ends with 'Sure! '.*set options.chat_template"):
        learnt(tokenizer, chat("Which sea?", "The Baltic."))


def test_marks_that_leave_out_the_end_of_a_turn_are_made_longer() -> None:
    renderer = Renderer(chatml(MARKED))
    assert learnt(chatml(MARKED), chat(*TALK)) == [["Hi.<|im_end|>", "The Baltic.<|im_end|>"]]
    assert OWN_MARKS in renderer.plan()[0]
    assert PREFIXES in Renderer(chatml()).plan()[0]


def test_a_template_without_an_end_gets_the_end_of_sequence_token() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = byte_level(bare + "{% if add_generation_prompt %}assistant: {% endif %}", ["<e>", "<p>"],
                           eos_token="<e>", pad_token="<p>")  # fmt: skip
    assert learnt(tokenizer, chat(*TALK)) == [["Hi.<e>", "The Baltic.<e>"]]
    [rendered] = Renderer(tokenizer).row(chat(*TALK))
    assert rendered.text == "user: Hello\nassistant: Hi.<e>\nuser: Which sea?\nassistant: The Baltic.<e>\n"
    assert any("put behind each answer" in line for line in Renderer(tokenizer).plan())
    tokenizer.eos_token = None
    with pytest.raises(Unrenderable, match=r"no end-of-sequence token; set options.chat_template"):
        learnt(tokenizer, chat(*TALK))


def test_padding_does_not_end_a_turn() -> None:
    padded = CHATML.replace("<|im_end|>", "<|pad|>")
    assert learnt(chatml(padded), chat("A", "B")) == [["B<|pad|>\n<|im_start|>"]]  # with which the next turn begins
    assert Renderer(chatml(padded)).ends() == [chatml().convert_tokens_to_ids("<|im_start|>")]


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_the_named_templates_mark_every_answer(name: Any) -> None:
    tokenizer = byte_level(None, ["<s>", "</s>", "<pad>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    set_template(tokenizer, name, "m")
    renderer = Renderer(tokenizer)
    end = "<|im_end|></s>" if name == "chatml" else "</s>"
    assert learnt(tokenizer, chat(*TALK)) == [[f"Hi.{end}", f"The Baltic.{end}"]]
    assert OWN_MARKS in renderer.plan()[0]
    assert renderer.ends() == [tokenizer.eos_token_id]
    called = chat("A", "B")
    called["messages"][1]["tool_calls"] = [
        {"type": "function", "function": {"name": "tide", "arguments": {"port": "Kiel"}}}
    ]
    with pytest.raises(Unrenderable, match=r"leaves out the tool calls of message 2 \(assistant\)"):
        renderer.row(called)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("keep", ["<think>\nGreet.\n</think>\n\nHi.<|im_end|>", "<think>\nSalt.\n</think>\n\nThe Baltic.<|im_end|>"]),
        ("last", ["Hi.<|im_end|>", "<think>\nSalt.\n</think>\n\nThe Baltic.<|im_end|>"]),
        ("drop", ["Hi.<|im_end|>", "The Baltic.<|im_end|>"]),
    ],
)
def test_reasoning_is_kept_or_dropped(setting: Any, expected: list[str]) -> None:
    row = chat(*TALK)
    row["messages"][1]["reasoning"] = "Greet."
    row["messages"][3]["reasoning"] = "Salt."
    assert learnt(chatml(), row, reasoning=setting) == [expected]
    inline = chat("Hello", "<think>\nGreet.\n</think>\n\nHi.", "Which sea?", "<think>\nSalt.\n</think>\n\nThe Baltic.")
    assert learnt(chatml(), inline, reasoning=setting) == [expected]


def test_reasoning_that_no_template_renders_is_refused_with_a_way_out() -> None:
    cut = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    row = chat("A", "B")
    row["messages"][1]["reasoning"] = "Because."
    with pytest.raises(Unrenderable, match=r"message 2: .*reasoning of the answer; set options.reasoning to 'drop'"):
        learnt(chatml(cut), row)
    with pytest.raises(Unrenderable, match=r"options.reasoning"):
        learnt(chatml(cut), chat("A", "<think>Because.</think>B"))
    assert learnt(chatml(cut), row, reasoning="drop") == [["B<|im_end|>"]]


def test_a_message_that_a_template_leaves_out_is_an_error() -> None:
    silent = chatml(CHATML.replace("messages %}", "messages if m.role != 'system' %}"))
    row = chat("A", "B")
    row["messages"].insert(0, {"role": "system", "content": "Be short."})
    for render in (Renderer(silent).row, Renderer(silent).prompt):
        with pytest.raises(Unrenderable, match=r"leaves out the content of message 1 \(system\)"):
            render(row)


def test_words_of_an_earlier_message_behind_an_answer_are_not_learnt() -> None:
    late = CHATML.replace("messages %}", "messages if m.role != 'system' %}").replace(
        "{% if add", "{% if not add_generation_prompt %}{{ messages[0].content }}<|im_end|>{% endif %}{% if add"
    )
    row = chat("A", "B")
    row["messages"].insert(0, {"role": "system", "content": "Be short."})
    assert Renderer(chatml(late))._pair(row).own.dropped(row["messages"], None, {}) == []
    with pytest.raises(Unrenderable):
        learnt(chatml(late), row)


def test_developer_messages_become_system_messages_where_a_template_does_not_know_them() -> None:
    row = chat("A", "B")
    row["messages"].insert(0, {"role": "developer", "content": "Be short."})
    assert "<|im_start|>developer\nBe short." in Renderer(chatml()).row(row)[0].text
    deaf = chatml(CHATML.replace("messages %}", "messages if m.role != 'developer' %}"))
    assert "<|im_start|>system\nBe short." in Renderer(deaf).row(row)[0].text
    assert "developer messages: as system messages" in Renderer(deaf).plan()


def test_of_rows_for_each_answer_only_the_last_keeps_its_reasoning_if_so_set() -> None:
    tokenizer = byte_level(REWRITTEN, ["<|endoftext|>", *SPECIALS], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    row = chat(*TALK)
    row["messages"][1]["reasoning"], row["messages"][3]["reasoning"] = "Greet.", "Salt."
    empty, kept = learnt(tokenizer, row, reasoning="last")
    assert empty == ["<think>\n\n</think>\n\nHi.<|im_end|>"]
    assert kept == ["<think>\nSalt.\n</think>\n\nThe Baltic.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_each_answer_in_a_row_of_its_own(template: str) -> None:
    made = Renderer(chatml(template), Rendering(turns="each")).row(chat(*TALK))
    assert [text for text, *_ in made] == [
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n",
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nWhich sea?<|im_end|>\n<|im_start|>assistant\nThe Baltic.<|im_end|>\n",
    ]
    assert learnt(chatml(template), chat(*TALK), turns="each") == [["Hi.<|im_end|>"], ["The Baltic.<|im_end|>"]]


def test_an_answer_of_several_messages_is_learnt_without_the_results_between() -> None:
    tokenizer = of_template(published()["qwen2_5"])
    calls = [{"type": "function", "function": {"name": "tide", "arguments": {"port": "Kiel"}}}]
    answer: Any = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "At noon."},
    ]
    renderer = Renderer(tokenizer)
    [tokens] = renderer.tokens([renderer.answer(chat("Tide?"), answer)])
    first, last = runs(tokens, tokenizer)
    assert "Kiel" in first
    assert "noon" not in first
    assert last.strip() == "At noon.<|im_end|>"
    [tokens] = renderer.tokens([renderer.answer(chat("A", "B", "C"), chat("", "D")["messages"][1:])])
    assert runs(tokens, tokenizer) == ["D<|im_end|>"]


def test_a_tokenizer_that_adds_a_first_token_does_not_double_the_templates() -> None:
    tokenizer = of_template(published()["llama3"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("A")["input_ids"][0] == tokenizer.bos_token_id
    renderer = Renderer(tokenizer)
    for rendered in (*renderer.row(chat("A", "B")), renderer.prompt(chat("A")), renderer.text("A")):
        [tokens] = renderer.tokens([rendered])
        assert tokens.ids.count(tokenizer.bos_token_id) == 1
        assert tokens.ids[0] == tokenizer.bos_token_id


def test_a_renderer_that_another_process_gets_renders_the_same() -> None:
    for name in ("qwen3", "glm4moe", "gemma4"):
        renderer = Renderer(of_template(published()[name]))
        before = renderer.tokens(renderer.row(chat(*TALK)))
        other: Renderer = pickle.loads(pickle.dumps(renderer))  # noqa: S301 - made here
        assert other.tokens(other.row(chat(*TALK))) == before == renderer.tokens(renderer.row(chat(*TALK)))


def test_a_row_is_shown_on_one_line_with_what_is_learnt() -> None:
    tokenizer = chatml()
    renderer = Renderer(tokenizer)
    [tokens] = renderer.tokens(renderer.row(chat("A\x1b[2J", "é\u202e")))
    assert shown(tokens, tokenizer) == (
        "<|im_start|>user\\nA\\x1b[2J<|im_end|>\\n<|im_start|>assistant\\n⟦é\\u202e<|im_end|>⟧\\n"
    )
    [long] = renderer.tokens(renderer.row(chat("A" * 5000, "B")))
    short = shown(long, tokenizer, longest=300)
    assert len(short) < 400
    assert "characters ...]" in short
    assert short.endswith("⟦B<|im_end|>⟧\\n")


def test_an_answer_that_comes_first_and_cannot_be_placed_says_what_to_do() -> None:
    """As with SmolLM2's template, which begins a conversation with a system message, but not an empty one."""
    system = "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    renderer = Renderer(chatml(system + CHATML))
    with pytest.raises(Unrenderable, match="begin with a user's message, or give it weight 0"):
        renderer.row({"messages": [{"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]})
