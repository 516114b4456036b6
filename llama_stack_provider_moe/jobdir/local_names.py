"""Resolve names of jobs (`JOB`, `JOB/merged`, `JOB/epoch-2`) for commands that use no server.

They look for the job folders where the run configurations keep them: `$MOE_STATE_DIR/jobs` or `~/.llama/moe/jobs`. An
existing file or folder takes precedence over a job's name. The model of a command may also be a folder of the server's
`models`, as in a job: `$MOE_STATE_DIR/models/NAME`. Other names are hub ids and stay as they are.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import JOB_SPEC, ExportSpec, JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.ablation import MEASUREMENTS_FILE
from llama_stack_provider_moe.spec.probe import CARD_FILE
from llama_stack_provider_moe.spec.routing import REPORT_FILE

STATE_VARIABLE = "MOE_STATE_DIR"
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})(?:/((?:adapter|model|merged|(?:epoch|step)-\d+)))?")
_BEST = ("model", "merged", "adapter")


class _Job(NamedTuple):
    name: str
    folder: Path
    spec: JobSpec


def on_base(name: str, adapter: str | None = None, option: str = "MODEL") -> tuple[str, str | None]:
    """Return a model and its adapter. For a job that left only an adapter, this is the adapter and its base.

    Args:
        name: Name of a job, a folder, a model in the server's folder or a hub id.
        adapter: Name of a job or folder with an adapter, if one was given in addition.
        option: The option that `name` was given for, for errors.

    Raises:
        InvalidInput: The job has not completed, or left nothing with that name; or two adapters are named.
    """
    found = _found(name, option)
    if found is None or not _is_adapter(found[1]):
        model, its = (_own_model(name) if found is None else str(found[1])), None
    else:
        assert not isinstance(found[0].spec, ExportSpec)
        model, its = found[0].spec.model, str(found[1])
    if adapter is None:
        return model, its
    if its is not None:
        raise InvalidInput(option, name, f"{model!r}, its base: --adapter names an adapter already")
    return model, adapter_folder(adapter, "--adapter")


def whole_model(name: str, option: str = "MODEL") -> str:
    """Return a folder or a hub id; for a job, the folder of its whole model, and for a model of the server its folder.

    Raises:
        InvalidInput: As in `on_base`; or the job left only an adapter.
    """
    found = _found(name, option)
    if found is not None and _is_adapter(found[1]):
        job = found[0].name
        why = f"job {job!r} left an adapter: run `moe-train export {job} --merged` to create one"
        raise InvalidInput(option, name, f"a whole model; {why}")
    return _own_model(name) if found is None else str(found[1])


def adapter_folder(name: str, option: str) -> str:
    """Return a folder; for a job, the folder of its adapter.

    Raises:
        InvalidInput: As in `on_base`; or the job left a whole model.
    """
    bare = _NAME.fullmatch(name)
    if bare is not None and bare[2] is None and _job(name) is not None:
        name = f"{name}/adapter"
    found = _found(name, option)
    if found is not None and not _is_adapter(found[1]):
        raise InvalidInput(option, name, "an adapter; the job left a whole model")
    return name if found is None else str(found[1])


def job_or_artifact(name: str, option: str) -> str:
    """Return the folder of a job or of an artifact that it left."""
    job = _job(name)
    if job is not None:
        return str(job.folder)
    found = _found(name, option)
    return name if found is None else str(found[1])


def measurements_file(name: str, option: str) -> Path:
    """Return a file of measurements: the file itself, that in a folder, or that of a job.

    Raises:
        InvalidInput: there is no such file, or the job has not measured.
    """
    job = _job(name)
    path = Path(name) if job is None else job.folder / "artifacts" / "measurements"
    path = path / MEASUREMENTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise InvalidInput(
            option,
            name,
            f"a {MEASUREMENTS_FILE}, its folder, or the name of a completed job of recipe ablation_measure",
        )
    return path


def probe_folder(name: str, option: str) -> Path:
    """Return the folder of a probe: the folder itself, or that of a job.

    Raises:
        InvalidInput: there is no such folder, or the job has fitted no probe.
    """
    job = _job(name)
    path = Path(name) if job is None else job.folder / "artifacts" / "probe"
    if not (path / CARD_FILE).is_file():
        raise InvalidInput(option, name, f"a folder with {CARD_FILE}, or the name of a completed job of recipe probe")
    return path


def routing_file(name: str, option: str) -> Path:
    """Return the routing.json of a job: of an analysis, or of the rows that a measurement has read.

    Raises:
        InvalidInput: there is no such job, or it has not analysed routing.
    """
    job = _job(name)
    folders = () if job is None else (job.folder / "artifacts" / each for each in ("routing", "measurements"))
    for folder in folders:
        if (folder / REPORT_FILE).is_file():
            return folder / REPORT_FILE
    raise InvalidInput(option, name, "the name of a completed job of recipe routing_analysis, or ablation_measure of "
                       "a model with experts")  # fmt: skip


def _found(name: str, option: str) -> tuple[_Job, Path] | None:
    match = _NAME.fullmatch(name)
    job = None if match is None else _job(match[1])
    if match is None or job is None or Path(name).exists():
        return None
    if match[2] is not None:
        folder = _artifact(job, match[2])
        if folder is None:
            raise InvalidInput(option, name, f"an artifact that job {job.name!r} left; it left no {match[2]!r}")
        return job, folder
    if not (job.folder / "manifest.json").is_file():
        raise InvalidInput(option, name, f"a completed job, or the name of a checkpoint such as {job.name}/epoch-1")
    for each in _BEST:
        if (folder := _artifact(job, each)) is not None:
            return job, folder
    raise InvalidInput(option, name, f"a job that left a model or an adapter; its recipe is {job.spec.recipe!r}")


def _job(name: str) -> _Job | None:
    """Return the job with that name if this user may read its folder; None if a file or folder has the name."""
    folder = _jobs() / name
    if _NAME.fullmatch(name) is None or "/" in name or Path(name).exists():
        return None
    try:
        return _Job(name, folder, JOB_SPEC.validate_json((folder / "spec.json").read_bytes(), extra="ignore"))
    except (OSError, ValidationError):
        return None


def _own_model(name: str) -> str:
    """Return the folder of a model in the server's folder; other names stay as they are."""
    folder = _state() / "models" / name
    is_one = _NAME.fullmatch(name) is not None and not Path(name).exists() and (folder / "config.json").is_file()
    return str(folder) if is_one else name


def _state() -> Path:
    return Path(os.environ.get(STATE_VARIABLE) or "~/.llama/moe").expanduser()


def _jobs() -> Path:
    return _state() / "jobs"


def _artifact(job: _Job, name: str) -> Path | None:
    """Return the folder of the job's artifact; for `merged`, also look in the job's exports."""
    places = [job.folder / "artifacts", job.folder / "checkpoints"]
    spec = job.spec
    if isinstance(spec, TrainingSpec) and spec.checkpoint_dir is not None:
        places.append(Path(spec.checkpoint_dir) / job.name)
    if name == "merged":
        places += [path.parent for path in sorted(_jobs().glob("*/artifacts/merged")) if _is_export_of(path, job)]
    return next((place / name for place in places if (place / name).is_dir()), None)


def _is_export_of(merged: Path, job: _Job) -> bool:
    other = _job(merged.parent.parent.name)
    return other is not None and isinstance(other.spec, ExportSpec) and other.spec.of == job.name


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
