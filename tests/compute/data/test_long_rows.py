"""Rows that are too long: cut on either side, left out up to a share, or refused; and what is reported of them."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.breaker_rows import breaker_rows
from llama_stack_provider_moe.compute.data.datasets import Rows, dpo_rows, sft_rows
from llama_stack_provider_moe.compute.data.encoding import IGNORED
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.errors import DataError
from tests.support import tiny_models
from tests.support.rows_support import closed_logs, session
from tests.support.training_support import Workshop, said, workshop

__all__ = ["closed_logs", "workshop"]

VOCABULARY = tiny_models.VOCAB_SIZE
LENGTH = 60


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_models.tokenizer()


def fine(number: int) -> Any:
    return {"messages": [said("user", f"Row {number}?"), said("assistant", f"This is {number}.")]}


def no_room(number: int) -> Any:
    return {"messages": [said("user", f"Row {number}? " + "five " * 99), said("assistant", "B")]}


def long_answer(*before: Any) -> Any:
    return {"messages": [*before, said("user", "Count."), said("assistant", "five " * 99 + "end")]}


def made(root: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], **options: Any) -> tuple[Rows, str]:
    asked = session(root, rows, options={"max_length": LENGTH, "validation_split": 0, **options})
    return sft_rows(asked, tokenizer, VOCABULARY), asked.folder.events.read_text()


def among(bad: list[int], total: int, row: Any = no_room) -> list[Any]:
    return [row(i) if i + 1 in bad else fine(i) for i in range(total)]


@pytest.mark.parametrize("truncate", ["right", "drop"])
def test_a_few_rows_without_room_for_an_answer_are_left_out_and_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, truncate: str
) -> None:
    """4 of 100: they used to end the job."""
    bad = [3, 50, 51, 99]
    rows, events = made(tmp_path, tokenizer, among(bad, 100), truncate=truncate)
    assert len(rows.train) == 96
    (dropped,) = rows.counts["train"].dropped.named.values()
    assert (dropped.count, dropped.rows) == (4, bad)
    assert (rows.total.source, rows.total.encoded, rows.total.cut) == (100, 96, 0)
    assert (
        "4 of 100 rows of 'rows' were left out (4.0%; options.max_dropped allows 5.0%): rows 3, 50, 51, 99: " in events
    )
    numbers = [tokenizer.decode(row["input_ids"]).partition("This is ")[2].partition(".")[0] for row in rows.train]
    assert numbers == [str(i) for i in range(100) if i + 1 not in bad]


def test_beyond_the_share_the_job_ends_and_says_what_to_change(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    bad = list(range(1, 31))
    with pytest.raises(DataError) as raised:
        made(tmp_path / "a", tokenizer, among(bad, 100))
    text = str(raised.value)
    assert text.startswith(
        "dataset 'rows': 30 of 100 rows (30.0%) would be left out, more than options.max_dropped = 0.05 allows: rows "
        "1, 2, "
    )
    assert "20: no token to learn within options.max_length = 60; and 10 more. Raise options.max_length" in text
    rows, _ = made(tmp_path / "b", tokenizer, among(bad, 100), max_dropped=0.3)
    assert len(rows.train) == 70


def test_without_a_row_left_the_job_ends(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="no row is left to train on"):
        made(tmp_path, tokenizer, among([1, 2], 2), max_dropped=1)


def test_held_out_rows_may_all_be_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = session(tmp_path, among([], 4), [no_room(1)], options={"max_length": LENGTH, "max_dropped": 1})
    rows = sft_rows(asked, tokenizer, VOCABULARY)
    assert rows.validation is None
    assert "every held-out row was left out; no row is held out" in asked.folder.events.read_text()


def test_refuse_names_the_row_and_its_length(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        DataError, match=r"1 row\(s\) can't be trained on: row 2: has \d+ tokens, more than options.max_"
    ):
        made(tmp_path, tokenizer, [fine(0), long_answer(), fine(1)], truncate="refuse", max_dropped=1)


def test_a_row_that_the_template_refuses_is_never_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    refusing = tiny_models.tokenizer()
    refusing.chat_template = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + (
        tiny_models.CHATML
    )
    row = {"messages": [said("user", "no"), said("assistant", "B")]}
    with pytest.raises(DataError, match=r"1 row\(s\) can't be trained on: row 2: the chat template refuses"):
        made(tmp_path, refusing, [fine(0), row, *among([], 98)], max_dropped=1)


def test_left_keeps_the_end_and_its_first_token_is_not_learnt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, events = made(tmp_path, tokenizer, [long_answer(said("system", "Be kind.")), fine(1)], truncate="left")
    row = rows.train[0]
    whole = tokenizer.apply_chat_template(long_answer(said("system", "Be kind."))["messages"])["input_ids"]
    assert row["input_ids"] == whole[-LENGTH:]
    assert tokenizer.decode([t for t in row["labels"] if t != IGNORED]).endswith("five end<|im_end|>")
    assert row["labels"][0] == IGNORED
    assert (
        "1 of 2 rows of 'rows' were longer than options.max_length = 60 tokens; their beginnings were cut off, 1 of"
        in (events)
    )
    assert "with a system message" in events
    assert (rows.total.cut, rows.total.system_cut) == (1, 1)


def test_left_keeps_the_first_token_of_a_text(tmp_path: Path) -> None:
    beginning = tiny_models.tokenizer()
    beginning.bos_token = "<|im_start|>"
    beginning.chat_template = "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ m.role }}: " + (
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows, _ = made(tmp_path, beginning, [long_answer()], truncate="left")
    row = rows.train[0]
    assert len(row["input_ids"]) == LENGTH
    assert row["input_ids"][0] == beginning.bos_token_id
    assert row["labels"][:2] == [IGNORED, IGNORED], "what stood before the second token is gone"
    assert row["labels"][2:] == row["input_ids"][2:]


def pair(prompt: str, chosen: str, rejected: str) -> Any:
    return {
        "prompt": [said("system", "Be kind."), said("user", prompt)],
        "chosen": [said("assistant", chosen)],
        "rejected": [said("assistant", rejected)],
    }


def pairs(root: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], **options: Any) -> tuple[Rows, str]:
    asked = session(root, rows, recipe="dpo", options={"max_length": LENGTH, "validation_split": 0, **options})
    return dpo_rows(asked, tokenizer, VOCABULARY), asked.folder.events.read_text()


def test_pairs_without_room_or_difference_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [pair(f"Row {i}?", "Yes.", "No.") for i in range(60)]
    rows[6] = pair("five " * 99, "Yes.", "No.")
    rows[8] = pair("Count.", "five " * 99 + "a", "five " * 99 + "b")
    found, events = pairs(tmp_path, tokenizer, rows)
    assert len(found.train) == 58
    assert found.counts["train"].dropped.count == 2
    assert (
        "row 7: its prompt leaves no room for an answer in options.max_length = 60 tokens; row 9: chosen and" in events
    )


def test_left_cuts_the_beginning_of_a_pairs_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = pair("five " * 99 + "now?", "Yes, certainly.", "No.")
    found, events = pairs(tmp_path / "a", tokenizer, [row], truncate="left")
    (made,) = found.train
    assert len(made["prompt_ids"]) + max(len(made["chosen_ids"]), len(made["rejected_ids"])) == LENGTH
    assert tokenizer.decode(made["prompt_ids"]).endswith("now?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(made["chosen_ids"]) == "Yes, certainly.<|im_end|>"
    assert "1 of them with a system message" in events
    with pytest.raises(DataError, match="its answers leave no room for a prompt"):
        pairs(tmp_path / "b", tokenizer, [pair("Count.", "five " * 99, "No.")], truncate="left")


def test_equal_answers_are_refused_at_any_share(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="can't be trained on: row 1: chosen and rejected do not differ"):
        pairs(tmp_path, tokenizer, [pair("A", "B", "B"), pair("A", "B", "C")], max_dropped=1)


def test_retained_rows_without_room_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = session(
        tmp_path, among([], 3), recipe="circuit_breaker", circuit_breaker={"retain": {"dataset_id": "kept"}},
        options={"max_length": LENGTH, "validation_split": 0},
    )  # fmt: skip
    kept = session(tmp_path / "kept", among([5], 40))
    asked.folder.rows("retain").write_bytes(kept.folder.train_rows.read_bytes())
    rows = breaker_rows(asked, tokenizer, VOCABULARY)
    assert len(rows.train.sets["retain"]) == 39
    assert rows.counts["retain"].dropped.named.popitem()[1].rows == [5]
    assert rows.counts["train"].dropped.count == 0
    assert "1 of 40 rows of 'kept' were left out" in asked.folder.events.read_text()


def test_one_row_for_each_answer_stays_in_one_part(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The split is of source rows, and each row of the trainer ends with its answer."""
    source = [
        {"messages": [*fine(i)["messages"], said("user", f"Again {i}?"), said("assistant", f"Once more {i}.")]}
        for i in range(20)
    ]
    rows, _ = made(tmp_path, tokenizer, source, turns="each", validation_split=0.25, max_length=200)
    assert rows.validation is not None
    assert (len(rows.train), len(rows.validation)) == (30, 10)
    assert (rows.total.source, rows.total.encoded) == (20, 40)
    for part in (rows.train, rows.validation):
        texts = [tokenizer.decode([t for t in row["labels"] if t != IGNORED]) for row in part]
        for first, second in zip(texts[::2], texts[1::2], strict=True):
            number = first.removeprefix("This is ").removesuffix(".<|im_end|>")
            assert second == f"Once more {number}.<|im_end|>"


def test_an_answer_without_room_does_not_lose_the_others(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [*fine(1)["messages"], said("user", "five " * 99), said("assistant", "B")]}
    rows, _ = made(tmp_path, tokenizer, [row], turns="each")
    assert (len(rows.train), rows.total.cut, rows.total.dropped.count) == (1, 1, 0)


@pytest.mark.parametrize("begins", [True, False])
def test_plain_text_is_learnt_whole(tmp_path: Path, begins: bool) -> None:
    tokenizer = tiny_models.tokenizer()
    if begins:
        tokenizer.bos_token = "<|im_start|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
        )
    rows, _ = made(tmp_path, tokenizer, [{"text": "The garden in spring."}, {"text": "five " * 99}])
    row = rows.train[0]
    text = f"{'<|im_start|>' if begins else ''}The garden in spring.<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == text
    assert row["labels"] == row["input_ids"]
    assert (rows.total.texts, rows.total.cut) == (2, 1)
    assert len(rows.train[1]["input_ids"]) == LENGTH


def test_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{{ tools | length if tools else 'no' }} tools, {{ mood }}." + tiny_models.CHATML
    row = {**fine(1), "tools": [{"type": "function"}], "chat_template_kwargs": {"mood": "kind"}}
    rows, _ = made(tmp_path, tokenizer, [row, fine(2)])
    texts = [tokenizer.decode(each["input_ids"]).partition("<|")[0] for each in rows.train]
    assert texts == ["1 tools, kind.", "no tools, ."]


def test_a_job_shows_its_first_row_and_counts(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*(fine(i) for i in range(29)), no_room(29)]
    run = workshop.run("sft", "mixtral", rows, options={"max_length": LENGTH})
    assert run.exit_code == COMPLETED, run.reason
    assert (run.resolved["source_rows"], run.resolved["dropped_rows"]) == (34, 1)
    output = capsys.readouterr().out
    assert r"<|im_start|>user\nRow 0?<|im_end|>\n<|im_start|>assistant\n⟦This is 0.<|im_end|>⟧\n" in output
    assert "rows      29 to train on, 4 held out, 0 cut at 60 tokens, 1 left out" in output
