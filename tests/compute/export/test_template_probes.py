"""The export's notes on what a reasoning or tool-calling model's chat template does and the Go template does not."""

from pathlib import Path

from llama_stack_provider_moe.compute.export.go_template import read_turns
from llama_stack_provider_moe.compute.export.ollama import modelfile
from tests.support import tiny_models
from tests.support.go_text import render

FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = FORGETS.replace(
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}", "{{ m.content | replace('think', 'T') }}"
)
APART = tiny_models.CHATML.replace(
    "message['content']", "(message.reasoning_content or '') + message['content']"
)  # fmt: skip
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + tiny_models.CHATML.replace(
    "'<|im_end|>\n'", "((message.tool_calls | tojson) if message.tool_calls else '') + '<|im_end|>\n'"
)


def notes(template: str) -> tuple[str, ...]:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    return read_turns(tokenizer).notes


def test_earlier_thinking_that_the_template_drops_is_told() -> None:
    assert notes(FORGETS) == (
        "the chat template drops the thinking (<think>) of earlier answers; this one keeps what a client sends back "
        "of it",
    )
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = FORGETS
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ]
    ours = render(read_turns(tokenizer).go(), history)
    assert "why" in ours, "the note is true"
    assert "why" not in str(tokenizer.apply_chat_template(history, tokenize=False))


def test_earlier_thinking_that_the_template_rewrites_is_told() -> None:
    assert notes(REWRITES) == (
        "the chat template renders the thinking (<think>) of earlier answers in another way than this one",
    )


def test_a_tokenizers_own_marks_of_thinking_are_probed() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    tokenizer.chat_template = FORGETS.replace("</think>", "[/THINK]")
    (note,) = read_turns(tokenizer).notes
    assert note.startswith("the chat template drops the thinking ([THINK]) of earlier answers")


def test_thinking_apart_from_the_answer_is_told() -> None:
    (note,) = notes(APART)
    assert note.startswith("the chat template renders thinking that is apart from the answer (reasoning_content)")


def test_tools_calls_and_results_are_told() -> None:
    told = notes(TOOLS)
    assert [note.partition("; ")[0] for note in told] == [
        "the chat template renders the request's tools",
        "the chat template renders earlier tool calls",
        "the chat template renders the results of tools",
    ]


def test_arguments_as_text_are_tried_too() -> None:
    told = notes(TOOLS.replace("message.tool_calls | tojson", "'call: ' + message.tool_calls[0].function.arguments"))
    assert len(told) == 3


def test_a_template_of_plain_turns_has_no_notes() -> None:
    assert notes(tiny_models.CHATML) == ()


def test_the_modelfile_has_the_notes(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = FORGETS
    tokenizer.save_pretrained(tmp_path)
    assert modelfile(tmp_path / "m.gguf", tmp_path).startswith("# the chat template drops the thinking (<think>)")
