"""The rows of a job that generates: each prompt as it is sent to the model, and what any graders read of its row."""

import json
from collections.abc import Sequence
from typing import cast

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.datasets import Maker, Rows, cache_folder, ends_of, show_row
from llama_stack_provider_moe.compute.data.encoding import (
    Encoded,
    Encoder,
    Limit,
    Problem,
    rendered_rows,
    tokens_of,
)
from llama_stack_provider_moe.compute.data.rendering import Rendering, Tokens
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.spec import WritingSpec
from llama_stack_provider_moe.spec.rows import CanonicalRow, Conversation, PromptRow

FEATURES = Features({"prompt_ids": List(Value("int32")), "item": Value("large_string")})


def prompt_rows(session: Session[WritingSpec], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Rows:
    """Rows with columns `prompt_ids` and `item`, the row's columns as JSON.

    Args:
        session: the job's session.
        tokenizer: with a chat template.
        vocabulary: rows of the model's embedding; a greater token id would read past its end.

    Raises:
        DataError: rows can't be rendered, or too many are too long.
    """
    spec = session.spec
    limit = prompt_limit(spec)
    encoder = PromptEncoder(tokenizer, Rendering.of(spec.options), limit)
    cut_at = f"{limit.told}; their beginnings were cut off"
    maker = Maker(session, cache_folder(session), encoder, FEATURES, vocabulary, cut_at)
    train, validation, domains = maker.all_rows(spec.data)
    ids = train[0]["prompt_ids"]
    show_row(session, encoder, "the first prompt, after which the model writes", Tokens(ids, [False] * len(ids)))
    return Rows(train, validation, maker.counts, ends_of(encoder, maker.counts), domains)


def prompt_limit(spec: WritingSpec) -> Limit:
    """The largest number of tokens of a prompt: what an answer leaves."""
    most, answer, truncate = spec.options.max_length, spec.generating.max_completion_length, spec.options.truncate
    room = most - answer
    setting = f"{spec.generating_block}.max_completion_length"
    told = f"{room} tokens, which {setting} {answer} leaves of options.max_length {most}"
    return Limit(room, truncate, told)


class PromptEncoder(Encoder):
    """Columns `prompt_ids`, which end where the assistant begins to write, and `item`."""

    def __call__(self, rows: Sequence[CanonicalRow]) -> list[list[Encoded] | Problem]:
        """One prompt for each row."""
        prompts = cast(Sequence[PromptRow], rows)
        rendered = rendered_rows(prompts, lambda row: [self.renderer.prompt(cast(Conversation, row))])
        return [
            one if isinstance(one, Problem) else self._finish(one[0], row)
            for one, row in zip(tokens_of(self.renderer, rendered), prompts, strict=True)
        ]

    def _finish(self, tokens: Tokens, row: PromptRow) -> list[Encoded] | Problem:
        found = self.fit(tokens, row)
        if isinstance(found, Problem):
            return found
        piece, system_cut = found
        ids = piece.tokens.ids
        return [Encoded({"prompt_ids": ids}, piece.cut, max(ids), system_cut, {"item": json.dumps(row["item"])})]
