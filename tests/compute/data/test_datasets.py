"""Rows to tokens: which tokens are learnt, cut and held out, and which rows are refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data import datasets
from llama_stack_provider_moe.compute.data.encoding import IGNORED
from llama_stack_provider_moe.compute.data.rendering import Renderer, _mark
from llama_stack_provider_moe.compute.data.sampling import EpochSampler, rows_a_step, rows_an_epoch, steps_an_epoch
from llama_stack_provider_moe.compute.models.chat_templates import set_template
from llama_stack_provider_moe.errors import DataError, ModelError
from llama_stack_provider_moe.spec import Training
from tests.support import tiny_models
from tests.support.rows_support import closed_logs, session
from tests.support.training_support import said

__all__ = ["closed_logs"]

VOCABULARY = tiny_models.VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_models.tokenizer()


CONVERSATION: list[Any] = [
    said("system", "The system is helpful."),
    said("user", "What is the capital of France?"),
    said("assistant", "Paris."),
    said("user", "  And of spring? "),
    said("assistant", "Äh… the garden 🌱"),
]


def learnt(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The sequences of tokens that have a label, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORED)
        if label == token:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_loss_is_taken_on_each_answer_and_its_end_and_on_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = datasets.sft_rows(session(tmp_path, [{"messages": CONVERSATION}]), tokenizer, VOCABULARY)
    assert learnt(rows.train[0], tokenizer) == ["Paris.<|im_end|>", "Äh… the garden 🌱<|im_end|>"]
    assert tokenizer.decode(rows.train[0]["input_ids"]) == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)


def test_a_template_that_ends_with_the_answer_teaches_its_last_token(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = tiny_models.CHATML.replace("'<|im_end|>\n'", "'<|im_end|>'")
    rows = datasets.sft_rows(session(tmp_path, [{"messages": CONVERSATION}]), tokenizer, VOCABULARY)
    assert rows.train[0]["labels"][-1] == tokenizer.eos_token_id
    assert learnt(rows.train[0], tokenizer) == ["Paris.<|im_end|>", "Äh… the garden 🌱<|im_end|>"]


def test_a_tokenizer_that_adds_its_own_first_token_adds_none_to_a_rendered_row(tmp_path: Path) -> None:
    """The template renders it already; with a second one the prompt would differ from the one that is served."""
    tokenizer = tiny_models.tokenizer()
    plain = datasets.sft_rows(session(tmp_path / "plain", [{"messages": CONVERSATION}]), tokenizer, VOCABULARY).train[0]
    first = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)]
    )
    assert tokenizer("A")["input_ids"][0] == first
    adding = datasets.sft_rows(session(tmp_path / "adding", [{"messages": CONVERSATION}]), tokenizer, VOCABULARY).train[
        0
    ]
    assert adding["input_ids"] == plain["input_ids"]


def test_text_after_an_answer_is_not_part_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = Renderer(tokenizer)
    [rendered] = renderer.row({"messages": [*CONVERSATION, said("user", "Thank you.")]})
    assert [rendered.text[start:end] for start, end in rendered.spans] == [
        "Paris.<|im_end|>", "Äh… the garden 🌱<|im_end|>",
    ]  # fmt: skip
    asked = renderer.prompt({"messages": CONVERSATION[:2]})
    assert asked.text == tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    assert asked.text.endswith("<|im_start|>assistant\n")
    assert not any(renderer.tokens([asked])[0].said)


def test_an_answer_without_a_token_marks_none() -> None:
    assert _mark([(0, 1), (1, 2)], [(2, 2)]) == [False, False]
    assert _mark([(0, 1), (1, 2)], [(1, 2)]) == [False, True]


def test_rows_of_an_earlier_start_are_gone_and_ids_are_stored_in_32_bits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = session(tmp_path, numbered(3))
    left = [
        Path(asked.cache) / name for name in ("left.arrow", "rows/train.000000.train.writing", "rows/train.000007.json")
    ]
    left[1].parent.mkdir(parents=True)
    for path in left:
        path.write_bytes(b"of a start that was killed")
    rows = datasets.sft_rows(asked, tokenizer, VOCABULARY)
    assert not any(path.exists() for path in left)
    assert {name: rows.train.features[name].feature.dtype for name in ("input_ids", "labels")} == {
        "input_ids": "int32", "labels": "int32",
    }  # fmt: skip


@pytest.mark.parametrize(("count", "share", "told"), [(1, 0.5, True), (1, 0, False), (4, 0.5, False)])
def test_a_split_that_holds_out_no_row_is_reported(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, count: int, share: float, told: bool
) -> None:
    asked = session(tmp_path, numbered(count), options={"validation_split": share})
    rows = datasets.sft_rows(asked, tokenizer, VOCABULARY)
    assert (rows.validation is None) == (count == 1 or share == 0)
    assert ("no row is held out" in asked.folder.events.read_text()) == told


def test_train_on_input_learns_every_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = session(tmp_path, [{"messages": CONVERSATION}], data={"dataset_id": "rows", "train_on_input": True})
    row = datasets.sft_rows(asked, tokenizer, VOCABULARY).train[0]
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_named_template_teaches_the_end_of_sequence_token(name: Any, tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*options.chat_template to one of chatml, plain"):
        set_template(tokenizer, None, "m")
    set_template(tokenizer, name, "m")
    rows = datasets.sft_rows(session(tmp_path, [{"messages": CONVERSATION}]), tokenizer, VOCABULARY)
    assert [text.endswith(tokenizer.eos_token) for text in learnt(rows.train[0], tokenizer)] == [True, True]


def test_long_rows_are_cut_counted_and_reported(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    short, long = [said("user", "A"), said("assistant", "B")], [said("user", "A"), said("assistant", "five " * 99)]
    asked = session(
        tmp_path, [{"messages": short}, {"messages": long}], options={"max_length": 40, "validation_split": 0}
    )
    rows = datasets.sft_rows(asked, tokenizer, VOCABULARY)
    assert rows.total.cut == 1
    assert [len(row["input_ids"]) for row in rows.train][1] == 40
    assert (
        "1 of 2 rows of 'rows' were longer than options.max_length = 40 tokens; their ends were cut"
        in asked.folder.events.read_text()
    )


def test_all_bad_rows_are_counted_and_the_first_twenty_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    same = {"prompt": [said("user", "A")], "chosen": [said("assistant", "B")], "rejected": [said("assistant", "B")]}
    asked = session(tmp_path, [same] * 33, recipe="dpo")
    with pytest.raises(
        DataError, match=r"33 row\(s\) can't be trained on: rows 1, 2, .*, 20: chosen and rejected"
    ) as raised:
        datasets.dpo_rows(asked, tokenizer, VOCABULARY)
    assert str(raised.value).endswith("; and 13 more")


def test_pairs_are_the_rendered_text_cut_where_the_answers_part(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt, answers = CONVERSATION[:2], {"chosen": "Paris.", "rejected": "A garden."}
    row = {"prompt": prompt, **{name: [said("assistant", text)] for name, text in answers.items()}}
    made = datasets.dpo_rows(session(tmp_path, [row], recipe="dpo"), tokenizer, VOCABULARY).train[0]
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(made["prompt_ids"]) == asked
    for name, text in answers.items():
        assert tokenizer.decode(made[f"{name}_ids"]) == f"{text}<|im_end|>"


def test_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"row 1: the tokenizer gives id \d+, but the model's embedding has 100 rows"):
        datasets.sft_rows(session(tmp_path, [{"messages": CONVERSATION}]), tokenizer, vocabulary=100)


def numbered(count: int) -> list[Any]:
    return [{"messages": [said("user", f"Row {i}?"), said("assistant", f"This is {i}.")]} for i in range(count)]


def prompts(rows: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(tokenizer.decode(row["input_ids"]).partition("Row ")[2].partition("?")[0]) for row in rows]


def test_split_is_by_seed_alone_and_loses_no_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = []
    for number, (seed, batch) in enumerate([(1, 4), (1, 9), (2, 4)]):
        options = {"validation_split": 0.1, "seed": seed}
        asked = session(tmp_path / str(number), numbered(50), options=options, training={"batch_size": batch})
        rows = datasets.sft_rows(asked, tokenizer, VOCABULARY)
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
    rows = datasets.sft_rows(asked, tokenizer, VOCABULARY)
    assert (len(rows.train), len(rows.validation or ())) == (10, 3)


def test_max_validation_steps_are_micro_batches(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = session(tmp_path, numbered(10), numbered(9), training={"batch_size": 2, "max_validation_steps": 3})
    rows = datasets.sft_rows(asked, tokenizer, VOCABULARY)
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


def test_an_upgrade_leaves_the_order_of_rows() -> None:
    """A job that a newer version resumes must see the rows that the older version has not yet used."""
    sampler = EpochSampler(8, 8, shuffle=True, seed=3)
    sampler.set_epoch(5)
    generator = torch.Generator().manual_seed(3 * 2**16 + 5)
    assert list(sampler) == torch.randperm(8, generator=generator).tolist()


def test_large_seeds_give_different_orders() -> None:
    """torch's generator reads 32 bits of a seed, of which the epoch takes 16."""
    orders = {tuple(EpochSampler(20, 20, shuffle=True, seed=seed)) for seed in (0, 2**16, 2**17, 2**31, 1, 2**16 + 1)}
    assert len(orders) == 6


def test_steps_of_several_processes() -> None:
    """2 processes with 4 rows, twice a step, are 16 rows; one process needs the same number of rows a step."""
    shared = Training(batch_size=4, gradient_accumulation_steps=2, max_steps_per_epoch=3)
    alone = Training(batch_size=8, gradient_accumulation_steps=2, max_steps_per_epoch=3)
    assert rows_a_step(shared) == 8
    assert rows_a_step(shared, 2) == rows_a_step(alone) == 16
    for rows in (15, 16, 17, 48, 49, 500):
        assert rows_an_epoch(shared, rows, 2) == rows_an_epoch(alone, rows) == min(rows, 48)
        assert steps_an_epoch(shared, rows, 2) == steps_an_epoch(alone, rows) == math.ceil(min(rows, 48) / 16)
