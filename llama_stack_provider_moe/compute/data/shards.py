"""Shards: stretches of a JSONL file, each tokenised into Arrow files of its own, by whichever process.

A finished shard stays in the job's cache folder: its Arrow files, one for each part (training rows, held-out rows), and
a JSON file that is written last. Its key is a SHA-256 of the rows and of all that their tokens depend on, so a job that
is started again reuses it only if nothing has changed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from itertools import batched, islice
from pathlib import Path

from datasets import Features
from datasets.arrow_writer import ArrowWriter
from pydantic import TypeAdapter, ValidationError

from llama_stack_provider_moe.compute.data.encoding import Encoded, Encoder, Problem
from llama_stack_provider_moe.compute.data.row_counts import RowCounts
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.checkpoint_index import sha256_of, sync
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.spec.rows import CanonicalRow

CHUNK = 256  # rows that are rendered and tokenised together
SHARD_ROWS = 2048
SHARD_BYTES = 1 << 24
_WRITING = ".writing"


@dataclass(frozen=True)
class Stretch:
    """Some of a file's lines.

    Attributes:
        number: of the stretch, from 0.
        begin: byte at which it begins.
        first: index of its first row.
        count: number of its rows.
        sha256: of its bytes.
    """

    number: int
    begin: int
    first: int
    count: int
    sha256: str


def stretches(source: Path, rows: int = SHARD_ROWS, size: int = SHARD_BYTES) -> Iterator[Stretch]:
    """The stretches of a file: at most `rows` lines, and no more once `size` bytes are exceeded."""
    with source.open("rb") as file:
        number = first = begin = 0
        while True:
            digest, count, read = hashlib.sha256(), 0, 0
            for line in islice(file, rows):
                digest.update(line)
                count, read = count + 1, read + len(line)
                if read >= size:
                    break
            if count == 0:
                return
            liveness.alive()
            yield Stretch(number, begin, first, count, digest.hexdigest())
            number, first, begin = number + 1, first + count, begin + read


@dataclass(frozen=True)
class Recipe:
    """How rows become Arrow files.

    Attributes:
        encode: makes the columns of rows.
        features: types of the columns.
        vocabulary: rows of the model's embedding.
    """

    encode: Encoder
    features: Features
    vocabulary: int


@dataclass(frozen=True)
class Task:
    """One shard to make.

    Attributes:
        source: the JSONL file.
        stretch: its rows in the file.
        folder: folder for the Arrow files.
        name: name of the shard; its files begin with it.
        rest: part of the rows that are in no other part.
        held: index of a row -> its part, for rows of this stretch.
        key: see the module.
    """

    source: Path
    stretch: Stretch
    folder: Path
    name: str
    rest: str
    held: Mapping[int, str]
    key: str

    def file(self, part: str) -> Path:
        """The Arrow file of one part."""
        return self.folder / f"{self.name}.{part}.arrow"

    @property
    def record(self) -> Path:
        """The JSON file that says that the shard is complete."""
        return self.folder / f"{self.name}.json"


@dataclass(frozen=True)
class Misfit:
    """A token id beyond the model's embedding, and the number of its row."""

    row: int
    token: int


@dataclass
class Shard:
    """A made shard: what it has of each part, and what became of its rows.

    Attributes:
        key: see the module.
        files: part -> SHA-256 of its Arrow file.
        rows: part -> number of rows for the trainer.
        counts: of the source rows.
        misfit: the first token id that the model does not have.
    """

    key: str
    files: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    counts: RowCounts = field(default_factory=RowCounts)
    misfit: Misfit | None = None


_SHARD: TypeAdapter[Shard] = TypeAdapter(Shard)


def key_of(recipe: Recipe, stretch: Stretch, rest: str, held: Mapping[int, str]) -> str:
    """The key of a shard.

    Args:
        recipe: how its rows are encoded.
        stretch: its rows.
        rest: part of most rows.
        held: index of a row -> its part.
    """
    known = [
        recipe.encode.fingerprint, sorted(map(str, recipe.features.items())), recipe.vocabulary, stretch.sha256,
        stretch.first, stretch.count, rest, sorted(held.items()),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def make_shard(recipe: Recipe, task: Task, heard: Callable[[int], None]) -> Shard:
    """Tokenise the rows of one shard. Its files have temporary names until `keep`.

    Args:
        recipe: how its rows are encoded.
        task: the shard.
        heard: called with the number of source rows that were done, after each chunk.
    """
    made, before = Shard(task.key), dict(recipe.encode.renderer.counts)
    with ExitStack() as stack:
        writers: dict[str, ArrowWriter] = {}
        index = task.stretch.first
        for chunk in _chunks(task):
            columns: dict[str, list[Encoded]] = {}
            for row, found in zip(chunk, recipe.encode(chunk), strict=True):
                made.counts.source += 1
                made.counts.texts += "text" in row
                if kept := _counted(made, found, index, recipe.vocabulary):
                    columns.setdefault(task.held.get(index, task.rest), []).extend(kept)
                index += 1
            for part, rows in columns.items():
                if part not in writers:
                    writer = ArrowWriter(features=recipe.features, path=str(_unfinished(task, part)))
                    writers[part] = stack.enter_context(writer)
                writers[part].write_batch({name: [row.column(name) for row in rows] for name in recipe.features})
                made.rows[part] = made.rows.get(part, 0) + len(rows)
            heard(len(chunk))
            if made.misfit is not None:
                break
        for writer in writers.values():
            writer.finalize()
    for part in writers:
        path = _unfinished(task, part)
        sync(path)
        made.files[part] = sha256_of(path)
    after = recipe.encode.renderer.counts
    # Without zeros: what a process rendered before this shard must not show in it.
    made.counts.rendering = {
        name: count - before.get(name, 0) for name, count in sorted(after.items()) if count != before.get(name, 0)
    }
    return made


def _unfinished(task: Task, part: str) -> Path:
    return task.folder / f"{task.name}.{part}{_WRITING}"


def _counted(made: Shard, found: list[Encoded] | Problem, index: int, vocabulary: int) -> list[Encoded]:
    """Count a source row; the rows that it gives."""
    counts = made.counts
    if isinstance(found, Problem):
        (counts.dropped if found.droppable else counts.refused).add(found.reason, index + 1)
        return []
    for one in found:
        if one.greatest_id >= vocabulary and made.misfit is None:
            made.misfit = Misfit(index + 1, one.greatest_id)
    counts.encoded += len(found)
    counts.cut += any(one.truncated for one in found)
    counts.system_cut += any(one.system_cut for one in found)
    return found


def _chunks(task: Task) -> Iterator[list[CanonicalRow]]:
    with task.source.open("rb") as file:
        file.seek(task.stretch.begin)
        for lines in batched(islice(file, task.stretch.count), CHUNK):
            yield [json.loads(line) for line in lines]


def keep(task: Task, made: Shard) -> None:
    """Give a shard's files their names, and record that it is complete; call it in the job's own process."""
    with suppress(FileNotFoundError):
        task.record.unlink()
    for part in made.files:
        os.replace(_unfinished(task, part), task.file(part))
    write_atomic(task.record, json.dumps(asdict(made)))


class MadeOtherwise(ValueError):
    """A shard is not what its task would make now."""


def found(task: Task) -> Shard | None:
    """The shard that an earlier start made, if it is complete and of the same key.

    Raises:
        ValueError: there is one, but of another key or damaged; the text says which.
    """
    try:
        made = _SHARD.validate_json(task.record.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ValueError("damaged") from None
    if made.key != task.key:
        raise MadeOtherwise("of other rows, another tokenizer, other settings or another version")
    for part, digest in made.files.items():
        try:
            right = sha256_of(task.file(part)) == digest
        except OSError:
            right = False
        if not right:
            raise ValueError("damaged")
    return made


def remove_others(folder: Path, prefix: str, tasks: Sequence[Task]) -> None:
    """Delete files of the shards of a data set that are none of `tasks`, and what was not finished."""
    names = {task.name for task in tasks}
    for path in folder.glob(f"{prefix}.*"):
        name = ".".join(path.name.split(".")[:2])
        if name not in names or path.name.endswith(_WRITING):
            path.unlink()
