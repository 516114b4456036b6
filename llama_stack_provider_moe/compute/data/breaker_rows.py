"""The rows of a circuit-breaker job: break rows are cut to request and answer, retained rows stay whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.datasets import Maker, Rows, cache_folder, ends_of, show_plan, show_row
from llama_stack_provider_moe.compute.data.encoding import (
    Encoded,
    Encoder,
    Limit,
    Problem,
    before_last,
    first_said,
    joined,
    last_said,
    nothing_learnt,
    rendered_rows,
    tokens_of,
)
from llama_stack_provider_moe.compute.data.mixture import HeldOutRows, Mixture, Part
from llama_stack_provider_moe.compute.data.rendering import Rendered, Rendering, Tokens, Unrenderable
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.spec import BreakerSpec
from llama_stack_provider_moe.spec.rows import CanonicalRow, Conversation

FEATURES = Features({"input_ids": List(Value("int32")), "said": List(Value("int8"))})


def breaker_rows(session: Session[BreakerSpec], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Rows:
    """Rows with columns `input_ids` and `said`, which is 1 for the assistant's tokens (break rows: the last answer's).

    Args:
        session: the job's session.
        tokenizer: with a chat template.
        vocabulary: rows of the model's embedding; a greater token id would read past its end.

    Raises:
        DataError: rows can't be rendered, or too many are too long.
    """
    spec, block, folder = session.spec, session.spec.circuit_breaker, cache_folder(session)
    rendering = Rendering.of(spec.options)
    lengths = block.request_length + block.response_length
    broken = Maker(
        session, folder,
        BreakEncoder(tokenizer, rendering, Limit(lengths), block.request_length, block.response_length), FEATURES,
        vocabulary, f"circuit_breaker.request_length {block.request_length} and response_length "
        f"{block.response_length}; they were cut",
    )  # fmt: skip
    limit = Limit(spec.options.max_length, spec.options.truncate)
    retained = Maker(session, folder, RetainEncoder(tokenizer, rendering, limit), FEATURES, vocabulary)
    made: dict[Part, tuple[Dataset, Dataset | None]] = {"break": broken.split(spec.data, "train", "validation")}
    made["retain"] = retained.split(block.retain, "retain", "retain-validation")
    if block.safe is not None:
        made["safe"] = retained.split(block.safe, "safe", "safe-validation")
    counts = broken.counts | retained.counts
    show_plan(session, retained.encode, counts)
    for part, (rows, _) in made.items():
        row = rows[0]
        tokens = Tokens(row["input_ids"], [bool(said) for said in row["said"]])
        show_row(session, retained.encode, f"the first row of {part}, its answer marked", tokens)
    train = Mixture({part: rows for part, (rows, _) in made.items()})
    held_out = {part: rows for part, (_, rows) in made.items() if rows is not None}
    validation = HeldOutRows(held_out) if {"break", "retain"} <= held_out.keys() else None
    return Rows(train, validation, counts, ends_of(retained.encode, counts))


@dataclass(frozen=True)
class BreakEncoder(Encoder):
    """A request and its answer, each cut to a length of its own: the request's beginning, the answer's end.

    Attributes:
        request_length: the most tokens of a request.
        response_length: the most tokens of an answer.
    """

    request_length: int
    response_length: int

    def __call__(self, rows: Sequence[CanonicalRow]) -> list[list[Encoded] | Problem]:
        """One row for each conversation: its last answer, and what comes before it."""
        rendered = rendered_rows(rows, self._rendered)
        return [
            one if isinstance(one, Problem) else joined([self._finish(tokens) for tokens in one])
            for one in tokens_of(self.renderer, rendered)
        ]

    def _rendered(self, row: CanonicalRow) -> list[Rendered]:
        if "messages" not in row:
            raise Unrenderable("a break row needs a request and an answer to it; this one is plain text")
        whole = cast(Conversation, row)
        return [self.renderer.answer(before_last(whole), whole["messages"][-1:])]

    def _finish(self, tokens: Tokens) -> Encoded | Problem:
        if not any(tokens.said):
            return Problem("the chat template does not render the answer")
        begins, ends = first_said(tokens), last_said(tokens) + 1
        if begins == 0:
            return Problem("there is no request before the answer")
        request = tokens.ids[max(0, begins - self.request_length) : begins]
        response = tokens.ids[begins : min(ends, begins + self.response_length)]
        said = [0] * len(request) + [1] * len(response)
        cut = begins > self.request_length or ends - begins > self.response_length
        return Encoded({"input_ids": request + response, "said": said}, cut, max(request + response))


@dataclass(frozen=True)
class RetainEncoder(Encoder):
    """Whole conversations with their answers marked, or plain texts, all of which is marked."""

    def __call__(self, rows: Sequence[CanonicalRow]) -> list[list[Encoded] | Problem]:
        """One row for each conversation."""
        rendered = rendered_rows(rows, self.whole)
        return [
            one if isinstance(one, Problem) else joined([self._finish(tokens, row) for tokens in one])
            for one, row in zip(tokens_of(self.renderer, rendered), rows, strict=True)
        ]

    def _finish(self, tokens: Tokens, row: CanonicalRow) -> Encoded | Problem:
        found = self.fit(tokens, row)
        if isinstance(found, Problem):
            return found
        piece, system_cut = found
        ids, said = piece.tokens.ids, piece.tokens.said
        if not any(said[1:]):  # the model never predicts the first token
            return nothing_learnt(tokens, self.limit)
        return Encoded({"input_ids": ids, "said": [int(each) for each in said]}, piece.cut, max(ids), system_cut)
