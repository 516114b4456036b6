"""Profiles of uploaded data sets: the figures of `moe-train data check`, from the server.

A profile of many rows takes minutes, so it is made in the background. A request waits some seconds for it, and is told
to come again if it is not ready. It is kept in the folder of its version, and deleted with it.
"""

import asyncio
import hashlib
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.wire_datasets import DatasetProfile
from llama_stack_provider_moe.control.store import dataset_files
from llama_stack_provider_moe.control.store.dataset_rows import DatasetVersion
from llama_stack_provider_moe.control.supervisor.executors.local import training_environment
from llama_stack_provider_moe.errors import InvalidInput, ModelError, NotFound, Unavailable
from llama_stack_provider_moe.ground import run
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.spec import TrainingSpec
from llama_stack_provider_moe.spec.data_profile import DataProfile, stood_in
from llama_stack_provider_moe.spec.row_files import loaded_row
from llama_stack_provider_moe.spec.rows.profiling import RowsProfiler
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.training_jobs import TrainingRecipe

WAIT_S = 20.0  # for a profile, before the caller is told to come again
SHOWN = 6  # sequences with their learnt tokens
SHOWN_TOKENS = 2048  # of each: a row may have a million
LIMIT_S = 3600.0  # of the process that counts tokens
_MODULE = "llama_stack_provider_moe.compute.data.token_profile"
_SAID_LIMIT = 2000  # characters
_MOST_KEPT = 64  # profiles that failed, until they are asked for again
log = logging.getLogger(__name__)
# Recipes whose models write answers, and the block that says how.
WRITING: dict[TrainingRecipe, str] = {"grpo": "rl", "distill": "generation"}
_making = Pool("moe-profiles", 1, 64, "profiles of data sets")


class Profiles:
    """Makes profiles, one at a time.

    Args:
        config: the server's configuration.
        guard: the service's threads.
    """

    def __init__(self, config: ProviderConfig, guard: Guard) -> None:
        self._config = config
        self._guard = guard
        self._running: dict[Path, Future[DataProfile]] = {}

    async def get(self, found: DatasetVersion, spec: TrainingSpec, has_model: bool) -> DatasetProfile:
        """Return the profile of a version, or that it is being made.

        Args:
            found: the version.
            spec: the job whose settings count.
            has_model: whether the job's model is meant; without it no token is counted.

        Raises:
            InvalidInput: the model has no tokenizer or chat template that can be used.
            Unavailable: too many profiles are being made, or the process that counts tokens failed.
        """
        rows = dataset_files.rows_of(self._config, found.id)
        path = rows.with_name(f"profile-{_key(spec, has_model)}.json")
        ready = await self._guard.in_state_dir(_kept, path)
        if ready is None:
            ready = await self._made(path, partial(_make, self._config, rows, path, spec, has_model))
        if ready is None:
            return DatasetProfile(name=found.name, sha256=found.sha256, is_ready=False, profile=None)
        return DatasetProfile(name=found.name, sha256=found.sha256, is_ready=True, profile=ready)

    async def _made(self, path: Path, make: "partial[DataProfile]") -> DataProfile | None:
        future = self._running.get(path)
        if future is None:
            for other in [name for name, each in self._running.items() if each.done()][: -_MOST_KEPT or None]:
                del self._running[other]
            future = self._running[path] = _making.submit(make)
        waiting = asyncio.wrap_future(future)
        done, _ = await asyncio.wait({asyncio.shield(waiting)}, timeout=WAIT_S)
        if not done:
            return None
        self._running.pop(path, None)
        return await waiting


def draft(
    name: str,
    model: str | None,
    recipe: TrainingRecipe,
    max_length: int | None,
    max_completion_length: int | None,
) -> Draft:
    """Return the job whose settings count.

    Args:
        name: the data set.
        model: as in a job; None if no token is counted.
        recipe: of the job.
        max_length: `options.max_length`; None: the default.
        max_completion_length: of a job whose model writes answers; None: the default.

    Raises:
        InvalidInput: `max_completion_length` is given for a recipe whose model writes no answers.
    """
    body: dict[str, object] = {"recipe": recipe, "model": model or "none", "data": {"dataset_id": f"data:{name}"}}
    if max_length is not None:
        body["options"] = {"max_length": max_length}
    names = {"options.max_length": "max_length"}
    writing = WRITING.get(recipe)
    if max_completion_length is not None:
        if writing is None:
            known = " or ".join(map(repr, WRITING))
            expected = f"nothing with recipe {recipe!r}; recipe {known} has it"
            raise InvalidInput("max_completion_length", max_completion_length, expected)
        body[writing] = {"max_completion_length": max_completion_length}
        names[f"{writing}.max_completion_length"] = "max_completion_length"
    if recipe == "circuit_breaker":
        body["circuit_breaker"] = {"retain": {"dataset_id": f"data:{name}"}}
    return Draft(body | stood_in(recipe, body["model"]), names, may_wait=False)


def _key(spec: TrainingSpec, has_model: bool) -> str:
    """A name for the settings that a profile depends on."""
    known = {
        "version": version_of("llama-stack-provider-moe"),
        "has_model": has_model,
        "shown": [SHOWN, SHOWN_TOKENS],
        "job": spec.model_dump(mode="json", exclude={"job_uuid"}),
    }
    if has_model and Path(spec.model).is_dir():  # a folder may get other files
        known["files"] = sorted(
            (path.name, path.stat().st_mtime_ns) for path in Path(spec.model).iterdir() if path.is_file()
        )
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _kept(path: Path) -> DataProfile | None:
    try:
        return DataProfile.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):  # not made yet, or by another version of this package
        return None


def _make(config: ProviderConfig, rows: Path, path: Path, spec: TrainingSpec, has_model: bool) -> DataProfile:
    source = spec.row_sources()[0]
    profiler = RowsProfiler(
        spec.recipe, source.format, source.columns, "data.columns", answered=source.answered, needs=source.needs
    )
    config.privacy.make_folder(config.state_dir / "staging")
    with tempfile.TemporaryDirectory(dir=config.state_dir / "staging", prefix="profile-") as folder:
        valid = Path(folder) / "rows.jsonl"
        with valid.open("wb") as out:
            profiler.add_all(_rows(rows), out)
        profile = profiler.profile()
        if has_model and profile.refused < profile.rows:
            profile = _with_tokens(config, spec, profile, valid)
    if rows.exists():  # the version may have been deleted meanwhile
        write_atomic(path, profile, mode=0o666 & ~config.privacy.umask)
    return profile


def _rows(path: Path) -> Iterator[object]:
    try:
        with path.open("rb") as file:
            for line in file:
                yield loaded_row(line)
    except FileNotFoundError:
        raise NotFound("the version of the data set was deleted just now") from None


def _with_tokens(config: ProviderConfig, spec: TrainingSpec, profile: DataProfile, valid: Path) -> DataProfile:
    request = json.dumps({"job": spec.model_dump(mode="json"), "rows": str(valid), "show": SHOWN})
    try:
        done = subprocess.run(
            run.command(config.training_python, _MODULE), check=False, input=request, capture_output=True, text=True,
            errors="replace", timeout=LIMIT_S, env=training_environment(os.environ, config), cwd=config.state_dir,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable(f"counting tokens did not end within {LIMIT_S:g} s") from None
    if done.returncode or not done.stdout:
        log.error("counting tokens ended with exit code %d: %s", done.returncode, done.stderr[-_SAID_LIMIT:].strip())
        raise Unavailable(f"counting tokens ended with exit code {done.returncode}; see the server's log")
    try:
        found = profile.with_tokens(done.stdout)
    except ModelError as error:
        raise InvalidInput("model", spec.model_from or spec.model, f"a model that can render rows ({error})") from None
    return found.model_copy(update={"shown": [each.first(SHOWN_TOKENS) for each in found.shown]})
