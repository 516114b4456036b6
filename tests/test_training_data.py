"""Rows to tokens: what is learnt from, what is cut, what is held out, which rows are refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.errors import DataError, ModelError
from llama_stack_provider_moe.jobs.events import EventLog
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.spec import JOB_SPEC, Training
from llama_stack_provider_moe.training import data
from llama_stack_provider_moe.training.chat_templates import set_template
from llama_stack_provider_moe.training.sampling import EpochSampler, rows_an_epoch, steps_an_epoch
from llama_stack_provider_moe.training.session import Session
from tests import tiny_models
from tests.training_support import said

VOCABULARY = tiny_models.VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_models.tokenizer()


def session(root: Path, rows: list[Any], validation: list[Any] | None = None, **body: Any) -> Session[Any]:
    folder = JobFolder(root / "job")
    folder.data.mkdir(parents=True)
    folder.train_rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = {"recipe": "sft", "model": "m", "data": {"dataset_id": "rows"}, "options": {"validation_split": 0}, **body}
    if validation is not None:
        folder.validation_rows.write_text("".join(json.dumps(row) + "\n" for row in validation), encoding="utf-8")
        asked["data"]["validation_dataset_id"] = "others"
    log = EventLog(folder.events)
    OPEN.append(log)
    return Session(JOB_SPEC.validate_python(asked), folder, log)


OPEN: list[EventLog] = []


@pytest.fixture(autouse=True)
def closed_logs() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


CONVERSATION = [
    said("system", "The system is helpful."),
    said("user", "What is the capital of France?"),
    said("assistant", "Paris."),
    said("user", "  And of spring? "),
    said("assistant", "Äh… the garden 🌱"),
]


def learnt(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The runs of tokens that have a label, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, data.IGNORED)
        if label == token:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_loss_is_taken_on_each_answer_and_its_end_and_on_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = data.sft_rows(session(tmp_path, [{"messages": CONVERSATION}]), tokenizer, VOCABULARY)
    assert learnt(rows.train[0], tokenizer) == ["Paris.<|im_end|>", "Äh… the garden 🌱<|im_end|>"]
    assert tokenizer.decode(rows.train[0]["input_ids"]) == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)


def test_train_on_input_learns_every_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = session(tmp_path, [{"messages": CONVERSATION}], data={"dataset_id": "rows", "train_on_input": True})
    row = data.sft_rows(asked, tokenizer, VOCABULARY).train[0]
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_named_template_teaches_the_end_of_sequence_token(name: Any, tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*options.chat_template, one of chatml, plain"):
        set_template(tokenizer, None, "m")
    set_template(tokenizer, name, "m")
    rows = data.sft_rows(session(tmp_path, [{"messages": CONVERSATION}]), tokenizer, VOCABULARY)
    assert [text.endswith(tokenizer.eos_token) for text in learnt(rows.train[0], tokenizer)] == [True, True]


def test_long_rows_are_cut_counted_and_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    short, long = [said("user", "A"), said("assistant", "B")], [said("user", "A"), said("assistant", "five " * 99)]
    asked = session(
        tmp_path, [{"messages": short}, {"messages": long}], options={"max_length": 40, "validation_split": 0}
    )
    rows = data.sft_rows(asked, tokenizer, VOCABULARY)
    assert rows.truncated == 1
    assert [len(row["input_ids"]) for row in rows.train][1] == 40
    assert "1 of 2 rows were longer than options.max_length = 40 tokens" in asked.folder.events.read_text()


def test_row_whose_answer_is_cut_off_is_refused_by_number(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    fine = {"messages": [said("user", "A"), said("assistant", "B")]}
    lost = {"messages": [said("user", "five " * 99), said("assistant", "B")]}
    with pytest.raises(
        DataError, match=r"dataset 'rows': 1 row\(s\).* row 3: no token to learn is left within options"
    ):
        data.sft_rows(
            session(tmp_path, [fine, fine, lost], options={"max_length": 40, "validation_split": 0}),
            tokenizer,
            VOCABULARY,
        )


def test_all_bad_rows_are_counted_and_the_first_twenty_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    same = {"prompt": [said("user", "A")], "chosen": [said("assistant", "B")], "rejected": [said("assistant", "B")]}
    asked = session(tmp_path, [same] * 33, recipe="dpo")
    with pytest.raises(
        DataError, match=r"33 row\(s\) can't be trained on: rows 1, 2, .*, 20: chosen and rejected"
    ) as raised:
        data.dpo_rows(asked, tokenizer, VOCABULARY)
    assert str(raised.value).endswith("; and 13 more")


def test_pairs_are_the_rendered_text_cut_where_the_answers_part(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt, answers = CONVERSATION[:2], {"chosen": "Paris.", "rejected": "A garden."}
    row = {"prompt": prompt, **{name: [said("assistant", text)] for name, text in answers.items()}}
    made = data.dpo_rows(session(tmp_path, [row], recipe="dpo"), tokenizer, VOCABULARY).train[0]
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(made["prompt_ids"]) == asked
    for name, text in answers.items():
        assert tokenizer.decode(made[f"{name}_ids"]) == f"{text}<|im_end|>"


def test_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"row 1: the tokenizer gives id \d+, but the model's embedding has 100 rows"):
        data.sft_rows(session(tmp_path, [{"messages": CONVERSATION}]), tokenizer, vocabulary=100)


def numbered(count: int) -> list[Any]:
    return [{"messages": [said("user", f"Row {i}?"), said("assistant", f"This is {i}.")]} for i in range(count)]


def prompts(rows: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(tokenizer.decode(row["input_ids"]).partition("Row ")[2].partition("?")[0]) for row in rows]


def test_split_is_by_seed_alone_and_loses_no_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = []
    for number, (seed, batch) in enumerate([(1, 4), (1, 9), (2, 4)]):
        options = {"validation_split": 0.1, "seed": seed}
        asked = session(tmp_path / str(number), numbered(50), options=options, training={"batch_size": batch})
        rows = data.sft_rows(asked, tokenizer, VOCABULARY)
        assert rows.validation is not None
        train, held_out = prompts(rows.train, tokenizer), prompts(rows.validation, tokenizer)
        assert len(held_out) == 5
        assert sorted(train + held_out) == list(range(50))
        found.append(held_out)
    assert found[0] == found[1] != found[2]


def test_validation_data_set_is_used_whole_and_instead_of_a_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = session(tmp_path, numbered(10), numbered(3), options={"validation_split": 0.5})
    rows = data.sft_rows(asked, tokenizer, VOCABULARY)
    assert (len(rows.train), len(rows.validation or ())) == (10, 3)


def test_max_validation_steps_are_micro_batches(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = session(tmp_path, numbered(10), numbered(9), training={"batch_size": 2, "max_validation_steps": 3})
    rows = data.sft_rows(asked, tokenizer, VOCABULARY)
    assert rows.validation is not None
    assert prompts(rows.validation, tokenizer) == [0, 1, 2, 3, 4, 5]


def test_an_epochs_rows_are_drawn_from_seed_and_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        drawn = []
        for epoch in range(3):
            sampler = EpochSampler(20, 20, shuffle=True, seed=seed)
            sampler.set_epoch(epoch)
            drawn.append(list(sampler))
        return drawn

    one, again, other = epochs(1), epochs(1), epochs(2)
    assert one == again
    assert len({tuple(order) for order in one + other}) == 6
    assert all(sorted(order) == list(range(20)) for order in one)
    assert list(EpochSampler(20, 6, shuffle=False, seed=1)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "cap", "steps"),
    [(16, 8, 1, 0, 2), (17, 8, 1, 0, 3), (17, 8, 2, 0, 2), (100, 8, 2, 3, 3), (10, 8, 2, 3, 1), (7, 8, 1, 9, 1)],
)
def test_steps_of_an_epoch(rows: int, batch: int, accumulation: int, cap: int, steps: int) -> None:
    training = Training(batch_size=batch, gradient_accumulation_steps=accumulation, max_steps_per_epoch=cap)
    assert steps_an_epoch(training, rows) == steps
    assert rows_an_epoch(training, rows) <= rows
