"""The steps of recipe `export`: load check, merge, GGUF files, Ollama, serving, and a push to the hub."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from transformers import AutoConfig

from llama_stack_provider_moe.compute.export import gguf, hub, ollama
from llama_stack_provider_moe.compute.export.card import find_source
from llama_stack_provider_moe.compute.export.load_check import NotRecorded
from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.export.model_card import CARD, PROJECTOR_FILE, model_card
from llama_stack_provider_moe.compute.export.projector import NoProjector, reads_images
from llama_stack_provider_moe.compute.export.reference import Reference, read_reference
from llama_stack_provider_moe.compute.export.separate_process import compare
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.recipes.export import serve
from llama_stack_provider_moe.compute.recipes.export.step_log import Done, Figures, PlannedStep, Skipped
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.errors import ExportError
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.jobdir.checkpoint_index import read_checksums
from llama_stack_provider_moe.jobdir.folder import Artifact, ArtifactKind, JobFolder
from llama_stack_provider_moe.llama_cpp import find_toolchain
from llama_stack_provider_moe.spec import ExportSpec
from llama_stack_provider_moe.spec.destinations import OllamaServer
from llama_stack_provider_moe.spec.exports import shard_bytes
from llama_stack_provider_moe.spec.gguf_types import GgufType
from llama_stack_provider_moe.spec.serving_config import OllamaServing, gguf_of

PROJECTOR = "gguf-mmproj"  # the step and the artifact of a projector file


@dataclass(frozen=True)
class Trained:
    """What a job trained: an adapter, or all weights.

    Attributes:
        job: the job that trained it.
        folder: of the adapter or model.
        entry: its entry in the job's manifest.
    """

    job: JobFolder
    folder: Path
    entry: Artifact

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter was trained; else all weights were."""
        return self.entry.kind == "adapter"


def load_check(session: Session[ExportSpec], trained: Trained) -> PlannedStep:
    """Load the saved weights anew, and compare their logits with those recorded at the end of training."""

    def run() -> Done:
        try:
            if trained.is_adapter:
                answer = compare("adapter", trained.folder, session.spec.model)
            else:
                answer = compare("model", trained.folder)
        except NotRecorded as error:
            raise Skipped(str(error)) from None
        return Done(note=answer.text, figures=answer.figures)

    return PlannedStep("load_check", run)


def merged(session: Session[ExportSpec], trained: Trained) -> PlannedStep:
    """Merge base and adapter into one folder. A job that trained all weights has that already."""
    spec, asked = session.spec, session.spec.export
    if not trained.is_adapter:
        reason = f"all weights were trained, so artifact `model` of job {spec.of} is already the whole model"
        return PlannedStep("merged", lambda: Done(note=reason))
    target = merged_folder(session)

    def make() -> Done:
        written = target.with_name(f".{target.name}.writing")
        remove(written)
        report = merge(
            spec.model, trained.folder, written, asked.dtype, shard_bytes(asked.shard_size),
            say=lambda line: print(f"  {line}", flush=True),
        )  # fmt: skip
        note = (
            f"{report.merged} of {report.merged + report.replaced + report.copied} tensors merged, "
            f"{report.parameters:,} parameters in {number_of(report.shards, 'file')}, "
            f"{report.bytes / 1e6 / report.seconds:,.0f} MB/s"
        )
        figures = None
        if asked.load_check:
            figures, comparison = compare_merged(written, trained, spec.model)
            note = f"{note}; {comparison}"
        publish(written, target, trained.entry.step)
        return Done(listed(session, trained, target, "merged", figures) if asked.merged else None, note, figures)

    return PlannedStep("merged", make, leaves=[target], lasts=asked.merged)


def merged_folder(session: Session[ExportSpec]) -> Path:
    """The merged model's folder. It is an artifact if the job asks for it; else it is deleted at the job's end."""
    return (session.folder.artifacts if session.spec.export.merged else session.folder.work) / "merged"


def compare_merged(folder: Path, trained: Trained, base: str) -> tuple[Figures | None, str]:
    """Compare the logits of a merged folder with those of the adapter on its base; figures, and a summary.

    Raises:
        ExportError: they differ by more than rounding. The folder is deleted.
    """
    try:
        return compare("merged", folder, trained.folder, base)
    except NotRecorded as error:
        return None, f"not compared with the adapter: {error}"
    except BaseException:
        remove(folder)
        raise


def listed(
    session: Session[ExportSpec],
    trained: Trained,
    folder: Path,
    kind: ArtifactKind,
    verification: Figures | None,
) -> Artifact:
    """The manifest entry of a finished folder, with what training measured about its weights.

    Args:
        session: of the export job.
        trained: what it exports.
        folder: the finished one.
        kind: of artifact.
        verification: figures of its check, if there was one.
    """
    entry = trained.entry
    made = describe(session.job_uuid, kind, folder, entry.epoch, entry.step, entry.metrics)
    return made.model_copy(update={"verification": verification})


def pushed(session: Session[ExportSpec], trained: Trained) -> PlannedStep:
    """Push what was trained, the merged model, or all GGUF files to a repository on the hub."""
    asked = session.spec.export
    assert asked.push is not None, "there is no such step without it"
    to = asked.push
    needs = {"adapter": [], "merged": ["merged"], "gguf": [step_of(type_) for type_ in asked.gguf]}[to.what]

    def run() -> Done:
        folder = trained.folder
        if to.what == "merged":
            folder = merged_folder(session)
        elif to.what == "gguf":
            folder = _side_by_side(session, [session.folder.artifacts / name for name in (*needs, PROJECTOR)])
            _describe(folder, session.spec.model, trained)
        result = hub.push(folder, to, _say)
        return Done(note=result.text(), figures=result.model_dump(mode="json"))

    return PlannedStep("push", run, needs)


def _side_by_side(session: Session[ExportSpec], folders: Sequence[Path]) -> Path:
    """One folder with links to the GGUF files in `folders`."""
    together = session.folder.work / "gguf"
    remove(together)
    together.mkdir()
    for folder in folders:
        for file in folder.glob("*.gguf"):
            os.link(file, together / file.name)
    return together


def _describe(folder: Path, base: str, trained: Trained) -> None:
    """Add the model card of a folder of GGUF files."""
    files = {file.name: file.stat().st_size for file in sorted(folder.glob("*.gguf"))}
    (folder / CARD).write_text(model_card("gguf", base, find_source(trained.folder), files=files), encoding="utf-8")


def step_of(type_: GgufType) -> str:
    """Name of the step and the artifact of a GGUF file."""
    return f"gguf-{type_}"


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


@contextmanager
def _written(target: Path, step: int) -> Iterator[Path]:
    """A new, hidden folder that becomes `target` at the end, with checksums; nothing is left of it after an error."""
    written = target.with_name(f".{target.name}.writing")
    remove(written)
    written.mkdir()
    try:
        yield written
        publish(written, target, step)
    except BaseException:
        remove(written)
        raise


class Files:
    """The GGUF files of one export, and the Ollama model made from one of them.

    Each file has its own folder, with a Modelfile. It is verified before the folder gets its name.

    Args:
        session: of the export job.
        trained: what it exports.
    """

    def __init__(self, session: Session[ExportSpec], trained: Trained) -> None:
        self._session = session
        self._trained = trained
        self._asked = session.spec.export
        # The whole model in Hugging Face format, and the step that makes it.
        self._model = merged_folder(session) if trained.is_adapter else trained.folder
        self._needs = ["merged"] if trained.is_adapter else []

    def steps(self) -> list[PlannedStep]:
        """One step for each file, then the step for Ollama."""
        # Types that the converter writes come first, because others may be quantised from one of them.
        types = sorted(self._asked.gguf, key=lambda type_: type_ not in gguf.CONVERTED)
        made = [
            PlannedStep(step_of(type_), partial(self._make, type_), self._needs, [self._folder(type_)])
            for type_ in types
        ]
        if types and self._reads_images():
            made.append(PlannedStep(PROJECTOR, self._make_projector, self._needs, [self._projector]))
        if self._asked.ollama is not None:
            made.append(PlannedStep("ollama", self._push, [*self._needs, step_of(self._asked.for_ollama)]))
        return made

    @property
    def _projector(self) -> Path:
        return self._session.folder.artifacts / PROJECTOR

    def _reads_images(self) -> bool:
        """Whether the model has a vision tower, by the config that it was trained from."""
        model = model_folder(self._session.spec.model, "model") if self._trained.is_adapter else self._model
        return reads_images(AutoConfig.from_pretrained(model))

    def _folder(self, type_: GgufType) -> Path:
        return self._session.folder.artifacts / step_of(type_)

    def _name(self, type_: GgufType) -> str:
        model = re.sub(r"[^A-Za-z0-9._-]", "-", Path(self._session.spec.model).name).strip(".-") or "model"
        return f"{model}-{self._session.spec.of}-{type_}.gguf"

    @cached_property
    def _reference(self) -> Reference:
        """The model as transformers reads it, once for all files."""
        return read_reference(self._model, say=_say)

    def _source(self, type_: GgufType) -> Path | None:
        """The file that a type is quantised from; None if the converter writes the type directly.

        It has the model's own precision. It may be one of the requested files; else it is made once, and kept until
        the job is done.
        """
        if type_ in gguf.CONVERTED:
            return None
        lossless = gguf.lossless(self._model)
        asked = self._folder(lossless) / self._name(lossless)
        if asked.is_file():
            return asked
        kept = self._session.folder.work / f"{lossless}.gguf"
        if not kept.is_file():  # a file with this name is complete
            # It is verified: else an error of the conversion could pass for rounding to few bits.
            gguf.make(self._model, kept, lossless, find_toolchain(), None, self._reference, _say)
        return kept

    def _make(self, type_: GgufType) -> Done:
        target, name = self._folder(type_), self._name(type_)
        with _written(target, self._trained.entry.step) as written:
            check = gguf.make(
                self._model, written / name, type_, find_toolchain(), self._source(type_), self._reference, _say
            )
            note = check.text()
            try:
                (written / "Modelfile").write_text(ollama.modelfile(written / name, self._model), encoding="utf-8")
            except ExportError as error:
                note += f"\nno Modelfile: {error}"
        return self._made(target, name, note, check.model_dump(mode="json"))

    def _make_projector(self) -> Done:
        """Make the projector file; skip it for a family whose file the converter does not write."""
        target, name = self._projector, f"{PROJECTOR_FILE}{self._name(gguf.lossless(self._model))}"
        with _written(target, self._trained.entry.step) as folder:
            try:
                check = gguf.make_projector(self._model, folder / name, find_toolchain(), _say)
            except NoProjector as error:
                raise Skipped(str(error)) from None
        return self._made(target, name, check.text(), check.model_dump(mode="json"))

    def _made(self, target: Path, name: str, note: str, figures: Figures) -> Done:
        sums = read_checksums(target)
        assert sums is not None, "written just now"
        artifact = listed(self._session, self._trained, target, "gguf", figures)
        return Done(artifact.model_copy(update={"sha256": sums.files[name].sha256}), note, figures)

    def _push(self) -> Done:
        asked = self._asked.ollama
        assert asked is not None, "there is no such step without it"
        result = ollama.push(self.file_of(self._asked.for_ollama), self._model, asked, _say)
        return Done(note=result.text(), figures=result.model_dump(mode="json"))

    def file_of(self, type_: GgufType) -> Path:
        """The GGUF file of a type, once its step is completed."""
        return self._folder(type_) / self._name(type_)

    def serving(self) -> PlannedStep:
        """The step that serves the result with the server's inference."""
        asked, trained = serve.asked_of_environment(), self._trained
        type_ = None if asked is None else gguf_of(asked)

        def push(name: str, url: str) -> None:
            assert type_ is not None, "Ollama serves a GGUF file"
            ollama.push(self.file_of(type_), self._model, OllamaServer(name=name, url=url), _say)

        def published() -> Done:
            adapter = trained.folder if trained.is_adapter else None
            return serve.Publication(self._session, adapter, None if type_ is None else self.file_of(type_), push).run()

        # Ollama gets the chat template from the model's folder.
        needs = [*self._needs] if isinstance(asked, OllamaServing) else []
        return PlannedStep("serve", published, needs if type_ is None else [*needs, step_of(type_)])
