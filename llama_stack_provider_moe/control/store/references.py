"""Which jobs' files a job needs: it names a model or an adapter in their folders."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import (
    AblationSpec,
    GRPOSpec,
    InferenceJob,
    JobSpec,
    MixSpec,
    ProbeSpec,
    SurgerySpec,
    TrainingSpec,
)
from llama_stack_provider_moe.spec.evaluated_job import EvaluatedJob


class Uses(NamedTuple):
    """Ids of jobs whose files a job needs.

    Attributes:
        always: The job needs their files for as long as it exists.
        to_complete: The job needs their files until it has completed. (A failed or cancelled job can be resumed.)
    """

    always: tuple[str, ...]
    to_complete: tuple[str, ...]


def uses_of(spec: JobSpec, jobs_dir: Path) -> Uses:
    """Return the jobs whose files a job needs.

    An adapter is useless without the model that it was trained on, and a probe without the model whose states it reads
    (and the adapter on it), so those are always needed. Everything else (a
    judge, branches, an adapter to analyse, the base of an export, measurements) is needed until the job has completed.
    Experts from an analysis (`from_analysis`, `masked_from_analysis`) are already part of the spec, and the parent of
    an export is in its row.

    Only resolved settings count. Other text comes from the caller and could name anybody's job, which could then
    not be deleted.

    Args:
        spec: The resolved specification, in which names are real paths (see `control.server.resolve`).
        jobs_dir: The folder that contains the job folders.
    """
    named = set(_jobs(_resolved(spec), jobs_dir)) - {spec.job_uuid}
    if isinstance(spec, InferenceJob) and spec.adapter_folder is not None:
        named |= _base_of(spec.adapter_folder, jobs_dir)
    if isinstance(spec, AblationSpec):
        named.add(spec.measurements)
    if isinstance(spec, EvaluatedJob) and spec.eval is not None and spec.eval.ablated is not None:
        named.add(spec.eval.ablated.measurements)
    always: set[str] = set()
    if isinstance(spec, TrainingSpec) and spec.adapter is not None:
        always = set(_jobs([spec.model], jobs_dir))
    elif isinstance(spec, ProbeSpec):
        always = set(named)
    return Uses(tuple(sorted(always)), tuple(sorted(named - always)))


def missing(spec: JobSpec, jobs_dir: Path) -> list[tuple[str, str]]:
    """Return (id of a job, path in its folder) for each model or adapter that the spec names and that no longer exists.

    The store forgets what a job needed from a deleted job, and a later job may have the same id.

    Args:
        spec: The resolved specification.
        jobs_dir: The folder that contains the job folders.
    """
    named = [path for path in _resolved(spec) if not Path(path).exists()]
    return [(job_id, path) for path in named for job_id in _jobs([path], jobs_dir)]


def _base_of(adapter: str, jobs_dir: Path) -> set[str]:
    """Return the job whose model the adapter was trained on."""
    found: set[str] = set()
    for job_id in _jobs([adapter], jobs_dir):
        try:
            found |= set(_jobs([JobFolder(jobs_dir / job_id).read_spec().model], jobs_dir))
        except (OSError, ValueError):  # damaged; then the base is the model that the analysis names
            continue
    return found


def _resolved(spec: JobSpec) -> list[str]:
    """Return every path that `control.server.resolve` put into the spec after it checked the caller's access."""
    found = [spec.model]
    if isinstance(spec, InferenceJob):
        found.append(spec.adapter_folder or "")
    if isinstance(spec, TrainingSpec):
        found.append("" if spec.adapter is None else spec.adapter.init_from or "")
        found += [] if (teacher := spec.teacher_named()) is None else [teacher[1]]
    if isinstance(spec, MixSpec):
        found += [spec.branches[at].model for at in spec.kept]
    if isinstance(spec, GRPOSpec):
        found += spec.grader_models().values()
    if isinstance(spec, SurgerySpec):
        found.append(spec.surgery.added.mlp_from or "")
    if isinstance(spec, EvaluatedJob):
        found.append("" if spec.eval is None else spec.eval.judge.model or "")
    return found


def _jobs(paths: Iterable[str], jobs_dir: Path) -> Iterator[str]:
    """Yield the ids of the jobs whose folders contain these paths."""
    root = jobs_dir.resolve()
    for path in paths:
        for home in {jobs_dir, root}:
            if path.startswith(f"{home}/"):
                yield path.removeprefix(f"{home}/").partition("/")[0]
