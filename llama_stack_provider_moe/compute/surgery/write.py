"""Write the folder of a surgery: its weights piece by piece, its config, and the files beside them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.export.card import side_files
from llama_stack_provider_moe.compute.export.shard_files import SHARD_BYTES, Progress, Say, write_shards
from llama_stack_provider_moe.compute.export.tensors import TensorEntry, append, copy_bytes, header, index_text, shards
from llama_stack_provider_moe.compute.export.whole_folder import check_room, complete_or_nothing
from llama_stack_provider_moe.compute.surgery.plan import Computed, NewTensor, Piece, SurgeryPlan
from llama_stack_provider_moe.compute.surgery.resized import Resized
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground import liveness


def write_folder(
    resized: Resized,
    plan: SurgeryPlan,
    out: Path,
    texts: dict[str, str],
    say: Say = lambda line: None,
    progress: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the new model to the new folder `out`; it appears when it is complete.

    Args:
        resized: the model, and what changes in it.
        plan: its tensors.
        out: the new folder.
        texts: further files, by name.
        say: gets a line for each file.
        progress: called with the number of tensors that are written and their total.
        shard_bytes: largest size of a file, unless a single tensor is larger.

    Raises:
        InvalidInput: another process writes the same folder.
        ModelError: a blended tensor is not finite.
        NoRoom: the disk has too few free bytes.
    """
    parts = shards([each.entry for each in plan.tensors], shard_bytes)
    beside = side_files(resized.before.folder, resized.before.folder)
    texts = {"config.json": resized.config_text(), **texts}
    with complete_or_nothing(out, "surgery", "a folder that no other surgery is writing") as written:
        needed = sum(len(header(part)) for part in parts) + len(index_text(parts)) + sum(map(len, texts.values()))
        check_room(out, plan.nbytes + needed + sum(file.stat().st_size for file in beside.values()))
        by_name = {each.entry.name: each for each in plan.tensors}
        write_shards(
            parts, written, "writing", lambda entry, file: _write_tensor(by_name[entry.name], file), say, progress
        )
        for name, file in beside.items():
            shutil.copyfile(file, written / name)
        for name, text in texts.items():
            (written / name).write_text(text, encoding="utf-8")


def _write_tensor(tensor: NewTensor, out: IO[bytes]) -> None:
    for pieces in tensor.sums:
        if isinstance(pieces, Computed):
            append(_rounded(tensor, pieces.numbers()), out)
        elif len(pieces) == 1 and pieces[0].share == 1.0:
            copy_bytes(_as_entry(pieces[0]), out)
        else:
            append(_summed(tensor, pieces), out)
        liveness.alive()


def _as_entry(piece: Piece) -> TensorEntry:
    """The piece as a tensor of its own."""
    old = piece.entry
    return replace(old, shape=(piece.count,), start=old.start + piece.first * old.dtype.itemsize)


def _summed(tensor: NewTensor, pieces: tuple[Piece, ...]) -> Tensor:
    """The sum of the pieces, computed in fp32 and rounded once."""
    total = torch.zeros(pieces[0].count)
    for piece in pieces:
        total.add_(piece.entry.read(piece.first, piece.count).float(), alpha=piece.share)
    return _rounded(tensor, total)


def _rounded(tensor: NewTensor, numbers: Tensor) -> Tensor:
    made = numbers.to(tensor.entry.dtype)
    if not bool(torch.isfinite(made).all()):
        raise ModelError(f"model: {tensor.entry.name} is not finite after the surgery, or was not before")
    return made
