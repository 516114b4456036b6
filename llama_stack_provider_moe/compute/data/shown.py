"""One row as it is learnt, as text for a person."""

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.rendering import Tokens

MARKS = ("⟦", "⟧")
LONGEST = 2000  # characters


def shown(
    tokens: Tokens, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str] = MARKS, longest: int = LONGEST
) -> str:
    """The row's text on one line, with marks around what is learnt.

    Args:
        tokens: the row.
        tokenizer: made the tokens.
        marks: text before and behind each learnt run of tokens, such as a terminal's codes for a colour.
        longest: greatest number of the row's characters; beyond it, each run is cut in its middle.
    """
    runs, begin, before = [], 0, ""
    for said, group in groupby(tokens.said):
        begin += len(list(group))
        text = tokenizer.decode(tokens.ids[:begin], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        runs.append((said, _escaped(text[len(before) :])))
        before = text
    room = max(40, longest // max(1, len(runs)))
    excess = sum(len(text) for _, text in runs) > longest
    return "".join(
        f"{marks[0]}{piece}{marks[1]}" if said else piece
        for said, text in runs
        for piece in [_cut(text, room) if excess else text]
    )


def _escaped(text: str) -> str:
    """Every character that is not printable, as Python writes it, so that a log stays one line."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _cut(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    half = room // 2
    return f"{text[:half]}[... {len(text) - 2 * half} characters ...]{text[-half:]}"
