"""Write the weights of a model's folder, one tensor at a time: the one writer of merging, mixing and surgery."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from llama_stack_provider_moe.compute.export.tensors import INDEX, TensorEntry, file_name, header, index_text
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.checkpoint_index import sync

SHARD_BYTES = 5_000_000_000
Say = Callable[[str], None]
Progress = Callable[[int, int], None]
# Appends the numbers of one tensor to a file.
WriteTensor = Callable[[TensorEntry, IO[bytes]], None]


def write_shards(
    parts: Sequence[Sequence[TensorEntry]],
    folder: Path,
    stage: str,
    write: WriteTensor,
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write each part to a file of its own, synced, and the index if there is more than one.

    Args:
        parts: the tensors of each file, from `shards`; name, dtype and shape are those of the result.
        folder: where the files go.
        stage: what is done, for signs of life.
        write: gets each entry, and appends as many bytes as it has.
        say: gets a line for each file.
        progress: called with the number of tensors that are written and their total.
    """
    total, done = sum(map(len, parts)), 0
    with liveness.stage(stage, total, "tensors") as counter:
        for number, part in enumerate(parts):
            name = file_name(number, len(parts))
            with (folder / name).open("wb") as out:
                out.write(header(part))
                for entry in part:
                    end = out.tell() + entry.nbytes
                    write(entry, out)
                    assert out.tell() == end, f"{entry.name}: its bytes end at {out.tell()}, expected {end}"
                    counter.advance()
                    done += 1
                    progress(done, total)
            sync(folder / name)
            say(f"{name}: {len(part)} tensors, {number + 1} of {len(parts)} files")
    if len(parts) > 1:
        (folder / INDEX).write_text(index_text([list(part) for part in parts]), encoding="utf-8")
