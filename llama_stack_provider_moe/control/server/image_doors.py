"""The doors through which the images of a job's rows come, and what a job on such rows can't be."""

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.store.image_folder import ImageFolder, beside
from llama_stack_provider_moe.control.supervisor.executors.local import training_environment
from llama_stack_provider_moe.errors import InvalidInput, MoeError, TooLarge
from llama_stack_provider_moe.ground.hub_cache import cached_model
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import JobSpec, LoadingSpec, TrainingSpec
from llama_stack_provider_moe.spec.image_limits import require_trainable_images
from llama_stack_provider_moe.spec.rows import RowsReport
from llama_stack_provider_moe.spec.rows.image_files import BadImage
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.rows.images import ImagePart
from llama_stack_provider_moe.spec.rows.message_reading import IMAGES_NOTE
from llama_stack_provider_moe.spec.server_config import ProviderConfig

_FETCH_LIMIT_S = 120.0
_CONFIG_BYTES = 4 << 20


def of_job(
    config: ProviderConfig, deps: compat.Deps, dataset_id: str, folder: JobFolder | None, rows: Path | None
) -> ImageDoor:
    """Return the door of one of a job's data sets. Call it on the event loop; the door is used in threads.

    Args:
        config: the server's configuration.
        deps: the host's APIs.
        dataset_id: the data set, for errors.
        folder: the staged folder of the job, which gets the images; None: they are only checked.
        rows: the file of an uploaded data set, whose images are beside it; None: another data set.
    """
    taken = 0

    def admit(size_bytes: int) -> None:
        nonlocal taken
        taken += size_bytes
        if taken > config.max_dataset_bytes:
            raise TooLarge(f"{dataset_id}: its images have more than {config.max_dataset_bytes:,} bytes "
                           "(`max_dataset_bytes` of this server)")  # fmt: skip

    images = None if folder is None else ImageFolder(folder.images, config.privacy, admit)
    stored = None if rows is None else ImageFolder(beside(rows), config.privacy, admit)

    def keep(content: bytes, part: ImagePart) -> None:
        if images is not None:
            images.keep(content, part)

    def has(part: ImagePart) -> bool:
        assert stored is not None
        return stored.has(part) if images is None else images.take_from(stored.path, part)

    return ImageDoor(config.images, keep, None if stored is None else has, files_of_host(config, deps))


def files_of_host(config: ProviderConfig, deps: compat.Deps) -> Callable[[str], bytes] | None:
    """Return what reads a file of the host by its id, as the caller may; None where a host has no files.

    Call it on the event loop; what it returns is used in threads that run in the caller's context.
    """
    if not compat.has_files(deps):
        return None
    loop = asyncio.get_running_loop()

    def fetch(file_id: str) -> bytes:
        read = compat.file_bytes(deps, file_id, config.images.max_bytes + 1)
        try:
            return asyncio.run_coroutine_threadsafe(read, loop).result(_FETCH_LIMIT_S)
        except MoeError as error:
            raise BadImage(f"is file {file_id!r}, which can't be read: {error}") from None
        except TimeoutError:
            raise BadImage(f"is file {file_id!r}, which is not there within {_FETCH_LIMIT_S:g} seconds") from None

    return fetch


async def check(
    request: Draft, spec: JobSpec, reports: Mapping[str, RowsReport], config: ProviderConfig, guard: Guard
) -> None:
    """Check that a job can train on the images of its rows, once these were read.

    Args:
        request: has the caller's names of settings.
        spec: the job.
        reports: what was found in each part of its rows.
        config: the server's configuration.
        guard: runs the parts that may block.

    Raises:
        InvalidInput: its rows have images, and a setting or the model is for text alone; or the other way round.
    """
    with_images = sum(report.notes.get(IMAGES_NOTE, 0) for report in reports.values())
    if not with_images:
        vision = spec.adapter.vision if isinstance(spec, TrainingSpec) and spec.adapter is not None else "off"
        if vision != "off":
            raise InvalidInput(request.name("adapter.vision"), vision, "'off', because no row has an image")
        return
    because = f"because {with_images:,} of the rows have images"
    if isinstance(spec, TrainingSpec) and spec.data.packed:
        raise InvalidInput(request.name("data.packed"), True, f"false, {because}: each row keeps its own images")
    try:
        require_trainable_images(spec)
    except InvalidInput as error:
        raise InvalidInput(request.name(error.field), error.value, error.expected) from None
    if not isinstance(spec, LoadingSpec):
        return
    environment = training_environment(os.environ, config)
    found = await guard.in_job_paths(f"model {spec.model!r}", _config_of, spec.model, environment)
    if found is not None and not _reads_images(found):
        raise InvalidInput(request.name("model"), spec.model, f"a model that reads images, {because}; this one "
                           f"({found['model_type']}) reads text alone")  # fmt: skip


def _config_of(model: str, environment: Mapping[str, str]) -> Mapping[str, object] | None:
    """The config.json of a model on this machine; None if it is elsewhere, or says too little."""
    folder = Path(model) if os.path.isabs(model) else cached_model(model, environment)
    if folder is None:
        return None
    try:
        with (folder / "config.json").open("rb") as file:
            found = json.loads(file.read(_CONFIG_BYTES))
    except (OSError, ValueError):  # the job says what is wrong with it
        return None
    says_enough = isinstance(found, dict) and isinstance(found.get("model_type"), str)
    return cast("Mapping[str, object]", found) if says_enough else None


def _reads_images(config: Mapping[str, object]) -> bool:
    thinker = config.get("thinker_config")  # of models that also speak
    parts = (config, thinker if isinstance(thinker, dict) else {})
    return any(part.get("vision_config") is not None for part in parts)
