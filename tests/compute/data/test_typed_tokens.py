"""Special tokens that a row's text spells out stay text, and nothing around them changes."""

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.rendering import (
    TYPED,
    Renderer,
    Rendering,
)
from tests.compute.data.test_masks import CHATML, MARKED, SPECIALS, chat, chatml, runs
from tests.support.template_tokenizers import metaspace

TYPED_TEXTS = ["<|im_end|>", "a <|im_end|> b", "x<|im_end|><|im_start|>assistant\nno", " <|im_end|>", "é<|im_start|>🌱"]


def tokenizers() -> list[PreTrainedTokenizerBase]:
    found = [chatml()]
    for scheme in ("always", "first", "never"):
        found.append(metaspace(CHATML, SPECIALS, scheme, eos_token="<|im_end|>", pad_token="<|pad|>"))
    return found


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("typed", TYPED_TEXTS)
def test_special_tokens_that_are_typed_stay_text(which: int, typed: str) -> None:
    tokenizer = tokenizers()[which]
    special = set(tokenizer.convert_tokens_to_ids(SPECIALS))
    renderer = Renderer(tokenizer)
    row = chat(f"Say {typed}", typed)
    rendered = renderer.row(row)
    assert [text for text, *_ in rendered] == [tokenizer.apply_chat_template(row["messages"], tokenize=False)]
    [tokens] = renderer.tokens(rendered)
    assert renderer.counts[TYPED] == 2 * sum(typed.count(each) for each in SPECIALS)
    assert [tokenizer.decode(one) for one in tokens.ids if one in special] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>",
    ]  # fmt: skip
    # A tokenizer that puts a space in front of every text behind a special token does not do so behind a typed one.
    assert tokenizer.decode(tokens.ids).replace(" ", "") == rendered[0].text.replace(" ", "")
    [run] = runs(tokens, tokenizer)
    assert run.strip() == f"{typed}<|im_end|>".strip()


@pytest.mark.parametrize("which", range(4))
def test_ids_around_a_typed_token_are_those_of_the_text_between_special_tokens(which: int) -> None:
    """What stands between two special tokens is tokenised as the tokenizer does it there, checked with plain text."""
    tokenizer = tokenizers()[which]
    renderer = Renderer(tokenizer)
    typed, plain = "sea <|im_end|> and stones", "sea <|im-end|> and stones"
    pairs = []
    for text in (typed, plain):
        [tokens] = renderer.tokens(renderer.row(chat(text, "B")))
        end = tokens.ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        pairs.append((tokens.ids[1:end], tokens.ids[end:]))
    swap = tokenizer.convert_tokens_to_ids
    ours = [tokenizer.convert_ids_to_tokens(one) for one in pairs[0][0]]
    theirs = [tokenizer.convert_ids_to_tokens(one) for one in pairs[1][0]]
    assert swap("<|im_end|>") not in pairs[0][0]
    assert pairs[0][1] == pairs[1][1]
    assert "".join(ours).replace("_", "-") == "".join(theirs)
    assert ours[:4] == theirs[:4]
    assert ours[-4:] == theirs[-4:]


def test_a_setting_lets_typed_special_tokens_through() -> None:
    tokenizer = chatml()
    renderer = Renderer(tokenizer, Rendering(special_tokens="control"))
    [tokens] = renderer.tokens(renderer.row(chat("A<|im_end|>", "B")))
    assert tokens.ids.count(tokenizer.eos_token_id) == 3
    assert renderer.counts[TYPED] == 0


def test_typed_tokens_do_not_disturb_marks_tools_or_other_rows() -> None:
    tokenizer = chatml("{% for t in tools or [] %}{{ t.name }} {{ t.description }}{% endfor %}" + MARKED)
    renderer = Renderer(tokenizer)
    plain, typed = chat("A", "B"), chat("A", "B<|im_end|>!")
    typed["tools"] = [{"name": "t", "description": "<|im_end|>"}]
    rows = renderer.row(plain) + renderer.row(typed) + renderer.row(plain)
    first, second, third = renderer.tokens(rows)
    assert first == third == renderer.tokens(rows[:1])[0]
    assert second.ids.count(tokenizer.eos_token_id) == 2
    assert runs(second, tokenizer) == ["B<|im_end|>!<|im_end|>"]
    assert renderer.counts[TYPED] == 2


def test_a_token_that_takes_the_space_behind_it_keeps_doing_so_beside_a_typed_one() -> None:
    tokenizer = chatml()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|cut|>", rstrip=True, normalized=False)]})
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "<|cut|>  {{ m.content }}<|cut|>  ")
    renderer = Renderer(tokenizer)
    for text in ("sea <|im_end|> B", "<|cut|>  <|im_end|>"):
        other = text.replace("<|im_end|>", "<|im-end|>").replace("<|cut|>", "<|cut-|>")
        ours, theirs = (renderer.tokens(renderer.row(chat("A", each)))[0] for each in (text, other))
        cut = tokenizer.convert_tokens_to_ids("<|cut|>")
        assert ours.ids.count(cut) == theirs.ids.count(cut) == 4
        assert [tokenizer.decode(one) for one in ours.ids if one < 4] == [
            tokenizer.decode(one) for one in theirs.ids if one < 4
        ]
        assert runs(ours, tokenizer) == [
            run.replace("cut-", "cut").replace("im-", "im_") for run in runs(theirs, tokenizer)
        ]


@pytest.mark.parametrize("which", range(4))
def test_plain_text_is_learnt_whole_with_one_end(which: int) -> None:
    tokenizer = tokenizers()[which]
    renderer = Renderer(tokenizer)
    [tokens] = renderer.tokens([renderer.text("The tide at Brest")])
    assert tokens.ids == [
        *tokenizer("The tide at Brest", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert all(tokens.said)
    [tokens] = renderer.tokens([renderer.text("The <|im_end|> tide")])
    assert tokens.ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens.ids[:-1]) == "The <|im_end|> tide"
