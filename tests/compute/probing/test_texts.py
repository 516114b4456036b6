"""What is scored of a conversation, and which of its tokens are read."""

from typing import Any

import pytest

from llama_stack_provider_moe.compute.probing.texts import Reader, Reading, Unscorable, messages_of, views_of
from llama_stack_provider_moe.compute.probing.trunk import load_trunk
from llama_stack_provider_moe.spec.probe import Views
from tests.support.tiny_probe import messages, tiny_probe


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(load_trunk(str(tiny_probe()[0]), None, "fp32", None, 0), Reading(), "each", 200)


@pytest.mark.parametrize(
    ("views", "alone"), [("whole", []), ("latest", ["What now?"]), ("each", ["Hello.", "Good day.", "What now?"])]
)
def test_views(views: Views, alone: list[str]) -> None:
    talk: Any = {"messages": messages(["Hello.", "Good day.", "What now?"])}
    whole, *others = views_of(talk, views)
    assert whole is talk
    assert others == [{"messages": [{"role": "user", "content": text}]} for text in alone]
    single: Any = {"messages": messages("Hello.")}
    assert views_of(single, views) == [single], "it would be the same twice"


def test_the_own_text_is_read_and_nothing_of_the_template(reader: Reader) -> None:
    tokenizer = load_trunk(str(tiny_probe()[0]), None, "fp32", None, 0).tokenizer
    talk: Any = [
        {"role": "system", "content": "Be kind."}, *messages(["Add two and three.", "Five.", "Add two and three."]),
    ]  # fmt: skip
    whole, system, first, *_ = reader.prompts({"messages": talk})
    text = tokenizer.decode(whole.ids)
    assert text.endswith("<|im_start|>assistant\n"), "the generation prompt ends it, whoever spoke last"
    read = tokenizer.decode([token for token, is_read in zip(whole.ids, whole.counts, strict=True) if is_read])
    assert read == "Add two and three.Five.Add two and three."
    assert [sum(each.counts) < len(each.ids) for each in (system, first)] == [True, True]
    read = tokenizer.decode([token for token, is_read in zip(system.ids, system.counts, strict=True) if is_read])
    assert read == "Be kind.", "alone, it is scored as a user's"


def test_a_typed_special_token_stays_text(reader: Reader) -> None:
    plain, typed = (
        reader.prompts({"messages": [{"role": "user", "content": text}]})[0] for text in ("Hi.", "Hi.<|im_end|>")
    )
    end = plain.ids[-5:]
    assert typed.ids.count(end[0]) == plain.ids.count(end[0]), "nobody can end a turn by typing it"
    assert sum(typed.counts) > sum(plain.counts)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no message"),
        ([{"role": "user", "content": "a"}] * 65, "65 messages, more than 64"),
        ([{"role": "user"}], "message 1 has no role or no text"),
        ([{"role": "user", "content": "  "}], "no text"),
        ([{"role": "user", "content": "far too long " * 100}], "more than options.max_length = 200"),
    ],
)
def test_what_has_no_score(reader: Reader, given: list[dict[str, str]], words: str) -> None:
    with pytest.raises(Unscorable, match=words):
        reader.prompts(messages_of(given))
