"""The part of a data profile that needs a tokenizer: which tokens a job would learn of canonical rows.

    python -m llama_stack_provider_moe.compute.data.token_profile < REQUEST

REQUEST is a JSON object: `job` (a whole job that trains), `rows` (file of lines `[number, canonical row]`) and `show`
(sequences to return). The answer, a line of JSON, is `{"tokens": ..., "shown": [...]}` or `{"error": ...}`. Progress
goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from llama_stack_provider_moe.compute.data.answers import DpoEncoder, KtoEncoder, RewardEncoder
from llama_stack_provider_moe.compute.data.breaker_rows import BreakEncoder
from llama_stack_provider_moe.compute.data.datasets import held_out, held_out_of_classes
from llama_stack_provider_moe.compute.data.encoding import (
    IGNORED,
    Encoded,
    Encoder,
    Limit,
    Problem,
    SftEncoder,
)
from llama_stack_provider_moe.compute.data.groups import Generations
from llama_stack_provider_moe.compute.data.positions import by_config
from llama_stack_provider_moe.compute.data.prompt_rows import PromptEncoder, prompt_limit
from llama_stack_provider_moe.compute.data.rendering import Rendering
from llama_stack_provider_moe.compute.data.sampling import rows_a_step, steps_an_epoch
from llama_stack_provider_moe.compute.models.loader import DTYPES, tokenizer_of, trusted
from llama_stack_provider_moe.compute.models.rope import scaled_config
from llama_stack_provider_moe.compute.models.row_images import images_of
from llama_stack_provider_moe.compute.models.vision import images_of_model, use_template
from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import (
    JOB_SPEC,
    BreakerSpec,
    DPOSpec,
    GRPOSpec,
    KTOSpec,
    SFTSpec,
    TrainingSpec,
    WritingSpec,
)
from llama_stack_provider_moe.spec.data_profile import ShownRow, TokenFigures
from llama_stack_provider_moe.spec.reward_jobs import RewardSpec
from llama_stack_provider_moe.spec.rows import CanonicalRow
from llama_stack_provider_moe.spec.rows.profiling import SHOWN, Reasons, Tally

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images

CHUNK = 256  # rows that are rendered and tokenised together
NO_LIMIT = 1 << 30  # tokens
PROGRESS_S = 2.0  # between two lines of progress
_PART = "\ufffd"  # what a tokenizer decodes a part of a character to
_MOST_PARTS = 4  # tokens of a character: UTF-8 has up to four bytes


class Request(TypedDict):
    """What the process reads."""

    job: dict[str, object]
    rows: str
    show: int


class Sequences:
    """Counts what an encoder makes of rows.

    Args:
        encoder: of the job's recipe and settings.
        spec: the job.
        held: indices of the rows that the job holds out, from 0.
        show: number of sequences to keep.
        positions: that the model was trained on, if known.
    """

    def __init__(
        self, encoder: Encoder, spec: TrainingSpec, held: frozenset[int], show: int, positions: int | None
    ) -> None:
        self._whole = replace(encoder, limit=Limit(NO_LIMIT))
        self._cut = encoder
        self._spec = spec
        self._held = held
        self._show = show
        self._rows = 0
        self._has_conversations = False
        self._lengths = Tally()
        self._positions = positions
        self._answer = spec.generating.max_completion_length if isinstance(spec, WritingSpec) else 0
        self._beyond: list[int] = []  # numbers of rows, each as often as it has such sequences
        self._refused, self._dropped = Reasons(), Reasons()
        self._truncated = self._tokens = self._learnt = self._sequences = 0
        self.shown: list[ShownRow] = []

    def add(self, rows: Sequence[tuple[int, CanonicalRow]]) -> None:
        """Encode and count rows with their numbers."""
        self._has_conversations |= any("text" not in row for _, row in rows)
        whole = self._whole([row for _, row in rows])
        long = [index for index, found in enumerate(whole) if _is_longer(found, self._cut.limit.length)]
        again = dict(zip(long, self._cut([rows[index][1] for index in long]), strict=True)) if long else {}
        for index, found in enumerate(whole):
            if not isinstance(found, Problem):
                for each in found:
                    self._lengths.add(_length(each))
            self._count(rows[index][0], again.get(index, found))

    def _count(self, number: int, found: list[Encoded] | Problem) -> None:
        index, self._rows = self._rows, self._rows + 1
        if isinstance(found, Problem):
            (self._dropped if found.droppable else self._refused).add(number, found.reason)
            return
        for each in found:
            self._truncated += each.truncated
            if self._positions is not None and _length(each) + self._answer > self._positions:
                self._beyond.append(number)
            if len(self.shown) < self._show:
                self.shown += self._as_shown(number, each)
            if index not in self._held:
                self._sequences += 1
                self._tokens += _length(each)
                self._learnt += _learnt(each)

    def _as_shown(self, number: int, encoded: Encoded) -> Iterator[ShownRow]:
        for ids, labels in _sequences(encoded):
            pieces = pieces_of(self._cut.tokenizer, ids)
            yield ShownRow(row=number, length=len(ids), ids=ids, labels=labels, pieces=pieces)

    def _plan(self) -> list[str]:
        learnt = not isinstance(self._spec, WritingSpec)
        if self._has_conversations:
            return self._whole.renderer.plan(learnt)
        return ["plain text: every token is learnt" if learnt else "plain text"]

    def figures(self) -> TokenFigures:
        """All figures."""
        training, sequences = self._spec.training, self._sequences
        if isinstance(self._spec, KTOSpec):
            sequences = self._spec.with_kl(sequences)
        return TokenFigures(
            plan=self._plan(),
            counts=dict(self._whole.renderer.counts),
            lengths=self._lengths.lengths(),
            max_length=self._cut.limit.length,
            positions=self._positions,
            beyond_positions=len(self._beyond),
            beyond_rows=list(dict.fromkeys(self._beyond))[:SHOWN],
            answer=self._answer,
            cut=self._truncated,
            dropped=self._dropped.count,
            dropped_rows=self._dropped.shown,
            refused=self._refused.count,
            refused_rows=self._refused.shown,
            held_out=len(self._held),
            sequences=sequences,
            tokens=self._tokens,
            learnt=self._learnt,
            rows_a_step=rows_a_step(training),
            steps=_steps(self._spec, sequences),
            rows=self._rows,
            max_dropped=self._spec.options.max_dropped,
        )


def _steps(spec: TrainingSpec, sequences: int) -> int:
    """Optimiser steps of an epoch over so many sequences, of a job in one process."""
    if not isinstance(spec, WritingSpec):
        return steps_an_epoch(spec.training, sequences)
    if isinstance(spec, GRPOSpec):
        made = Generations.of(spec.rl, spec.training, sequences, 1)
    else:
        made = Generations.of_a_step(spec.training, sequences, 1)
    return made.count * made.steps


def encoder_of(spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase, images: "Images | None" = None) -> Encoder:
    """The encoder of the rows that a job trains on (`data`; of a circuit breaker, the break rows)."""
    rendering, limit = Rendering.of(spec.options), Limit(spec.options.max_length, spec.options.truncate)
    if isinstance(spec, DPOSpec):
        return DpoEncoder(tokenizer, rendering, limit, images=images)
    if isinstance(spec, RewardSpec):
        return RewardEncoder(tokenizer, rendering, limit)
    if isinstance(spec, KTOSpec):
        return KtoEncoder(tokenizer, rendering, limit)
    if isinstance(spec, BreakerSpec):
        block = spec.circuit_breaker
        return BreakEncoder(tokenizer, rendering, limit, block.request_length, block.response_length)
    if isinstance(spec, WritingSpec):
        return PromptEncoder(tokenizer, rendering, prompt_limit(spec))
    assert isinstance(spec, SFTSpec)
    return SftEncoder(tokenizer, rendering, limit, spec.data.train_on_input, images=images)


def profile(request: Request) -> dict[str, object]:
    """The answer to a request.

    Raises:
        ModelError: the model has no tokenizer or chat template that can be used.
    """
    spec = cast("TrainingSpec", JOB_SPEC.validate_python(request["job"]))
    tokenizer = tokenizer_of(spec.model, spec.options.chat_template)
    path = Path(request["rows"])
    with path.open(encoding="utf-8") as file:
        total, has_images = _look(file)
    images = images_of_model(spec.model, JobFolder(path.parent), DTYPES[spec.training.dtype]) if has_images else None
    if images is not None:
        use_template(tokenizer, images)
    held = frozenset[int]()
    if spec.data.validation_dataset_id is None:
        share, seed = spec.options.validation_split, spec.options.seed
        held = held_out(total, share, seed)
        if isinstance(spec, KTOSpec):
            with path.open(encoding="utf-8") as file:
                labels = [int(json.loads(line)[1]["label"]) for line in file]
            held = frozenset(held_out_of_classes(labels, share, seed))
    config = AutoConfig.from_pretrained(spec.model, trust_remote_code=trusted(spec.model))
    positions = by_config(scaled_config(config.get_text_config(), spec.options.rope_scaling))
    most = None if positions is None else positions.most
    counted = Sequences(encoder_of(spec, tokenizer, images), spec, held, request["show"], most)
    done, said_s = 0, time.monotonic()
    with path.open(encoding="utf-8") as file:
        for lines in batched(file, CHUNK):
            counted.add([cast("tuple[int, CanonicalRow]", tuple(json.loads(line))) for line in lines])
            done += len(lines)
            if time.monotonic() - said_s >= PROGRESS_S:
                said_s = time.monotonic()
                print(f"tokenised {done:,} of {total:,} rows", file=sys.stderr, flush=True)
    shown = [each.model_dump(mode="json") for each in counted.shown]
    return {"tokens": counted.figures().model_dump(mode="json"), "shown": shown}


def _look(lines: Iterable[str]) -> tuple[int, bool]:
    """The number of rows, and whether any has an image."""
    total, has_images = 0, False
    for line in lines:
        total += 1
        if not has_images and '"sha256"' in line:  # else no part is an image
            row = json.loads(line)[1]
            has_images = bool(images_of([*row.get("messages", ()), *row.get("prompt", ())]))
    return total, has_images


def main() -> int:
    """Answer the request on standard input."""
    logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # all cores: this process does not fork
    try:
        answer = profile(json.load(sys.stdin))
    except MoeError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
    return 0


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens stands at its last one."""

    def decoded(begin: int, end: int) -> str:
        return str(tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False))

    pieces: list[str] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        before = max(0, begin - 1)  # alone, SentencePiece's tokens lose the space in front
        text = decoded(before, end)[len(decoded(before, begin)) :]
        is_open = text.endswith(_PART) and end - begin < _MOST_PARTS and end < len(ids)
        pieces.append("" if is_open else text)
        begin = begin if is_open else end
    return pieces


def _length(encoded: Encoded) -> int:
    columns = encoded.columns
    if "input_ids" in columns:
        return len(columns["input_ids"])
    return len(columns["prompt_ids"]) + max((len(columns[f"{which}_ids"]) for which in _answers(columns)), default=0)


def _answers(columns: Mapping[str, list[int]]) -> list[str]:
    """Names of a row's answers; none of a prompt to generate from."""
    return [which for which in ("chosen", "rejected", "completion") if f"{which}_ids" in columns]


def _is_longer(found: list[Encoded] | Problem, length: int) -> bool:
    return not isinstance(found, Problem) and any(_length(each) > length for each in found)


def _learnt(encoded: Encoded) -> int:
    columns = encoded.columns
    if "labels" in columns:
        return sum(label != IGNORED for label in columns["labels"][1:])
    if "said" in columns:
        return sum(columns["said"])
    return sum(sum(columns[f"{which}_said"]) for which in _answers(columns))  # 0: what is learnt is not written yet


def _sequences(encoded: Encoded) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels; of a pair, those of each answer."""
    columns = encoded.columns
    if "labels" in columns:
        yield columns["input_ids"], columns["labels"]
    elif "said" in columns:
        ids = columns["input_ids"]
        yield ids, [token if said else IGNORED for token, said in zip(ids, columns["said"], strict=True)]
    elif not _answers(columns):
        yield columns["prompt_ids"], [IGNORED] * len(columns["prompt_ids"])
    else:
        prompt = columns["prompt_ids"]
        for which in _answers(columns):
            answer, said = columns[f"{which}_ids"], columns[f"{which}_said"]
            labels = [token if compared else IGNORED for token, compared in zip(answer, said, strict=True)]
            yield [*prompt, *answer], [*[IGNORED] * len(prompt), *labels]


if __name__ == "__main__":
    sys.exit(main())
