"""Resolves names of jobs' artifacts (`JOB`, `JOB/merged`, `JOB/epoch-2`) to folders, for jobs that the caller may read.

A folder in `state_dir/models` takes precedence over a job of the same name, and a job over the hub. The caller can't
see other users' jobs, so the name of such a job is an ordinary hub id.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import allowed_paths, exports, files, promises, views
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.store.wait_rows import Wait
from llama_stack_provider_moe.errors import Conflict, InvalidInput, NotFound
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import (
    EditingSpec,
    ExportSpec,
    InferenceJob,
    JobSpec,
    LoadingSpec,
    PlaygroundSpec,
    TrainingSpec,
)
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.serving_config import SERVED_PREFIX

_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})(?:/([A-Za-z0-9][A-Za-z0-9@._-]{0,199}))?")
# The names of artifacts (see `jobdir.folder`). A name with any other second part may be a hub id, whatever jobs exist.
_ARTIFACT = re.compile(r"(adapter|model|merged|routing|measurements|evaluation|(epoch|step)-\d+|gguf-[a-z0-9_]+)(@.+)?")
_BEST = ("model", "merged", "adapter")
_BEST_ADAPTER = ("adapter",)
_SHOWN = 12


class JobModel(NamedTuple):
    """A model or an adapter among a job's artifacts.

    Attributes:
        name: its name in the list of artifacts, `JOB/NAME`.
        path: its folder, absolute; `name` where the job has not written it yet.
        is_adapter: True for an adapter, False for a whole model.
        job_id: the job.
        spec: the job's specification; None if it can't be read.
    """

    name: str
    path: Path
    is_adapter: bool
    job_id: str
    spec: JobSpec | None

    @property
    def is_there(self) -> bool:
        """Whether the job has written it."""
        return self.path.is_absolute()

    def making_spec(self, field: str) -> exports.MakingSpec:
        """Return the spec of a job that trains or ablates; raise `InvalidInput` where it is not."""
        if isinstance(self.spec, exports.MakingSpec):
            return self.spec
        why = (
            "with a readable spec.json"
            if self.spec is None
            else f"that trains or ablates; the recipe of this one is {self.spec.recipe!r}"
        )
        raise InvalidInput(field, self.job_id, f"a job {why}")


class Names:
    """Resolves the names of models in one job, and notes how it resolved them.

    Args:
        request: maps field names to the caller's names, and gets a note for each resolved name.
        config: the server's configuration.
        store: the store that has the jobs.
        whose: the owner whose jobs the request may name; None for every owner's.
    """

    def __init__(self, request: Draft, config: ProviderConfig, store: JobStore, whose: str | None) -> None:
        self._request = request
        self._config = config
        self._store = store
        self._whose = whose

    def resolve_model_field(self, spec: LoadingSpec | EditingSpec) -> dict[str, object]:
        """Return the fields of a job that its `model` decides: `model`, `model_from`, and the field for an adapter.

        Raises:
            InvalidInput, Forbidden, NotFound, Conflict: the model does not exist, or the caller may not use it.
        """
        found = self.find(spec.model, "model")
        if found is None:
            model = allowed_paths.resolve_model(spec.model, self._request.name("model"), self._config, self._may_use)
            return {"model": model, "model_from": self._name_of(model)}
        field = self._request.name("model")
        if not found.is_adapter:
            self._check_model(found, field, spec.model)
            return {"model": str(found.path), "model_from": found.name}
        base = found.making_spec(field).model
        if not found.is_there and may_be_later(base):
            self._request.waits.names.add(base)
        changes: dict[str, object] = {"model": base, "model_from": found.name}
        if isinstance(spec, EditingSpec):
            raise InvalidInput(field, spec.model, f"a whole model; {found.name} is an adapter ({_merge_first(found)})")
        if isinstance(spec, InferenceJob):
            if spec.adapter_folder is not None:
                raise InvalidInput(
                    field, spec.model, f"{base!r}, its base, as `adapter_folder` already names an adapter"
                )
            self._note(field, spec.model, f"the adapter {found.name} on its base {base}")
            return changes | {"adapter_folder": str(found.path), **as_trained(spec, found.making_spec(field))}
        if spec.recipe != "sft" or spec.adapter is None or spec.adapter.init_from or spec.loader != "hf":
            raise InvalidInput(field, spec.model, _what_to_write(spec, found, base))
        self._note(field, spec.model, f"the adapter {found.name} on its base {base}: the job's adapter starts from it")
        return changes | {"adapter": spec.adapter.model_copy(update={"init_from": str(found.path)})}

    def whole_model(self, value: str, path: str, heads: tuple[str, ...] = allowed_paths.CAUSAL_HEADS) -> str:
        """Return a hub id, or the folder of a whole model, for the setting `path` (dotted name in `spec`).

        Raises:
            InvalidInput, Forbidden, NotFound, Conflict: as above, or it is an adapter.
        """
        field = self._request.name(path)
        found = self.find(value, path)
        if found is None:
            return allowed_paths.resolve_model(value, field, self._config, self._may_use, heads)
        if found.is_adapter:
            raise InvalidInput(field, value, f"a whole model; {found.name} is an adapter ({_merge_first(found)})")
        self._check_model(found, field, value, heads)
        return str(found.path)

    def _check_model(
        self, found: JobModel, field: str, value: str, heads: tuple[str, ...] = allowed_paths.CAUSAL_HEADS
    ) -> None:
        if found.is_there:
            allowed_paths.check_model(found.path, found.path, field, value, heads)
            self._note(field, value, f"{found.name}, in {found.path}")

    def completed(self, job_id: str, path: str, recipes: Sequence[str], left: str) -> Job | None:
        """Return a job that has completed, for the setting `path`; None if this job waits for it.

        Args:
            job_id: the job's id, as the caller wrote it.
            path: the setting, a dotted name in `spec`.
            recipes: the recipes that the job may have.
            left: what is needed of it, in the plural or singular, for the error: "its report is".

        Raises:
            InvalidInput: the job has another recipe.
            Conflict: the job has not completed, and is not waited for.
            NotFound: the caller has no such job.
        """
        field = self._request.name(path)
        sibling = self._request.siblings.get(job_id)
        job = None if sibling is not None else self._store.get(job_id, self._whose)
        has = sibling.recipe if sibling is not None else job.recipe if job is not None else ""
        if has not in recipes:
            expected = " or ".join(map(repr, recipes))
            raise InvalidInput(field, job_id, f"a job of recipe {expected}; this one has recipe {has!r}")
        if job is not None and (job.state.ended or not self._request.may_wait):
            if job.state is not JobState.COMPLETED:
                raise Conflict(f"{field}: job {job_id!r} is {job.state.value}; {left} available once it has completed")
            return job
        self._wait(Wait(job_id), field, job_id)
        return None

    def adapter(self, value: str, path: str) -> tuple[Path, dict[str, object], exports.MakingSpec | None]:
        """Return an adapter's folder, the content of its adapter_config.json, and the spec of the job that made it.

        Raises:
            InvalidInput, Forbidden, NotFound, Conflict: as above, or it is a whole model.
        """
        field = self._request.name(path)
        found = self.find(value, path, _BEST_ADAPTER)
        if found is None:
            folder, config = allowed_paths.resolve_adapter_folder(value, field, self._config, self._may_use)
            job = self._job_of(folder)
            return folder, config, None if job is None else exports.spec_of(job, field)
        if not found.is_adapter:
            raise InvalidInput(field, value, f"an adapter; {found.name} is a whole model, which `model` can name")
        if not found.is_there:
            return found.path, {}, found.making_spec(field)
        self._note(field, value, f"{found.name}, in {found.path}")
        config = allowed_paths.check_adapter(found.path, found.path, field, value)
        return found.path, config, found.making_spec(field)

    def check_model_from(self, stated: str | None, paths: Sequence[object]) -> None:
        """Raise `InvalidInput` unless a stated `model_from` names one of `paths`.

        The spec of a job has this field, and a caller may submit that spec again.
        """
        if stated is None:
            return
        found = self.find(stated, "model_from")
        if found is None or str(found.path) not in paths:
            raise InvalidInput(self._request.name("model_from"), stated, "no value: the server derives it from `model`")

    def find(self, value: str, path: str, best: tuple[str, ...] = _BEST) -> JobModel | None:
        """Return the model or adapter that `value` names; None where it does not name one of the caller's jobs.

        Args:
            value: the name, as the caller wrote it.
            path: the setting, a dotted name in `spec`.
            best: the artifacts that a bare job name may mean; the first one that the job has counts.

        Raises:
            Conflict: the job has ended without completing, or has not completed and is not waited for.
            NotFound: the job has, or will have, no artifact of that name.
            InvalidInput: the artifact is neither a model nor an adapter.
        """
        field, serving = self._request.name(path), self._config.serving
        if serving is not None:  # a result that is served, by its id in the host's inference
            value = value.removeprefix(f"{serving.provider_id}/{SERVED_PREFIX}")
        match = _NAME.fullmatch(value)
        job_id, slash, name = value.partition("/")
        if job_id in self._request.siblings:  # never a hub id, so any other name is a mistake
            named = (name or slash) if slash else None
            return self._promised(job_id, self._request.siblings[job_id], named, field, value, best)
        if match is None or (self._config.models_dir / value).is_dir():
            return None
        try:
            job = self._store.get(match[1], self._whose)
        except NotFound:
            return None
        if match[2] is not None and not _ARTIFACT.fullmatch(match[2]):
            self._request.hints[value] = self._has_none(job, match[2])
            return None
        if not job.state.ended:
            if not self._request.may_wait:
                raise Conflict(f"{field}: job {job.id!r} is {job.state.value}; you can use its artifacts once it has "
                               "completed")  # fmt: skip
            return self._promised(job.id, _spec_of(job), match[2], field, value, best)
        kinds = {each.name: each.artifact.kind for each in exports.listed(job, self._store)}
        if self._will_be_exported(job, match[2], kinds):
            return self._promised(job.id, _spec_of(job), match[2], field, value, best)
        name = match[2] or _best(job, kinds, field, best)
        if name not in kinds:
            made = (
                f" (`moe-train export {job.id} --merged` makes it)" if name == "merged" and "adapter" in kinds else ""
            )
            raise NotFound(f"{field}: job {job.id!r} has no artifact {name!r}{made}; its artifacts: {_listed(kinds)}")
        if kinds[name] not in ("model", "merged", "adapter", "checkpoint"):
            raise InvalidInput(field, value, f"a model or an adapter; {name!r} of job {job.id!r} is neither")
        folder = files.folder(job, self._store, name)
        is_adapter = (folder / "adapter_config.json").is_file()
        return JobModel(f"{job.id}/{name}", folder, is_adapter, job.id, _spec_of(job))

    def _has_none(self, job: Job, name: str) -> str:
        """Say that a job, whose name a hub id may begin with too, has no such artifact, and which it has."""
        if job.state.ended:
            kinds = {each.name: each.artifact.kind for each in exports.listed(job, self._store)}
            return f"job {job.id!r} has no artifact {name!r}; its artifacts: {_listed(kinds)}"
        spec = _spec_of(job)
        kinds = {} if spec is None else promises.of(spec)
        return f"job {job.id!r} will leave no {name!r}; it will leave: {_listed(kinds)}"

    def _promised(
        self, job_id: str, spec: JobSpec | None, name: str | None, field: str, value: str, best: tuple[str, ...]
    ) -> JobModel:
        """What a job that has not completed will leave, which this job will wait for."""
        if spec is None:
            raise InvalidInput(field, value, "a job with a readable spec.json")
        kinds = promises.of(spec)
        if name == "merged" and name not in kinds and self._exported_later(job_id):
            kinds[name] = "merged"
        chosen = name or next((each for each in best if each in kinds), None)
        if chosen is None or (chosen not in kinds and not promises.is_checkpoint(chosen, spec)):
            what = "adapter" if best == _BEST_ADAPTER else "model or adapter"
            wanted = repr(name) if name else f"{what}, with its recipe {spec.recipe!r}"
            more = "; for that, set options.save_merged in it" if name == "merged" and "adapter" in kinds else ""
            raise NotFound(f"{field}: job {job_id!r} will leave no {wanted}{more}; it will leave: {_listed(kinds)}")
        found = f"{job_id}/{chosen}"
        is_adapter = promises.is_adapter(chosen, spec)
        through_export = chosen == "merged" and isinstance(spec, TrainingSpec) and not promises.saves_merged(spec)
        self._wait(Wait(job_id, through_export), field, value)
        self._request.waits.names.add(found)
        return JobModel(found, Path(found), is_adapter, job_id, spec)

    def _wait(self, wait: Wait, field: str, value: str) -> None:
        jobs = self._request.waits.jobs
        jobs[wait.used] = wait if wait.through_export else jobs.get(wait.used, wait)
        self._note(field, value, f"what job {wait.used} will leave: this job waits for it")

    def _will_be_exported(self, job: Job, name: str | None, kinds: Mapping[str, str]) -> bool:
        wanted = self._request.may_wait and name == "merged" and name not in kinds
        return wanted and job.state is JobState.COMPLETED and self._exported_later(job.id)

    def _exported_later(self, job_id: str) -> bool:
        """Whether an export of the job that makes `merged` waits or runs."""
        if job_id in self._request.siblings:
            return False
        exporting = [job for job in self._store.exports(job_id) if not job.state.ended]
        return any(isinstance(spec := _spec_of(job), ExportSpec) and spec.export.merged for job in exporting)

    def _note(self, field: str, value: str, text: str) -> None:
        self._request.notes.append(f"{field}: {value!r} is {text}")

    def _may_use(self, job_id: str) -> None:
        self._store.get(job_id, self._whose)

    def _job_of(self, folder: Path) -> Job | None:
        """The job whose folder has an adapter that the caller may read; None for a folder outside all jobs."""
        if not folder.is_relative_to(self._config.jobs_dir):
            return None
        return self._store.get(folder.relative_to(self._config.jobs_dir).parts[0], self._whose)

    def _name_of(self, model: str) -> str | None:
        """`JOB/NAME` of a path in a job's folder; None for other paths."""
        path = Path(model)
        if not path.is_absolute() or not path.is_relative_to(self._config.jobs_dir):
            return None
        return f"{path.relative_to(self._config.jobs_dir).parts[0]}/{path.name}"


def as_trained(spec: InferenceJob, source: exports.MakingSpec | None) -> dict[str, object]:
    """Return the fields of a playground that load the base as it was while its adapter trained, unless it states them.

    Args:
        spec: the requested job.
        source: of the job that left the adapter.
    """
    if not isinstance(spec, PlaygroundSpec) or spec.training.quantize_bits is not None:
        return {}
    adapter = source.adapter if isinstance(source, TrainingSpec) else None
    if adapter is None or not adapter.quantize_base:
        return {}
    as_there = {"quantize_bits": adapter.quantize_bits, "quantize_scales": adapter.quantize_scales}
    return {"training": spec.training.model_copy(update=as_there)}


def _best(job: Job, kinds: Mapping[str, str], field: str, best: tuple[str, ...]) -> str:
    """The artifact that the bare name of a job means: the first of `best` that it has. The job must have completed."""
    if job.state is not JobState.COMPLETED:
        saved = [f"{job.id}/{name}" for name, kind in kinds.items() if kind in ("checkpoint", *_BEST)]
        ways = f"name one of its artifacts ({', '.join(saved[:_SHOWN])}), or resume it" if saved else "resume it first"
        raise Conflict(f"{field}: job {job.id!r} is {job.state.value} and has no finished model; {ways}")
    found = next((name for name in best if name in kinds), None)
    if found is None:
        what = "an adapter" if best == _BEST_ADAPTER else "a model or an adapter"
        raise InvalidInput(field, job.id, f"a job with {what}; the artifacts of this one, of recipe {job.recipe!r}: "
                           f"{_listed(kinds)}")  # fmt: skip
    return found


def _listed(kinds: Mapping[str, str]) -> str:
    more = ", ..." if len(kinds) > _SHOWN else ""
    return ", ".join(list(kinds)[:_SHOWN]) + more if kinds else "nothing"


def may_be_later(value: str) -> bool:
    """Whether a name in a job's spec stands for what another job will leave (`Draft.waits`)."""
    match = _NAME.fullmatch(value)
    return match is not None and match[2] is not None and _ARTIFACT.fullmatch(match[2]) is not None


def _spec_of(job: Job) -> JobSpec | None:
    try:
        return views.folder_of(job).read_spec()
    except (OSError, ValidationError):
        return None


def _merge_first(found: JobModel) -> str:
    if not found.is_there:
        return f"set options.save_merged in that job, and write {found.job_id + '/merged'!r}"
    return f"run `moe-train export {found.job_id} --merged`, and write {found.job_id + '/merged'!r}"


def _what_to_write(spec: TrainingSpec, found: JobModel, base: str) -> str:
    """Why an adapter can't be the `model` of this job, and what to write instead."""
    fields = f'"model": "{base}", "adapter": {{"init_from": "{found.name}"}}'
    merge = _merge_first(found)
    if spec.adapter is None:
        return f"a whole model, because all weights train (adapter null); {found.name} is an adapter: {merge}"
    if spec.adapter.init_from:
        return f"{base!r}, the base of {found.name}, as adapter.init_from already names an adapter to start from"
    if spec.loader != "hf":
        return f"a whole model with loader {spec.loader!r}; {found.name} is an adapter: {merge}"
    return (
        f"a whole model, because recipe {spec.recipe!r} compares with this model, and {found.name} is an adapter. To "
        f"compare with its base, write {fields}. To compare with what {found.job_id} learned, {merge}"
    )
