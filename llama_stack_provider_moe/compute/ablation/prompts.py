"""Rows -> the tokens of their prompts, for measuring the states of one token of each."""

import json
from itertools import batched
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.data.rendering import Rendered, Renderer, Tokens, Unrenderable
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import AblationMeasureSpec
from llama_stack_provider_moe.spec.rows import CanonicalRow, Conversation, TextRow

_CHUNK = 256
_SHOWN = 8


def read(
    path: Path, source: str, spec: AblationMeasureSpec, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> list[Prompt]:
    """The prompts of the canonical rows in `path`, each with the template's generation prompt; every token counts.

    Answers at the end of a row are not read. A plain text is read as it is.

    Args:
        path: the rows.
        source: name of their data set, for messages.
        spec: the settings.
        tokenizer: of the model.
        vocabulary: rows of the model's embedding.

    Raises:
        DataError: rows that can't be rendered, are too long, or don't have the token to measure.
    """
    renderer, prompts, problems = Renderer(tokenizer), list[Prompt](), list[str]()
    with path.open(encoding="utf-8") as file, liveness.stage(f"tokenising {source}", unit="rows") as counter:
        for numbered in batched(enumerate(file, start=1), _CHUNK):
            rendered: dict[int, Rendered] = {}
            for number, line in numbered:
                counter.advance()
                try:
                    rendered[number] = _rendered(renderer, json.loads(line))
                except Unrenderable as problem:
                    problems.append(f"row {number}: {problem}")
            texts = [[each] for each in rendered.values()]
            for number, pieces in zip(rendered, renderer.tokens_of_rows(texts), strict=True):
                found = str(pieces) if isinstance(pieces, Unrenderable) else _prompt(
                    rendered[number], pieces[0], spec, tokenizer, vocabulary)  # fmt: skip
                if isinstance(found, str):
                    problems.append(f"row {number}: {found}")
                else:
                    prompts.append(found)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"dataset {source!r}: {len(problems)} row(s) can't be measured: {'; '.join(problems[:_SHOWN])}{more}"
        )
    return prompts


def _rendered(renderer: Renderer, row: CanonicalRow) -> Rendered:
    if "text" in row:
        return renderer.text(cast(TextRow, row)["text"])
    conversation = cast(Conversation, row)
    messages = list(conversation["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise Unrenderable("it has no message before the answer")
    return renderer.prompt({**conversation, "messages": messages})


def _prompt(
    text: Rendered, tokens: Tokens, spec: AblationMeasureSpec, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> Prompt | str:
    """The prompt, or why it can't be measured."""
    ids = tokens.ids
    if text.plain and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # it ends a training text; here the text's own last token is measured
    length, position = spec.options.max_length, spec.measure.position
    if len(ids) > length:
        return f"it has {len(ids)} tokens, more than options.max_length = {length}"
    if not -len(ids) <= position < len(ids):
        return f"it has {len(ids)} tokens, none at measure.position = {position}"
    before = position if position >= 0 else len(ids) + position
    if spec.measure.span > before + 1:
        return f"it has {before + 1} tokens up to measure.position = {position}, fewer than measure.span"
    if max(ids) >= vocabulary:
        return f"the tokenizer gives id {max(ids)}, but the model's embedding has {vocabulary} rows"
    return Prompt(ids, [True] * len(ids))
