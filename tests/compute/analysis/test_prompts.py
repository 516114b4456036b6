"""Rows of a routing analysis: what is rendered, and which tokens count."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.analysis.routing_run import _counted, read_prompts
from llama_stack_provider_moe.compute.data.rendering import Tokens
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support import tiny_models
from tests.support.training_support import said


def read(folder: Path, rows: list[Any], template: str = tiny_models.CHATML, **options: Any) -> tuple[list[str], str]:
    """The rows' texts, and what was said."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec: Any = JOB_SPEC.validate_python(
        {"recipe": "routing_analysis", "model": "m", "data": {"sets": {"a": "a", "b": "b"}}, "options": options}
    )
    tokenizer, told = tiny_models.tokenizer(), list[str]()
    tokenizer.chat_template = template
    found = read_prompts(
        path, "a", spec.analysis.tokens, spec.options.max_length, tokenizer, tiny_models.VOCAB_SIZE, told.append
    )
    return [tokenizer.decode(prompt.ids) for prompt in found], "; ".join(told)


ASKED = [said("user", "A")]


def test_texts_tools_and_prompts_are_rendered(tmp_path: Path) -> None:
    template = "{{ tools | length if tools else 'no' }} tools " + tiny_models.CHATML
    rows = [
        {"messages": ASKED, "tools": [{"type": "function"}]},
        {"messages": [*ASKED, said("assistant", "B")]},
        {"text": "The garden."},
    ]
    texts, told = read(tmp_path, rows, template)
    assert texts == [
        "1 tools <|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        "no tools <|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
        "The garden.<|im_end|>",
    ]
    assert told == ""


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    texts, told = read(tmp_path, [{"text": "five " * 99}, {"text": "A"}], max_length=20)
    assert len(texts) == 2
    assert told == "1 of 2 rows of 'a' were longer than options.max_length = 20 tokens; cut off"


def test_rows_that_a_template_refuses_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 row\(s\) can't be used: row 2: the chat template refuses"):
        read(
            tmp_path, [{"messages": ASKED}, {"messages": [said("user", "no")]}],
            "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + tiny_models.CHATML,
        )  # fmt: skip


def test_what_texts_of_one_row_have_in_common_counts_once() -> None:
    first = Tokens([1, 2, 3], [False, False, True])
    second = Tokens([1, 2, 9, 4, 5], [False, False, False, False, True])
    assert _counted([first, second], 99, "all") == [
        Prompt([1, 2, 3], [True, True, True]),
        Prompt([1, 2, 9, 4, 5], [False, False, True, True, True]),
    ]
    assert _counted([first, second], 99, "response")[1].counts == [False, False, False, False, True]
    assert len(_counted([first, second], 2, "response")) == 0
