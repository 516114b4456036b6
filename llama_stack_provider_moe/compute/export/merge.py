"""Merge a base and a LoRA adapter into a Hugging Face folder, tensor by tensor, without a model in memory.

    W' = W + scale * B A

is computed in fp32 for a few rows of a matrix at a time, and rounded once to the output dtype. Tensors without LoRA are
copied as bytes. On disk, experts may be fused or one tensor each: `places` finds the pieces.

    $ moe-train export merge BASE ADAPTER OUT

The folder is written under another name beside OUT and renamed when it is complete. A base that is in 4 bits on disk is
refused: jobs quantise while they load, so the base is the 16-bit model that they loaded.
"""

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.export.card import config_text, find_source, side_files
from llama_stack_provider_moe.compute.export.model_card import CARD, model_card
from llama_stack_provider_moe.compute.export.places import TensorPlace
from llama_stack_provider_moe.compute.export.plan import MergePlan, make_plan
from llama_stack_provider_moe.compute.export.shard_files import SHARD_BYTES, write_shards
from llama_stack_provider_moe.compute.export.tensors import (
    TensorEntry,
    append,
    copy_bytes,
    header,
    index_text,
    pieces,
    shards,
)
from llama_stack_provider_moe.compute.export.updates import Update
from llama_stack_provider_moe.compute.export.whole_folder import SLACK_BYTES, check_room, complete_or_nothing
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.moe.adapters import below_layer
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.jobdir.local_names import adapter_folder, whole_model
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.exports import shard_bytes as bytes_of_shard
from llama_stack_provider_moe.spec.local_commands import MergeCommand

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MIN_SHARD_BYTES = 1_000


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge; `seconds` covers reading, merging, writing and syncing the weights."""

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
        """The report in words."""
        targets = ", ".join(f"{name} x{count}" for name, count in self.adapted.items())
        replaced = f", {self.replaced} router biases replaced" if self.replaced else ""
        return (
            f"merged LoRA ({self.adapter_tensors} tensors) on {targets}\n"
            f"into {self.merged} tensors of the base{replaced}; {self.copied} copied\n"
            f"{self.parameters:,} parameters, {self.bytes:,} bytes in {number_of(self.shards, 'file')}, "
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
    """Merge `adapter` into `base` and write the result to the new folder `out`.

    Args:
        base: folder with config.json and safetensors in 16 bits or more, or a hub id.
        adapter: folder of a LoRA adapter, or of a job with one; the model card then shows the job's recipe and figures.
        out: new folder; it appears when it is complete.
        dtype: dtype of matrices: bf16, fp16 or fp32; default: as in the base. Vectors keep theirs.
        shard_bytes: largest size of a file, unless a single tensor is larger.
        say: gets a line for each file.

    Raises:
        InvalidInput: an argument is not valid.
        ModelError: the base can't be read, is quantised, or does not fit the adapter.
        AdapterError: the adapter can't be read, or can't be merged.
        NoRoom: the disk has too few free bytes.
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
        "config.json": config_text(
            folder, None if dtype is None else str(DTYPES[dtype]).removeprefix("torch."), source.adapter
        ),
        CARD: model_card("merged", str(base), source, adapted),
    }
    with complete_or_nothing(target, "merging", "a folder that no other merge is writing") as written:
        parts = shards([plan.written(entry) for entry in plan.entries], shard_bytes)
        check_room(target, _bytes_of(parts, [*files.values()], [*texts.values()]))
        start = time.monotonic()
        base_entries = {entry.name: entry for entry in plan.entries}
        write_shards(
            parts, written, "merging",
            lambda entry, file: write_tensor(plan, base_entries[entry.name], entry.dtype, file), say,
        )  # fmt: skip
        seconds = time.monotonic() - start
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
    """Bytes that `merge` will write, to within a megabyte; raises the same errors."""
    plan = make_plan(model_folder(base, "base"), adapter, None if dtype is None else DTYPES[dtype])
    return sum(plan.written(entry).nbytes for entry in plan.entries) + SLACK_BYTES


def _bytes_of(parts: list[list[TensorEntry]], files: list[Path], texts: list[str]) -> int:
    needed = sum(len(header(part)) + sum(entry.nbytes for entry in part) for part in parts)
    needed += sum(file.stat().st_size for file in files) + sum(len(text.encode()) for text in texts)
    return needed + len(index_text(parts).encode())


def write_tensor(plan: MergePlan, entry: TensorEntry, dtype: torch.dtype, out: IO[bytes]) -> None:
    """Append one tensor: merged, replaced, converted, or copied as bytes.

    Args:
        plan: of the merge.
        entry: the tensor in the base.
        dtype: in the output.
        out: the file.
    """
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


def _merged(numbers: Tensor, first: int, entry: TensorEntry, place: TensorPlace, update: Update) -> Tensor:
    """Add LoRA's update to some whole rows (rows, b) of a tensor, starting at its number `first`.

    Rows of stacked matrices are numbered continuously: row i of expert e in (E, a, b) is row e * a + i.
    """
    columns = entry.shape[-1]
    rows = numbers.view(-1, columns)
    if place.swapped:  # the transpose of L R is R^T L^T
        update = Update(update.right.mT, update.left.mT, update.scale)
    if update.left.dim() == 2 or place.expert is not None:
        left, right = (update.left, update.right) if place.expert is None else (
            update.left[place.expert], update.right[place.expert])  # fmt: skip
        begin = place.first_row + first // columns
        rows.addmm_(_rows(left, begin, len(rows), place.interleaved), right, alpha=update.scale)
        return rows
    height, done, begin = entry.shape[-2], 0, first // columns
    while done < len(rows):
        expert, row = divmod(begin + done, height)
        count = min(height - row, len(rows) - done)
        at = place.first_row + row
        left = _rows(update.left[expert], at, count, place.interleaved)
        rows[done : done + count].addmm_(left, update.right[expert], alpha=update.scale)
        done += count
    return rows


def _rows(left: Tensor, begin: int, count: int, interleaved: bool) -> Tensor:
    """Rows of a matrix in memory that are rows `begin` and following on disk (see `TensorPlace.interleaved`)."""
    if not interleaved:
        return left[begin : begin + count]
    on_disk = torch.arange(begin, begin + count, device=left.device)
    return left[on_disk % 2 * (len(left) // 2) + on_disk // 2]


def _finite(numbers: Tensor, name: str) -> Tensor:
    if numbers.is_floating_point() and not bool(torch.isfinite(numbers).all()):
        raise ModelError(f"base: {name} is not finite in {str(numbers.dtype).removeprefix('torch.')} after the merge")
    return numbers


def shard_size(text: str) -> int:
    """`5GB` -> 5000000000.

    Raises:
        InvalidInput: the text is not a number of bytes.
    """
    try:
        return bytes_of_shard(text.strip().upper())
    except ValueError:
        raise InvalidInput("--shard-size", text, "bytes, or a number with KB, MB or GB, such as 5GB") from None


def main(argv: Sequence[str] | None = None) -> int:
    """`moe-train export merge`; the exit code is 0 if OUT was written, 2 for a mistake in the command line."""
    return answered(MergeCommand, argv, "export merge", _run)


def _run(command: MergeCommand) -> int:
    report = merge(
        whole_model(command.base, "BASE"), adapter_folder(command.adapter, "ADAPTER"), command.out, command.dtype,
        shard_size(command.shard_size),
        say=lambda line: None if command.as_json else print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(json.dumps(asdict(report)) if command.as_json else report.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
