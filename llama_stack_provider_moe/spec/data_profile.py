"""`DataProfile`: what `moe-train data check` and the server say about a file of rows before anything is trained."""

import json

from pydantic import Field

from llama_stack_provider_moe.errors import ModelError, TrainingError
from llama_stack_provider_moe.spec.blocks import Block


class Bucket(Block):
    """One bar of a histogram."""

    least: int = Field(description="Smallest length in the bucket.")
    most: int = Field(description="Largest length in the bucket.")
    rows: int = Field(description="Number of rows.")


class Lengths(Block):
    """Lengths of rows, in characters or tokens."""

    total: int = Field(description="Sum over all rows.")
    smallest: int = Field(description="Length of the shortest row.")
    median: int
    p95: int = Field(description="95% of the rows are no longer than this.")
    largest: int = Field(description="Length of the longest row.")
    histogram: list[Bucket]


class RowReason(Block):
    """A row, and what was found about it."""

    row: int = Field(description="Number of the row in its file, from 1.")
    reason: str


class Repeat(Block):
    """A row that is equal to another one."""

    row: int = Field(description="Number of the row in its file, from 1.")
    same_as: int = Field(description="Number of the first row with the same content.")


class ShownRow(Block):
    """One sequence as it is learnt."""

    row: int = Field(description="Number of the row in its file, from 1.")
    length: int = Field(
        description="Number of tokens of the sequence; the lists below may have only the first of them."
    )
    ids: list[int] = Field(description="Token ids.")
    labels: list[int] = Field(description="Token ids to learn; -100 where no loss is computed.")
    pieces: list[str] = Field(description="Text of each token.")

    def first(self, count: int) -> "ShownRow":
        """Return it with only the first `count` tokens."""
        return ShownRow(
            row=self.row,
            length=self.length,
            ids=self.ids[:count],
            labels=self.labels[:count],
            pieces=self.pieces[:count],
        )


# Graders of a job without a job file: this one reads nothing of a row.
_REWARD = [{"grader": {"type": "length", "name": "any", "least": 1}}]


def stood_in(recipe: object, model: object) -> dict[str, object]:
    """Return what a job of a recipe must name, and rows do not depend on; the model is its own teacher."""
    named: dict[str, dict[str, object]] = {"grpo": {"reward": _REWARD}, "distill": {"teacher": model}}
    return named.get(str(recipe), {})


class TokenFigures(Block):
    """What the model's tokenizer and chat template make of the valid rows, with a job's settings."""

    plan: list[str] = Field(description="How the rows are rendered and which tokens are learnt.")
    counts: dict[str, int] = Field(description="Rows by how they were rendered, special tokens kept as text, ...")
    lengths: Lengths | None = Field(description="Tokens of each sequence before it is cut; null: none was rendered.")
    max_length: int = Field(description="`options.max_length`.")
    positions: int | None = Field(description="Positions that the model was trained on; null: not known.")
    beyond_positions: int = Field(description="Sequences that are longer than that after cutting, with `answer`.")
    beyond_rows: list[int] = Field(default_factory=list, description="The first rows that have one.")
    answer: int = Field(default=0, description="Tokens that the model may write after each.")
    cut: int = Field(description="Sequences that are longer than max_length and are cut.")
    dropped: int = Field(description="Rows that are left out because no token to learn fits.")
    dropped_rows: list[RowReason] = Field(description="The first of them.")
    refused: int = Field(description="Rows that the chat template refuses, or whose learnt tokens are unknown.")
    refused_rows: list[RowReason] = Field(description="The first of them.")
    held_out: int = Field(description="Rows that `options.validation_split` holds out; the figures below lack them.")
    sequences: int = Field(description="Sequences of an epoch: a row may give several, one for each answer.")
    tokens: int = Field(description="Tokens of an epoch.")
    learnt: int = Field(description="Tokens of an epoch with a loss.")
    rows_a_step: int = Field(description="Sequences, or answers that the model writes, of one step on one process.")
    steps: int = Field(description="Optimiser steps of an epoch on one process; fewer if rows are packed.")
    rows: int = Field(description="Rows that were read.")
    max_dropped: float = Field(description="`options.max_dropped`.")

    def drops_too_many(self) -> bool:
        """Whether a job would end because it had to leave out more than `max_dropped` of the rows."""
        return self.dropped > self.max_dropped * self.rows


class DataProfile(Block):
    """All figures of one file of rows."""

    rows: int
    recipe: str
    formats: dict[str, int] = Field(description="Rows by format.")
    columns_read: dict[str, int] = Field(description="Rows in which each column is read.")
    columns_not_read: dict[str, int] = Field(description="Rows that have each column that is not read.")
    notes: dict[str, int] = Field(description="What else was found, with the number of rows.")
    refused: int = Field(description="Rows that are not valid.")
    refused_rows: list[RowReason] = Field(description="The first of them.")
    duplicates: int = Field(description="Rows that are equal to an earlier one.")
    duplicate_rows: list[Repeat] = Field(description="The first of them.")
    characters: Lengths | None = Field(description="Characters of the messages of each valid row; null: none is.")
    held_out_rows: int | None = Field(default=None, description="Rows of the held-out file, if there is one.")
    overlap: int | None = Field(default=None, description="Held-out rows that are also in this file.")
    overlap_rows: list[Repeat] = Field(default_factory=list, description="The first of them.")
    tokens: TokenFigures | None = Field(default=None, description="Null without a model.")
    shown: list[ShownRow] = Field(default_factory=list, description="The first sequences as they are learnt.")

    def with_tokens(self, answer: str) -> "DataProfile":
        """Add what the process that counts tokens printed; only its last line counts.

        Raises:
            ModelError: the model's tokenizer or chat template can't be used.
            TrainingError: the process printed nothing.
        """
        lines = answer.splitlines()
        if not lines:
            raise TrainingError("the process that counts tokens ended without an answer")
        found = json.loads(lines[-1])
        if "error" in found:
            raise ModelError(str(found["error"]))
        return DataProfile.model_validate({**self.model_dump(), **found})

    def is_ready(self) -> bool:
        """Whether a job would take these rows."""
        if self.refused or self.tokens is None:
            return not self.refused
        return not self.tokens.refused and not self.tokens.drops_too_many()
