"""Base + LoRA adapter -> a Hugging Face folder, tensor by tensor, without a model in memory.

    W' = W + scale * B A

computed in fp32 for some rows of a matrix at a time, and rounded once, to the dtype that is written. Tensors without
LoRA are copied as bytes. What is on disk may be fused or one tensor an expert: `places` knows which piece is whose.

    $ moe-train export merge BASE ADAPTER OUT

The folder is written under another name beside OUT and renamed when it is whole. A base in 4 bits on disk is refused:
jobs quantise while they load, and the base is the 16-bit model that they loaded.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from llama_stack_provider_moe.errors import InvalidInput, ModelError, MoeError, NoRoom
from llama_stack_provider_moe.experts.adapters import below_layer
from llama_stack_provider_moe.experts.upcycle import model_folder
from llama_stack_provider_moe.export.card import config_text, find_source, model_card, side_files
from llama_stack_provider_moe.export.hidden import hidden_folder, sync
from llama_stack_provider_moe.export.places import Place
from llama_stack_provider_moe.export.plan import Plan, make_plan
from llama_stack_provider_moe.export.tensors import (
    INDEX,
    SINGLE,
    Entry,
    append,
    copy_bytes,
    header,
    pieces,
    shards,
)
from llama_stack_provider_moe.export.updates import Update
from llama_stack_provider_moe.spec.exports import shard_bytes as bytes_of_shard

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD_BYTES = 5_000_000_000
_MIN_SHARD_BYTES = 1_000
_SLACK_BYTES = 1 << 20  # of the file system, for folders and half-filled blocks


@dataclass(frozen=True)
class MergeReport:
    """What was made; `seconds` of reading, merging and writing the weights, synced."""

    folder: str
    adapted: dict[str, int]
    adapter_tensors: int
    merged: int
    replaced: int
    copied: int
    shards: int
    parameters: int
    bytes: int
    seconds: float

    def text(self) -> str:
        """For a person."""
        targets = ", ".join(f"{name} x{count}" for name, count in self.adapted.items())
        replaced = f", {self.replaced} routers' biases replaced" if self.replaced else ""
        return (
            f"merged LoRA ({self.adapter_tensors} tensors) on {targets}\n"
            f"into {self.merged} tensors of the base{replaced}; {self.copied} copied\n"
            f"{self.parameters:,} parameters, {self.bytes:,} bytes in {self.shards} file(s), "
            f"{self.bytes / 1e6 / self.seconds:,.0f} MB/s\n"
            f"saved to {self.folder}"
        )


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> MergeReport:
    """Write `base` with `adapter` merged into it to the new folder `out`.

    Args:
        base: folder with config.json and safetensors in 16 bits or more, or a hub id.
        adapter: folder of a LoRA adapter, or of a job that left one, whose recipe and figures the model card tells.
        out: folder to make; appears when it is complete.
        dtype: bf16, fp16 or fp32, of matrices; left out: as in the base. Vectors keep theirs.
        shard_bytes: most of one file, unless a single tensor has more.
        say: is told of each file.

    Raises:
        InvalidInput: an argument can't be used.
        ModelError: the base can't be read, is quantised, or is not what the adapter was made for.
        AdapterError: the adapter can't be read, or has what can't be merged.
        NoRoom: the disk has fewer bytes free than are needed.
    """
    target = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise InvalidInput("dtype", dtype, f"one of {', '.join(DTYPES)}")
    if shard_bytes < _MIN_SHARD_BYTES:
        raise InvalidInput("shard_size", shard_bytes, f"at least {_MIN_SHARD_BYTES} bytes")
    if os.path.lexists(target):
        raise InvalidInput("out", str(out), "a folder that does not exist yet")
    source = find_source(Path(adapter))
    folder = model_folder(base, "base")
    plan = make_plan(folder, source.adapter, None if dtype is None else DTYPES[dtype])
    files = side_files(folder, source.adapter)
    adapted = dict(Counter(map(below_layer, plan.updates.parameters)))
    texts = {
        "config.json": config_text(folder, None if dtype is None else str(DTYPES[dtype]).removeprefix("torch.")),
        "README.md": model_card(str(base), source, adapted, plan.updates.config),
    }
    with _whole_or_not_at_all(target) as written:
        parts = shards([plan.written(entry) for entry in plan.entries], shard_bytes)
        _check_room(target, parts, [*files.values()], [*texts.values()])
        began = time.monotonic()
        _write_weights(plan, parts, written, say)
        seconds = time.monotonic() - began
        for name, file in files.items():
            shutil.copyfile(file, written / name)
        for name, text in texts.items():
            (written / name).write_text(text, encoding="utf-8")
    entries = [entry for part in parts for entry in part]
    return MergeReport(
        folder=str(target), adapted=adapted, adapter_tensors=plan.updates.tensors, merged=len(plan.places),
        replaced=len(plan.biases), copied=len(entries) - len(plan.places) - len(plan.biases), shards=len(parts),
        parameters=sum(prod(entry.shape) for entry in entries), bytes=sum(entry.nbytes for entry in entries),
        seconds=seconds,
    )  # fmt: skip


def bytes_needed(base: str | Path, adapter: Path, dtype: str | None = None) -> int:
    """Bytes that `merge` will write, to within a megabyte; raises as it does."""
    plan = make_plan(model_folder(base, "base"), adapter, None if dtype is None else DTYPES[dtype])
    return sum(plan.written(entry).nbytes for entry in plan.entries) + _SLACK_BYTES


@contextmanager
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it, synced; one that an earlier, killed merge left is cleared away."""
    with hidden_folder(target, "merging", "a folder that no other merge is making") as parts:
        try:
            yield parts
            for path in parts.iterdir():
                sync(path)
            sync(parts)
            os.rename(parts, target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(parts, ignore_errors=True)
            raise


def _check_room(target: Path, parts: list[list[Entry]], files: list[Path], texts: list[str]) -> None:
    needed = sum(len(header(part)) + sum(entry.nbytes for entry in part) for part in parts) + _SLACK_BYTES
    needed += sum(file.stat().st_size for file in files) + sum(len(text.encode()) for text in texts)
    needed += len(_index(parts).encode())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise NoRoom(f"out: {target} needs {needed:,} bytes, and its disk has {free:,} free; nothing was written")


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _index(parts: list[list[Entry]]) -> str:
    weight_map = {entry.name: _file_name(i, len(parts)) for i, part in enumerate(parts) for entry in part}
    entries = [entry for part in parts for entry in part]
    totals = {
        "total_parameters": sum(prod(entry.shape) for entry in entries),
        "total_size": sum(entry.nbytes for entry in entries),
    }
    return json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _write_weights(plan: Plan, parts: list[list[Entry]], folder: Path, say: Callable[[str], None]) -> None:
    base = {entry.name: entry for entry in plan.entries}
    for number, part in enumerate(parts):
        name = _file_name(number, len(parts))
        with (folder / name).open("wb") as out:
            out.write(header(part))
            for entry in part:
                _write_tensor(plan, base[entry.name], entry.dtype, out)
            out.flush()
            os.fsync(out.fileno())
        say(f"{name}: {len(part)} tensors, {number + 1} of {len(parts)} files")
    if len(parts) > 1:
        (folder / INDEX).write_text(_index(parts), encoding="utf-8")


def _write_tensor(plan: Plan, entry: Entry, dtype: torch.dtype, out: IO[bytes]) -> None:
    """Append one tensor: merged, replaced, converted, or its bytes as they are."""
    place = plan.places.get(entry.name)
    if place is not None:
        update = plan.updates.of(place.parameter)
        for first, numbers in pieces(entry, entry.shape[-1]):
            append(_finite(_merged(numbers.float(), first, entry, place, update).to(dtype), entry.name), out)
    elif entry.name in plan.biases:
        append(_finite(plan.biases[entry.name].tensor().to(dtype), entry.name), out)
    elif dtype != entry.dtype:
        for _, numbers in pieces(entry, 1):
            append(_finite(numbers.to(dtype), entry.name), out)
    else:
        copy_bytes(entry, out)


def _merged(numbers: Tensor, first: int, entry: Entry, place: Place, update: Update) -> Tensor:
    """Some whole rows (rows, b) of a tensor, beginning with its number `first`, with what LoRA adds to them.

    Rows of a stack of matrices are counted through: (E, a, b) has row e * a + i.
    """
    columns = entry.shape[-1]
    rows = numbers.view(-1, columns)
    if update.left.dim() == 2 or place.expert is not None:
        left, right = (update.left, update.right) if place.expert is None else (
            update.left[place.expert], update.right[place.expert])  # fmt: skip
        begin = place.first_row + first // columns
        rows.addmm_(left[begin : begin + len(rows)], right, alpha=update.scale)
        return rows
    height, done, begin = entry.shape[-2], 0, first // columns
    while done < len(rows):
        expert, row = divmod(begin + done, height)
        count = min(height - row, len(rows) - done)
        rows[done : done + count].addmm_(
            update.left[expert, row : row + count], update.right[expert], alpha=update.scale
        )
        done += count
    return rows


def _finite(numbers: Tensor, name: str) -> Tensor:
    if numbers.is_floating_point() and not bool(torch.isfinite(numbers).all()):
        raise ModelError(f"base: {name} is not finite in {str(numbers.dtype).removeprefix('torch.')} once merged")
    return numbers


def shard_size(text: str) -> int:
    """`5GB` -> 5000000000.

    Raises:
        InvalidInput: it is no number of bytes.
    """
    try:
        return bytes_of_shard(text.strip().upper())
    except ValueError:
        raise InvalidInput("--shard-size", text, "bytes, or a number with KB, MB or GB, as 5GB") from None


def main(argv: Sequence[str] | None = None) -> int:
    """`moe-train export merge`; the exit code is 0 when OUT was made, 2 for a mistake in the command line."""
    parser = argparse.ArgumentParser(
        prog="moe-train export merge", description="Merge a LoRA adapter into its base, into a Hugging Face folder."
    )
    parser.add_argument("base", help="folder with config.json and safetensors, or a hub id")
    parser.add_argument("adapter", help="folder of a LoRA adapter, or of a job that left one")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--dtype", help=f"of matrices: {', '.join(DTYPES)} (default: as in the base)")
    parser.add_argument("--shard-size", default="5GB", help="most bytes of one file (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    given = parser.parse_args(argv)
    try:
        report = merge(
            given.base, given.adapter, given.out, given.dtype, shard_size(given.shard_size),
            say=lambda line: None if given.json else print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except MoeError as error:
        print(f"export merge: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput) else 1
    except OSError as error:
        print(f"export merge: {error.filename or given.out}: {error.strerror}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(report)) if given.json else report.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
