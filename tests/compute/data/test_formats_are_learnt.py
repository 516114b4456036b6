"""Each format from a file as people write it to what is learnt, with ChatML: text and learnt tokens by hand.

`⟦` and `⟧` stand around what has a loss. `S`, `U`, `A` begin a turn of the system, the user and the assistant.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.answers import DpoEncoder
from llama_stack_provider_moe.compute.data.encoding import Limit, SftEncoder
from llama_stack_provider_moe.compute.data.rendering import Rendering, Tokens
from llama_stack_provider_moe.compute.data.shown import shown
from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec import Recipe, RowFormat
from llama_stack_provider_moe.spec.row_files import RowFile
from llama_stack_provider_moe.spec.rows import CanonicalRow, RowsReport, canonical
from tests.contracts.doc_blocks import ROOT, blocks_of
from tests.support import tiny_models
from tests.support.template_tokenizers import published

S, U, A, END = "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
LIMIT = Limit(2048)

SFT: dict[str, tuple[str, str]] = {
    "messages": (
        """{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text",
        "text": "7 x"}, {"type": "text", "text": " 8?"}]}, {"role": "assistant", "content": "54", "weight": 0},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "56", "weight": 1}], "id": 3}""",
        f"{S}Be brief.{END}\n{U}7 x 8?{END}\n{A}54{END}\n{U}Sure?{END}\n{A}⟦56{END}⟧\n",
    ),
    "prompt_completion": (
        """{"prompt": [{"role": "user", "content": "7 x 8?"}, {"role": "assistant", "content": "54"},
        {"role": "user", "content": "Check again."}], "completion": "56"}""",
        f"{U}7 x 8?{END}\n{A}54{END}\n{U}Check again.{END}\n{A}⟦56{END}⟧\n",
    ),
    "llama_stack": (
        r"""{"chat_completion_input": "[{\"role\": \"user\", \"content\": \"7 x 8?\"}]", "expected_answer": "56"}""",
        f"{U}7 x 8?{END}\n{A}⟦56{END}⟧\n",
    ),
    "sharegpt": (
        """{"conversations": [{"from": "human", "value": "7 x 8?"}, {"from": "gpt", "value": "56"},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}], "system": "Be brief."}""",
        f"{S}Be brief.{END}\n{U}7 x 8?{END}\n{A}⟦56{END}⟧\n{U}Sure?{END}\n{A}⟦Yes.{END}⟧\n",
    ),
    "alpaca": (
        """{"instruction": "Add them.", "input": "7 and 8", "output": "15", "system": "Be brief.",
        "history": [["Ready?", "Yes."]]}""",
        f"{S}Be brief.{END}\n{U}Ready?{END}\n{A}⟦Yes.{END}⟧\n{U}Add them.\n7 and 8{END}\n{A}⟦15{END}⟧\n",
    ),
    "hh_rlhf": (
        r"""{"chosen": "\n\nHuman: Tide?\n\nAssistant: Where?\n\nHuman: Brest.\n\nAssistant: High at noon.",
        "rejected": "\n\nHuman: Tide?\n\nAssistant: No idea."}""",
        f"{U}Tide?{END}\n{A}⟦Where?{END}⟧\n{U}Brest.{END}\n{A}⟦High at noon.{END}⟧\n",
    ),
    "text": (r"""{"text": "Rivers run <|im_end|> to the sea.\n"}""", f"⟦Rivers run <|im_end|> to the sea.\n{END}⟧"),
}
# One prompt, and the two answers to it.
DPO: dict[str, tuple[str, str, str, str]] = {
    "preference": (
        """{"prompt": "7 x 8?", "chosen": "56", "rejected": [{"role": "assistant", "content": "No."}]}""",
        f"{U}7 x 8?{END}\n{A}", f"⟦56{END}⟧", f"⟦No.{END}⟧",
    ),
    "hh_rlhf": (
        r"""{"chosen": "\n\nHuman: Tide?\n\nAssistant: Where?\n\nHuman: Brest.\n\nAssistant: High at noon.",
        "rejected": "\n\nHuman: Tide?\n\nAssistant: Where?\n\nHuman: Brest.\n\nAssistant: No idea."}""",
        f"{U}Tide?{END}\n{A}Where?{END}\n{U}Brest.{END}\n{A}", f"⟦High at noon.{END}⟧", f"⟦No idea.{END}⟧",
    ),
    "alpaca": (
        """{"instruction": "Add them.", "input": "7 and 8", "chosen": "15", "rejected": "No."}""",
        f"{U}Add them.\n7 and 8{END}\n{A}", f"⟦15{END}⟧", f"⟦No.{END}⟧",
    ),
    "sharegpt": (
        """{"conversations": [{"from": "human", "value": "7 x 8?"}], "chosen": {"from": "gpt", "value": "56"},
        "rejected": {"from": "gpt", "value": "No."}, "system": "Be brief."}""",
        f"{S}Be brief.{END}\n{U}7 x 8?{END}\n{A}", f"⟦56{END}⟧", f"⟦No.{END}⟧",
    ),
    "openai_preference": (
        """{"input": {"messages": [{"role": "user", "content": "7 x 8?"}]},
        "preferred_output": [{"role": "assistant", "content": "56"}],
        "non_preferred_output": [{"role": "assistant", "content": "No."}]}""",
        f"{U}7 x 8?{END}\n{A}", f"⟦56{END}⟧", f"⟦No.{END}⟧",
    ),
    "whole conversations": (
        """{"chosen": [{"role": "user", "content": "7 x 8?"}, {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": "So?"}, {"role": "assistant", "content": "56"}],
        "rejected": [{"role": "user", "content": "7 x 8?"}, {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No."}]}""",
        f"{U}7 x 8?{END}\n{A}Hm.{END}\n{U}So?{END}\n{A}", f"⟦56{END}⟧", f"⟦No.{END}⟧",
    ),
}  # fmt: skip
CALL = '<tool_call>\n{"name": "tide", "arguments": {"port": "Brest"}}\n</tool_call>'
RESULT = f"{U}<tool_response>\n5 m\n</tool_response>{END}\n"
# With tools, by Qwen 2.5's template, whose marks in TRL begin behind the assistant's name and end behind the line.
TOOLS: dict[str, str] = {
    "OpenAI's": """{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tide?"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function", "function":
        {"name": "tide", "arguments": "{\\"port\\": \\"Brest\\"}"}}]}, {"role": "tool", "tool_call_id": "c1",
        "content": "5 m"}, {"role": "assistant", "content": "5 m."}]}""",
    "ShareGPT's": """{"conversations": [{"from": "human", "value": "Tide?"}, {"from": "function_call", "value":
        "{\\"name\\": \\"tide\\", \\"arguments\\": {\\"port\\": \\"Brest\\"}}"}, {"from": "observation", "value":
        "5 m"}, {"from": "gpt", "value": "5 m."}], "system": "Be brief."}""",
    "Hermes'": """{"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Tide?"},
        {"from": "gpt", "value": "<tool_call>{\\"name\\": \\"tide\\", \\"arguments\\": {\\"port\\": \\"Brest\\"}}
        </tool_call>"}, {"from": "tool", "value": "<tool_response>5 m</tool_response>"},
        {"from": "gpt", "value": "5 m."}]}""",
}


def rows_of(path: Path, row: str, recipe: Recipe, row_format: RowFormat) -> tuple[list[CanonicalRow], RowsReport]:
    """The canonical rows of a file that has the row twice."""
    line = " ".join(row.replace("\n", " ").split()).encode() + b"\n"
    path.write_bytes(line * 2)
    file, report, found = RowFile(path.name), RowsReport(), []

    def read() -> Iterator[Any]:
        yield from file.feed(path.read_bytes())
        yield from file.finish()

    for each in read():
        made = canonical(each.content, each.number, recipe, row_format, report=report)
        assert not isinstance(made, RowProblem), made
        found.append(json.loads(json.dumps(made)))  # as the job's folder has it
    return found, report


def marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], said: Sequence[object]) -> str:
    runs = groupby(zip(ids, said, strict=True), key=lambda each: bool(each[1]))
    texts = [(learnt, tokenizer.decode([token for token, _ in run])) for learnt, run in runs]
    return "".join(f"⟦{text}⟧" if learnt else text for learnt, text in texts)


def learnt_of(rows: list[CanonicalRow], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = []
    for pieces in SftEncoder(tokenizer, Rendering(), LIMIT)(rows):
        assert isinstance(pieces, list), pieces
        [piece] = pieces
        columns = piece.columns
        found.append(marked(tokenizer, columns["input_ids"], [label != -100 for label in columns["labels"]]))
        assert all(label in (-100, token) for token, label in zip(*columns.values(), strict=True))
    return found


@pytest.mark.parametrize("name", SFT)
def test_a_conversation_or_text(name: RowFormat, tmp_path: Path) -> None:
    row, expected = SFT[name]
    rows, report = rows_of(tmp_path / "rows.jsonl", row, "sft", name if name == "hh_rlhf" else "auto")
    assert report.formats == {name: 2}
    assert learnt_of(rows, tiny_models.tokenizer()) == [expected] * 2


@pytest.mark.parametrize("name", DPO)
def test_a_pair_of_answers(name: str, tmp_path: Path) -> None:
    row, prompt, *answers = DPO[name]
    rows, report = rows_of(tmp_path / "rows.jsonl", row, "dpo", "auto")
    assert report.formats == {"preference" if name == "whole conversations" else name: 2}
    tokenizer = tiny_models.tokenizer()
    for pieces in DpoEncoder(tokenizer, Rendering(), LIMIT)(rows):
        assert isinstance(pieces, list), pieces
        columns = pieces[0].columns
        assert tokenizer.decode(columns["prompt_ids"]) == prompt
        said = [
            marked(tokenizer, columns[f"{which}_ids"], columns[f"{which}_said"]) for which in ("chosen", "rejected")
        ]
        assert said == answers


@pytest.mark.parametrize("name", TOOLS)
def test_calls_of_tools_and_their_results(name: str, tmp_path: Path) -> None:
    rows, report = rows_of(tmp_path / "rows.jsonl", TOOLS[name], "sft", "auto")
    assert report.notes.get("tool calls read from text", 0) == (2 if name == "Hermes'" else 0)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = published()["qwen2_5"]
    begin = A.rstrip("\n")
    expected = f"{S}Be brief.{END}\n{U}Tide?{END}\n{begin}⟦\n{CALL}{END}\n⟧{RESULT}{begin}⟦\n5 m.{END}\n⟧"
    assert learnt_of(rows, tokenizer) == [expected] * 2


def test_an_answer_of_a_pair_with_a_call_and_its_result(tmp_path: Path) -> None:
    row = """{"prompt": "Tide?", "rejected": "No.", "chosen": [{"role": "assistant", "content":
        "<tool_call>{\\"name\\": \\"tide\\", \\"arguments\\": {\\"port\\": \\"Brest\\"}}</tool_call>"},
        {"role": "tool", "content": "5 m"}, {"role": "assistant", "content": "5 m."}], "system": "Be brief."}"""
    rows, _ = rows_of(tmp_path / "rows.jsonl", row, "dpo", "auto")
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = published()["qwen2_5"]
    [pieces, _] = DpoEncoder(tokenizer, Rendering(), LIMIT)(rows)
    assert isinstance(pieces, list), pieces
    columns = pieces[0].columns
    assert tokenizer.decode(columns["prompt_ids"]) == f"{S}Be brief.{END}\n{U}Tide?{END}\n{A}"
    assert marked(tokenizer, columns["chosen_ids"], columns["chosen_said"]) == (
        f"⟦{CALL}{END}⟧\n{RESULT}{A}⟦5 m.{END}⟧"
    )
    assert marked(tokenizer, columns["rejected_ids"], columns["rejected_said"]) == f"⟦No.{END}⟧"


def test_the_guides_example_is_what_a_log_shows() -> None:
    blocks = list(blocks_of(ROOT / "docs" / "guides" / "data.md"))
    at = next(index for index, block in enumerate(blocks) if "⟦" in block.text)
    row = canonical(json.loads(blocks[at - 1].text), 1, "sft", "auto")
    assert not isinstance(row, RowProblem)
    [pieces] = SftEncoder(tiny_models.tokenizer(), Rendering(), LIMIT)([row])
    assert isinstance(pieces, list)
    ids, labels = pieces[0].columns["input_ids"], pieces[0].columns["labels"]
    assert shown(Tokens(ids, [label != -100 for label in labels]), tiny_models.tokenizer()) == blocks[at].text
