"""Property: of a conversation, exactly the answers that are to be learnt have labels, in every published template.

TRL's own mask of the whole conversation, by its training template, says which tokens an answer has.
"""

from collections.abc import Sequence
from itertools import groupby, product
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llama_stack_provider_moe.compute.data.rendering import Renderer, Rendering, Tokens
from tests.compute.data.test_published_templates import rendered_by, runs, said
from tests.support.template_tokenizers import of_template, published

TEMPLATES = published()
WORDS = ("The Baltic.", "The Irish Sea.", "The Aegean.")
CHAT = [
    message
    for number, word in enumerate(WORDS)
    for message in (said("user", f"Question {number}?"), said("assistant", word))
]
# Which of the answers are learnt: every choice but none.
CHOICES = [choice for choice in product((0, 1), repeat=3) if any(choice)]
WITH_MARKS = 34  # published templates that mark answers themselves, or have a training template in TRL


def marks_of(tokenizer: PreTrainedTokenizerFast, own: str) -> str | None:
    try:
        training: str | None = get_training_chat_template(tokenizer)
    except ValueError:
        training = None
    return training or (own if has_generation_markers(own) else None)


def masked(tokenizer: PreTrainedTokenizerFast, marks: str, choice: Sequence[int]) -> Tokens:
    """TRL's mask, without the runs of the answers that are not chosen."""
    spelling = rendered_by(tokenizer, CHAT, marks, None)
    assert spelling is not None
    told = tokenizer.apply_chat_template(spelling, chat_template=marks, return_assistant_tokens_mask=True)
    found: list[bool] = []
    answer = 0
    for learnt, run in groupby(told["assistant_masks"]):
        length = len(list(run))
        found += [bool(learnt and choice[answer])] * length
        answer += learnt
    assert answer == len(choice)
    return Tokens(told["input_ids"], found)


def check(name: str, row: Any, settings: Rendering, choice: Sequence[int]) -> str:
    """Assert that what is learnt are the chosen answers; by which way."""
    tokenizer = of_template(TEMPLATES[name])
    marks = marks_of(tokenizer, TEMPLATES[name])
    assert marks is not None
    renderer = Renderer(tokenizer, settings)
    made = renderer.tokens(renderer.row(row))
    wanted = [word for word, learnt in zip(WORDS, choice, strict=True) if learnt]
    learnt = [run for tokens in made for run in runs(tokens, tokenizer)]
    assert len(learnt) == len(wanted), (name, choice, learnt)
    for word, run in zip(wanted, learnt, strict=True):
        assert [each for each in (*WORDS, "Question") if each in run] == [word], (name, choice, run)
    if len(made) == 1 and settings.turns != "each":
        assert made == [masked(tokenizer, marks, choice)], (name, choice)
        return "marks"
    return "each"


MARKED = [name for name, own in TEMPLATES.items() if marks_of(of_template(own), own)]


def test_templates_with_marks() -> None:
    assert len(MARKED) == WITH_MARKS


@pytest.mark.parametrize("name", MARKED)
def test_answers_of_weight_0_are_context(name: str) -> None:
    for choice in CHOICES:
        weights = iter(choice)
        messages = [
            {**message, "weight": next(weights)} if message["role"] == "assistant" else message for message in CHAT
        ]
        assert check(name, {"messages": messages}, Rendering(), choice) == "marks"


@pytest.mark.parametrize("name", MARKED)
def test_the_last_answer_alone(name: str) -> None:
    assert check(name, {"messages": CHAT}, Rendering(turns="last"), (0, 0, 1)) == "marks"
    messages = [*CHAT[:-1], {**CHAT[-1], "weight": 0}]
    assert check(name, {"messages": messages}, Rendering(turns="last"), (0, 1, 0)) == "marks"


@pytest.mark.parametrize("name", MARKED)
def test_each_answer_in_a_row_of_its_own(name: str) -> None:
    for choice in CHOICES:
        weights = iter(choice)
        messages = [
            {**message, "weight": next(weights)} if message["role"] == "assistant" else message for message in CHAT
        ]
        assert check(name, {"messages": messages}, Rendering(turns="each"), choice) == "each"
