"""Take measured directions out of a model's folder: its files are written again, one tensor at a time.

The new folder has the files of the old one, with the same tensors in each. Tensors without an edit are copied as bytes.
It is written under another name beside the output, and renamed when it is complete.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO

from torch import Tensor

from llama_stack_provider_moe.compute.ablation.apply_report import (
    APPLIED_FILE,
    BYTES_PER_S,
    AppliedReport,
    Touched,
    missed,
)
from llama_stack_provider_moe.compute.ablation.directions import directions
from llama_stack_provider_moe.compute.ablation.edits import Edit, Edits, plan_edits
from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint
from llama_stack_provider_moe.compute.ablation.measurements import Measurements
from llama_stack_provider_moe.compute.ablation.pieces import Editor, Figures, Piece, pieces_of
from llama_stack_provider_moe.compute.export.ahead import ahead
from llama_stack_provider_moe.compute.export.card import config_text, side_files
from llama_stack_provider_moe.compute.export.tensors import INDEX, TensorEntry, append, copy_bytes, header
from llama_stack_provider_moe.compute.export.whole_folder import check_room, complete_or_nothing
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.checkpoint_index import sync
from llama_stack_provider_moe.spec.ablation import AblationPlan

Progress = Callable[[int, int], None]


@dataclass
class JobOfEdits:
    """A plan on one model: its edits, the direction of each, and the figures of those that are done."""

    plan: AblationPlan
    edits: Edits
    units: dict[str, Tensor]
    figures: dict[str, Figures] = field(default_factory=dict)


def dry_run(model: str, plan: AblationPlan, found: Measurements) -> AppliedReport:
    """What `apply` would edit, from the model's config and, where there are weights, the headers of its files.

    Raises:
        InvalidInput, ModelError, LayoutError: see `plan_edits`.
    """
    edits = plan_edits(model_folder(model, "model"), plan, found.provenance)
    return report_of(model, None, found, JobOfEdits(plan, edits, {}), seconds=None)


def apply(
    model: str,
    plan: AblationPlan,
    found: Measurements,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
    named: Path | None = None,
) -> AppliedReport:
    """Edit `model` and write the result to the new folder `out`.

    Args:
        model: folder with config.json and safetensors in 16 or 32 bits, or a hub id.
        plan: what to edit.
        found: measurements of the same model.
        out: new folder; it appears when it is complete.
        say: gets a line for each file.
        progress: called with the number of tensors that are written and their total.
        named: folder that the report names, where `out` is renamed later; None: `out`.

    Raises:
        InvalidInput: the plan or the measurements don't fit the model, or `out` exists.
        ModelError: the model can't be read, is quantised, or has numbers that are not finite.
        NoRoom: the disk has too few free bytes.
    """
    if os.path.lexists(out):
        raise InvalidInput("out", str(out), "a folder that does not exist yet")
    job, folder = planned(model, plan, found), model_folder(model, "model")
    edits = job.edits
    parts: dict[Path, list[TensorEntry]] = {}
    for entry in edits.entries:
        parts.setdefault(entry.file, []).append(entry)
    beside = side_files(folder, folder)
    if (folder / INDEX).is_file():
        beside[INDEX] = folder / INDEX
    with complete_or_nothing(out, "ablating", "a folder that no other ablation is writing") as written:
        check_room(out, sum(path.stat().st_size for path in [*parts, *beside.values()]))
        start = time.monotonic()
        _write(job, parts, written, say, progress)
        seconds = time.monotonic() - start
        for name, file in beside.items():
            shutil.copyfile(file, written / name)
        (written / "config.json").write_text(config_text(folder, None), encoding="utf-8")
        report = report_of(model, str(named or out), found, job, seconds)
        (written / APPLIED_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return report


def planned(model: str, plan: AblationPlan, found: Measurements) -> JobOfEdits:
    """Plan the edits of a model that has weights; see `apply`."""
    folder = model_folder(model, "model")
    edits = plan_edits(folder, plan, found.provenance)
    here = fingerprint(folder)
    if here != found.provenance.fingerprint:
        raise InvalidInput("measurements", found.provenance.fingerprint[:12], f"measurements of this model, whose "
                           f"fingerprint is {here[:12]}; measure it again")  # fmt: skip
    return JobOfEdits(plan, edits, directions(found, plan, edits))


def _write(
    job: JobOfEdits,
    parts: dict[Path, list[TensorEntry]],
    folder: Path,
    say: Callable[[str], None],
    progress: Progress,
) -> None:
    total, done = sum(map(len, parts.values())), 0
    pieces = {entry.name: list(pieces_of(entry, job.edits.edits.get(entry.name))) for entry in job.edits.entries}
    editor = Editor(job.plan, job.edits.edits, job.units)
    job.figures = editor.figures
    wanted = (piece for entries in parts.values() for entry in entries for piece in pieces[entry.name] if piece.edit)
    with liveness.stage("editing", total, "tensors") as counter, ahead(editor.edited, wanted) as edited:
        for number, (file, entries) in enumerate(parts.items(), start=1):
            with (folder / file.name).open("wb") as out:
                out.write(header(entries))
                for entry in entries:
                    for piece in pieces[entry.name]:
                        _write_piece(piece, edited, out)
                    counter.advance()
                    done += 1
                    progress(done, total)
            sync(folder / file.name)
            count = sum(entry.name in job.edits.edits for entry in entries)
            say(f"{file.name}: {count} of {len(entries)} tensors edited, {number} of {len(parts)} files")


def _write_piece(piece: Piece, edited: Iterator[Tensor], out: IO[bytes]) -> None:
    if piece.edit is None:
        copy_bytes(piece.entry, out)
    else:
        append(next(edited), out)
        liveness.alive()


def report_of(
    model: str, folder: str | None, found: Measurements, job: JobOfEdits, seconds: float | None
) -> AppliedReport:
    """The report of edits that are done; of a dry run, if `folder` and `seconds` are None."""
    edits = job.edits
    touched = [_touched(edit, job) for edit in edits.edits.values()]
    size = sum(entry.nbytes for entry in edits.entries)
    # One matrix of a stack at a time.
    numbers = [prod(edit.entry.shape[-2:]) for edit in edits.edits.values()]
    return AppliedReport(
        model=model,
        folder=folder,
        plan=AblationPlan.model_validate(job.plan.model_dump(include=set(AblationPlan.model_fields))),
        provenance=found.provenance,
        touched=touched,
        skipped=edits.skipped,
        missed=missed(job.plan, edits),
        bytes=size,
        bytes_touched=sum(each.bytes for each in touched),
        largest_bytes=4 * max(numbers),
        seconds=size / BYTES_PER_S if seconds is None else seconds,
    )


def _touched(edit: Edit, job: JobOfEdits) -> Touched:
    stack = edit.writer.kind == "experts" and edit.place.expert is None
    router = edit.writer.kind == "router"
    figures = job.figures.get(edit.entry.name)
    made = Touched(
        name=edit.entry.name,
        parameter=edit.writer.parameter,
        layer=edit.writer.layer,
        kind=edit.writer.kind,
        bytes=edit.entry.nbytes,
        scale=edit.layers.scale * (job.plan.gate_scale if router else 1.0),
        experts=(len(edit.experts) if edit.experts is not None else edit.entry.shape[0]) if stack else None,
    )
    if figures is None:
        return made
    before, after = figures.before**0.5, figures.after**0.5
    measured = {
        "norm_before": before,
        "norm_after": after,
        "along_before": figures.along_before**0.5 / before if before else 0.0,
        "along_after": figures.along_after**0.5 / after if after else 0.0,
    }
    return made.model_copy(update=measured)
