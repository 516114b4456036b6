"""Canonical rows of a job's folder -> tokenised, memory-mapped data sets for TRL.

Rows are read, rendered, tokenised and written a chunk at a time, so memory does not grow with their number; the
Arrow files lie in the job's own cache folder. Held out are the rows of `validation.jsonl`, or else a seeded choice
of `options.validation_split` of the training rows (at least one, where there are two).
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.datarows import Message
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.spec import Data as SpecData
from llama_stack_provider_moe.spec import DPOSpec, MixedData, SFTSpec, TrainingSpec
from llama_stack_provider_moe.training.peers import Peers
from llama_stack_provider_moe.training.rendering import Renderer, Tokens, Unrenderable
from llama_stack_provider_moe.training.session import AnySession, Session

IGNORED = -100
CHUNK = 256
SHOWN = 20

Row = dict[str, list[Message]]
_IDS = List(Value("int32"))
SFT_FEATURES = Features({"input_ids": _IDS, "labels": _IDS})
DPO_FEATURES = Features({"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS})


class Encoded(NamedTuple):
    """One row as the trainer takes it, whether it was cut, and its greatest token id."""

    columns: dict[str, list[int]]
    truncated: bool
    greatest_id: int


Encode = Callable[[list[Row]], list[Encoded | str]]


@dataclass(frozen=True)
class Rows:
    """What is trained on and what is held out; `truncated` counts rows of both."""

    train: Dataset
    validation: Dataset | None
    truncated: int


def sft_rows(session: Session[SFTSpec], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Rows:
    """Columns `input_ids` and `labels`; labels are -100 where no loss is taken.

    Args:
        vocabulary: rows of the model's embedding; a token id beyond them would read past its end.
    """
    renderer, spec = Renderer(tokenizer), session.spec
    length = spec.options.max_length

    def encode(rows: list[Row]) -> list[Encoded | str]:
        def finish(tokens: Tokens) -> Encoded | str:
            ids = tokens.ids[:length]
            said = [True] * len(ids) if spec.data.train_on_input else tokens.said[:length]
            if not any(said[1:]):  # the first token is never predicted
                return f"no token to learn is left within options.max_length = {length} of its {len(tokens.ids)} tokens"
            labels = [token if learnt else IGNORED for token, learnt in zip(ids, said, strict=True)]
            return Encoded({"input_ids": ids, "labels": labels}, len(tokens.ids) > length, max(ids))

        return [one if isinstance(one, str) else finish(one) for one in tokens_of(renderer, rows, dialog)]

    return _prepare(session, encode, SFT_FEATURES, vocabulary)


def dpo_rows(session: Session[DPOSpec], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Rows:
    """Columns `prompt_ids`, `chosen_ids`, `rejected_ids`; a prompt and an answer fit `options.max_length` together."""
    renderer, length = Renderer(tokenizer), session.spec.options.max_length

    def encode(rows: list[Row]) -> list[Encoded | str]:
        chosen = tokens_of(renderer, rows, lambda row: _answer(row, "chosen"))
        rejected = tokens_of(renderer, rows, lambda row: _answer(row, "rejected"))
        return [_pair(good, bad, length) for good, bad in zip(chosen, rejected, strict=True)]

    return _prepare(session, encode, DPO_FEATURES, vocabulary)


def dialog(row: Row) -> tuple[list[Message], int]:
    """The messages of a row, and the first of them whose answer counts."""
    return row["messages"], 0


def _answer(row: Row, column: str) -> tuple[list[Message], int]:
    if len(row[column]) != 1:
        raise Unrenderable(f"{column} has {len(row[column])} turns; DPO compares one answer with one other")
    return row["prompt"] + row[column], len(row["prompt"])


def tokens_of(
    renderer: Renderer, rows: list[Row], pick: Callable[[Row], tuple[list[Message], int]]
) -> list[Tokens | str]:
    """The tokens of each row's messages, or why there are none."""
    rendered, problems = [], {}
    for index, row in enumerate(rows):
        try:
            rendered.append(renderer.conversation(*pick(row)))
        except Unrenderable as problem:
            problems[index] = str(problem)
    tokens = iter(renderer.tokens(rendered))
    return [problems[index] if index in problems else next(tokens) for index in range(len(rows))]


def _pair(chosen: Tokens | str, rejected: Tokens | str, length: int) -> Encoded | str:
    if isinstance(chosen, str):
        return chosen
    if isinstance(rejected, str):
        return rejected
    if not (any(chosen.said) and any(rejected.said)):
        return "the chat template renders nothing of the answer"
    # Both answers begin where the common part ends: a tokenizer may merge a prompt's end with an answer's start.
    begins = min(first_said(chosen), first_said(rejected))
    while chosen.ids[:begins] != rejected.ids[:begins]:
        begins -= 1
    ends = [last_said(tokens) + 1 for tokens in (chosen, rejected)]
    if begins == 0 or begins >= length:
        return f"its prompt of {begins} tokens leaves no room for an answer in options.max_length = {length}"
    prompt = chosen.ids[:begins]
    answers = [tokens.ids[begins : min(end, length)] for tokens, end in zip((chosen, rejected), ends, strict=True)]
    if answers[0] == answers[1]:
        return f"chosen and rejected do not differ within options.max_length = {length} tokens"
    return Encoded(
        {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]},
        max(ends) > length,
        max(map(max, (prompt, *answers))),
    )


def first_said(tokens: Tokens) -> int:
    """Index of the assistant's first token."""
    return tokens.said.index(True)


def last_said(tokens: Tokens) -> int:
    """Index of the assistant's last token."""
    return len(tokens.said) - 1 - tokens.said[::-1].index(True)


def _prepare[S: TrainingSpec](session: Session[S], encode: Encode, features: Features, vocabulary: int) -> Rows:
    maker = Maker(encode, features, vocabulary, fresh_cache(session))
    train, validation = maker.split(session, session.spec.data, "train", "validation")
    if maker.truncated:
        session.say(
            f"{maker.truncated} of {maker.rows} rows were longer than options.max_length = "
            f"{session.spec.options.max_length} tokens; their ends were cut off",
            "warning",
        )
    return Rows(train, validation, maker.truncated)


def fresh_cache(session: AnySession) -> Path:
    """The folder of the job's tokenised rows, empty."""
    cache = Path(session.cache)
    if session.peers.leads:
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
    session.peers.wait()
    return cache


def held_out(count: int, share: float, seed: int) -> frozenset[int]:
    """Indices of the rows held out of `count`: the same for the same seed, whatever else a job asks for."""
    if share == 0 or count < 2:
        return frozenset()
    return frozenset(random.Random(seed).sample(range(count), max(1, round(count * share))))


class Maker:
    """Makes Arrow files of JSONL files, counting as it goes."""

    def __init__(self, encode: Encode, features: Features, vocabulary: int, cache: Path) -> None:
        self.encode = encode
        self.features = features
        self.vocabulary = vocabulary
        self.cache = cache
        self.rows = 0
        self.truncated = 0

    def split(
        self, session: AnySession, data: SpecData | MixedData, part: str, held_out_part: str
    ) -> tuple[Dataset, Dataset | None]:
        """What is trained on and what is held out of one of the job's data sets, by the parts of its `RowSource`s."""
        spec, folder = session.spec, session.folder
        validation: Dataset | None
        if data.validation_dataset_id is not None:
            named = data.validation_dataset_id
            train = self.make(folder.rows(part), data.dataset_id, {part: None}, session.peers)[part]
            held = self.make(folder.rows(held_out_part), named, {held_out_part: None}, session.peers)
            validation = held[held_out_part]
        else:
            chosen = held_out(_count(folder.rows(part)), spec.options.validation_split, spec.options.seed)
            parts = {part: None, held_out_part: chosen}
            made = self.make(folder.rows(part), data.dataset_id, parts, session.peers)
            train, validation = made[part], made.get(held_out_part)
        if validation is None and spec.options.validation_split > 0:
            session.say("a single row can't be split; nothing is held out", "warning")
        if validation is not None and spec.training.max_validation_steps:
            most = spec.training.max_validation_steps * spec.training.batch_size * session.peers.size
            validation = validation.select(range(min(most, len(validation))))
        return train, validation

    def make(
        self, source: Path, dataset_id: str, parts: dict[str, frozenset[int] | None], peers: Peers
    ) -> dict[str, Dataset]:
        """One data set a part: that of the row indices named, or (None) of all others. Rank 0 makes, all read."""
        if peers.leads:
            self._write(source, dataset_id, parts)
        self.rows, self.truncated = peers.agreed((self.rows, self.truncated))
        made = [part for part, indices in parts.items() if indices is None or indices]
        return {part: Dataset.from_file(self._file(part)) for part in made}

    def _write(self, source: Path, dataset_id: str, parts: dict[str, frozenset[int] | None]) -> None:
        named = {index: part for part, indices in parts.items() for index in indices or ()}
        rest = next(part for part, indices in parts.items() if indices is None)
        problems: list[tuple[int, str]] = []
        with ExitStack() as stack:
            writers = {
                part: stack.enter_context(ArrowWriter(features=self.features, path=self._file(part)))
                for part, indices in parts.items()
                if indices is None or indices
            }
            for first, chunk in _chunks(source):
                for index, encoded in enumerate(self.encode(chunk), start=first):
                    if isinstance(encoded, str):
                        problems.append((index + 1, encoded))
                        continue
                    self._count_in(encoded, index, dataset_id)
                    writers[named.get(index, rest)].write(encoded.columns)
            if problems:
                raise DataError(_describe(dataset_id, problems))
            for writer in writers.values():
                writer.finalize()

    def _file(self, part: str) -> str:
        return str(self.cache / f"{part}.arrow")

    def _count_in(self, encoded: Encoded, index: int, dataset_id: str) -> None:
        if encoded.greatest_id >= self.vocabulary:
            raise DataError(
                f"dataset {dataset_id!r}, row {index + 1}: the tokenizer gives id {encoded.greatest_id}, but the "
                f"model's embedding has {self.vocabulary} rows; tokenizer and model do not belong together"
            )
        self.rows += 1
        self.truncated += encoded.truncated


def _chunks(source: Path) -> Iterator[tuple[int, list[Row]]]:
    with source.open(encoding="utf-8") as file:
        for number, lines in enumerate(batched(file, CHUNK)):
            yield number * CHUNK, [json.loads(line) for line in lines]


def _count(source: Path) -> int:
    with source.open("rb") as file:
        return sum(1 for _ in file)


def _describe(dataset_id: str, problems: list[tuple[int, str]]) -> str:
    # Alike problems are told once: a template that breaks the prefix rule breaks it on every long conversation.
    groups: dict[str, list[int]] = {}
    for row, reason in problems:
        groups.setdefault(reason, []).append(row)
    told, shown = [], 0
    for reason, rows in groups.items():
        part = rows[: SHOWN - shown]
        shown += len(part)
        if part:
            told.append(f"row{'s' if len(part) > 1 else ''} {', '.join(map(str, part))}: {reason}")
    more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return f"dataset {dataset_id!r}: {len(problems)} row(s) can't be trained on: {'; '.join(told)}{more}"
