"""Decides who owns a folder: a job's files belong to its owner, even under an allowed root.

This check comes before the allowed roots. It compares folders by device and inode, not by name, because a link, a bind
mount, or a file system that ignores case gives the same folder another name.

Private folders, and who owns them:

    state_dir/jobs/<id>             the job's owner
    <checkpoint_dir>/<id>           the owner of the job whose spec.json names that `checkpoint_dir`
    all else in state_dir           the server (store, logs, staged rows), except `models`, which every job may read
    the folder of a file:// mirror  the server, because it has copies of every owner's jobs
    feedback.folder                 the server, because it has flagged conversations of every owner
"""

import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from llama_stack_provider_moe.control.server import hub_rows
from llama_stack_provider_moe.errors import Forbidden, InvalidInput, NotFound, shorten
from llama_stack_provider_moe.ground.small_files import real_path
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec import TrainingSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig


class Owned(NamedTuple):
    """A job's folder.

    Attributes:
        job_id: the job.
        root: the folder; everything in it belongs to the job.
        elsewhere: whether it is outside `state_dir/jobs`.
    """

    job_id: str
    root: Path
    elsewhere: bool


def job_folders(path: Path, config: ProviderConfig) -> list[Owned]:
    """Return the job folders that contain `path`, or are `path`; `path` must be real (no links)."""
    found = []
    below = _below(path, config.jobs_dir)
    if below is not None and below.parts:
        root = (path, *path.parents)[len(below.parts) - 1]  # under the name that it has in `path`
        found.append(Owned(below.parts[0], root, elsewhere=False))
    found += [Owned(root.name, root, elsewhere=True) for root in _checkpoint_folders(path, config)]
    return found


def is_private(path: Path, config: ProviderConfig) -> bool:
    """Return whether `path` (real) belongs to a job, the server or a mirror, so that no allowed root opens it."""
    if job_folders(path, config) or any(_below(path, each) is not None for each in _elsewhere(config)):
        return True
    in_a_server_folder = _below(path, config.state_dir) is not None or _below(path, config.jobs_dir) is not None
    return in_a_server_folder and _below(path, config.models_dir) is None


def readable_job_folder(
    path: Path, field: str, given: str, config: ProviderConfig, may_use_job: Callable[[str], None]
) -> Path | None:
    """Return the job folder that contains `path`, if the caller may read that job; None for paths outside all jobs.

    Args:
        path: a real path.
        field: the caller's name for the field.
        given: the value that the caller wrote.
        config: the server's configuration.
        may_use_job: raises NotFound unless the caller may read that job.

    Raises:
        NotFound: the job belongs to another owner; the text is the same as for a missing folder or job.
    """
    owned = job_folders(path, config)
    for each in owned:
        try:
            may_use_job(each.job_id)
        except NotFound:
            if each.elsewhere:  # the text for a missing folder under a root
                raise NotFound(f"{field}: there is no folder {given!r}") from None
            raise
    return owned[0].root if owned else None


def refuse_links(folder: Path, field: str, given: str, config: ProviderConfig) -> None:
    """Raise where a link in `folder` leads into a private folder. Links out of its root are not checked here.

    Args:
        folder: a real path.
        field: the caller's name for the field.
        given: the value that the caller wrote.
        config: the server's configuration.

    Raises:
        Forbidden: a link does.
        OSError: the folder can't be read, or a link is circular.
    """
    if is_private(folder, config):  # its owner was checked, and its links may not leave the job's folder
        return
    for file in folder.iterdir():
        if file.is_symlink() and is_private(real_path(file), config):
            raise Forbidden(f"{field}: {given!r} has a link, {file.name!r}, that leads into a job's folder")


def refuse_to_write(path: Path, field: str, given: str, config: ProviderConfig) -> None:
    """Raise where checkpoints may not go to `path`, whatever the allowed roots.

    Args:
        path: a real path.
        field: the caller's name for the field.
        given: the value that the caller wrote.
        config: the server's configuration.

    Raises:
        Forbidden: the path is in a job's folder, or in a part of the state folder other than `checkpoints`.
    """
    if job_folders(path, config):
        raise Forbidden(f"{field}: {given!r} is in the folder of a job; expected a folder outside all jobs' folders")
    if is_private(path, config) and _below(path, config.state_dir / "checkpoints") is None:
        raise Forbidden(f"{field}: {given!r} is in a private folder of the server; expected a folder in "
                        f"{str(config.state_dir / 'checkpoints')!r} or under an allowed root")  # fmt: skip
    if _below(path, config.models_dir) is not None:
        raise Forbidden(f"{field}: {given!r} is in {str(config.models_dir)!r}, whose models every job may read; "
                        "expected another folder")  # fmt: skip


def refuse_private_source(uri: str, field: str, dataset_id: str, config: ProviderConfig) -> None:
    """Raise where a data set's `uri` is a local file that belongs to a job or the server.

    The host reads data sets, and it reads any file that the server can read.

    Args:
        uri: where the rows are.
        field: the caller's name for the field.
        dataset_id: the data set.
        config: the server's configuration.

    Raises:
        Forbidden: the file belongs to a job or the server.
        InvalidInput: an address of the hub asks for more than rows of a data set.
    """
    parts = urlsplit(uri)
    if parts.scheme.lower() in ("http", "https", "data"):
        return
    if parts.scheme.lower() == hub_rows.SCHEME:
        try:
            hub_rows.arguments(uri)
        except ValueError as error:
            raise InvalidInput(field, dataset_id, f"a data set that jobs may read; its address {shorten(uri)} is not "
                               f"one: {error}") from None  # fmt: skip
    # pandas accepts a path, `file:` in several spellings, and fsspec's chains (`simplecache::file://...`). The hub's
    # library takes an id for a folder where the server was started, if there is one, and reads all that is below it.
    named = {uri, uri.rpartition("://")[2], parts.path, *chain.from_iterable(parse_qs(parts.query).values())}
    folder = parts.path.lstrip("/")
    if folder and parts.scheme and _holds_private(Path(folder), config):
        raise Forbidden(f"{field}: data set {dataset_id!r} is a folder that holds jobs of this server; register a copy "
                        "in another folder")  # fmt: skip
    for each in named | {unquote(name) for name in named} | {folder}:
        try:
            path = real_path(Path(each).expanduser())
        except (OSError, ValueError, RuntimeError):
            continue  # not a path
        if each and is_private(path, config):
            raise Forbidden(f"{field}: data set {dataset_id!r} is a file of a job or of this server; register a copy "
                            "in another folder")  # fmt: skip


def _holds_private(path: Path, config: ProviderConfig) -> bool:
    """Whether a folder of the server is below `path`."""
    try:
        real = real_path(path)
    except (OSError, ValueError, RuntimeError):
        return False
    folders = [config.state_dir, config.jobs_dir, *_elsewhere(config)]
    return real.is_dir() and any(_below(real_path(each), real) is not None for each in folders)


def _elsewhere(config: ProviderConfig) -> list[Path]:
    """The folders outside the state folder that hold what belongs to several owners."""
    feedback = None if config.feedback is None else config.feedback.folder
    return [each for each in (config.mirror.folder, feedback) if each is not None]


def _checkpoint_folders(path: Path, config: ProviderConfig) -> Iterator[Path]:
    """`path` and its parents, as far as they are checkpoint folders by the spec of the job of that name."""
    for folder in (path, *path.parents):
        job = JobFolder(config.jobs_dir / folder.name)
        if not folder.name or not job.spec.is_file():
            continue
        try:
            spec = job.read_spec()
        except (OSError, ValueError):
            continue  # the job is damaged, so its folders are unknown
        # Jobs that don't train write no checkpoints.
        elsewhere = isinstance(spec, TrainingSpec) and spec.checkpoint_dir is not None
        if elsewhere and _same(job.checkpoints(spec), folder):
            yield folder


def _below(path: Path, folder: Path) -> Path | None:
    """`path` relative to `folder`, which may have another name in `path`; None where it is not in `folder`."""
    try:
        real = real_path(folder)
    except OSError:
        return None  # its links are circular, so nothing is in it
    if path.is_relative_to(real):
        return path.relative_to(real)
    try:
        wanted = os.stat(real)
    except OSError:
        return None  # it does not exist, so nothing is in it
    for above in (path, *path.parents):
        try:
            if os.path.samestat(os.stat(above), wanted):
                return path.relative_to(above)
        except OSError:
            continue
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return real_path(one) == other or one.samefile(other)
    except OSError:
        return False
