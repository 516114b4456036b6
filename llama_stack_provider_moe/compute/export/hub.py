"""Push a folder to a repository on the Hugging Face hub with huggingface_hub.

The token is only HF_TOKEN of this process; the hub is HF_ENDPOINT (default huggingface.co). A new repository is private
unless the job asks otherwise; a push that should be private never goes to a public repository. Afterwards the hub is
asked for its file list. Files that are already there are not sent again, so you can simply repeat an interrupted push.
"""

import importlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Protocol

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub import utils as hub_utils
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from pydantic import BaseModel, Field

from llama_stack_provider_moe.errors import ExportError, InvalidInput
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.destinations import HubPush, check_url

Say = Callable[[str], None]
ENDPOINT = "https://huggingface.co"
_HTTPError: type[Exception] = vars(hub_errors)["HTTPError"]  # the class of its own httpx, which it does not export
_XET_BARS = "huggingface_hub.utils._xet_progress_reporting"
_HIDDEN = (".*", "**/.*", "**/.*/**")  # names of unfinished files


class _Progress(Protocol):
    """What Xet reports about a group of files."""

    total_bytes_completed: int
    total_transfer_bytes_completed: int


class HubResult(BaseModel):
    """The result of a push."""

    repo_id: str
    url: str
    commit: str = Field(description="Commit of the default branch.")
    private: bool
    files: int = Field(description="Number of files in the folder; the hub has each with its size.")
    bytes: int

    def text(self) -> str:
        """The result in words."""
        kind = "private" if self.private else "public"
        return f"{self.url} ({kind}): {self.files} files, {self.bytes:,} bytes, commit {self.commit[:12]}"


def push(folder: Path, hub: HubPush, say: Say = print) -> HubResult:
    """Upload all files of `folder` except hidden ones; other files in the repository stay.

    Raises:
        InvalidInput: the folder does not exist or is empty, or HF_ENDPOINT is not a valid address.
        ExportError: there is no token, the token can't write there, the repository is public but should be private, or
            the hub does not answer or lacks a file that was sent.
    """
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not files:
        raise InvalidInput("folder", str(folder), "a folder with files in it")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise ExportError("push: HF_TOKEN is not set in the environment of the training process")
    endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
    try:
        endpoint = check_url(endpoint)
    except ValueError as error:
        raise InvalidInput("HF_ENDPOINT", endpoint, "http://HOST:PORT or https://HOST[:PORT]") from error
    api = HfApi(endpoint=endpoint, token=token)
    with _clear_errors(hub.repo_id, endpoint):
        repository = api.create_repo(hub.repo_id, private=hub.private, repo_type="model", exist_ok=True)
        before = api.model_info(hub.repo_id)
        if hub.private and not before.private:
            raise ExportError(f"push: {hub.repo_id} is public, and push.private is true; nothing was sent")
        say(f"push: {len(files)} files, {sum(files.values()):,} bytes, to {repository}")
        with liveness.stage(f"pushing to {hub.repo_id}", sum(files.values()), "bytes") as counter, _counted(counter):
            api.upload_folder(
                repo_id=hub.repo_id, folder_path=folder, repo_type="model", ignore_patterns=[*_HIDDEN],
                commit_message=f"Upload of {folder.name}",
            )  # fmt: skip
        after = api.model_info(hub.repo_id, files_metadata=True)
    there = {each.rfilename: each.size for each in after.siblings or ()}
    if lost := [name for name, size in files.items() if there.get(name) != size]:
        raise ExportError(f"push: {len(lost)} file(s) in {hub.repo_id} differ from those sent: {', '.join(lost[:3])}")
    return HubResult(
        repo_id=hub.repo_id, url=str(repository), commit=str(after.sha), private=bool(after.private), files=len(files),
        bytes=sum(files.values()),
    )  # fmt: skip


@contextmanager
def _counted(counter: liveness.Counter) -> Iterator[None]:
    """Count the bytes that huggingface_hub (2.4) sends inside the `with`; it only offers them to its progress bars."""

    class Reporter:
        """Replaces the progress bars of an upload by Xet, which are updated continuously, even without progress."""

        def __init__(self, *_: object, **__: object) -> None:
            self._moved = (0, 0)

        def update_progress(self, group: _Progress, _: object = None) -> None:
            """Bytes read and bytes sent of all files so far."""
            moved = (group.total_bytes_completed, group.total_transfer_bytes_completed)
            if moved != self._moved:
                self._moved = moved
                counter.at(moved[0])

        def close(self) -> None:
            """Nothing to close."""

    @contextmanager
    def streamed(path: Path | str) -> Iterator[IO[bytes]]:
        with _CountedFile(Path(path), counter) as file:
            yield file

    ours: dict[str, object] = {"are_progress_bars_disabled": lambda: False, "tqdm_stream_file": streamed}
    places: list[tuple[ModuleType, dict[str, object]]] = [(hub_utils, ours)]
    if importlib.util.find_spec(_XET_BARS) is not None:
        places.append((importlib.import_module(_XET_BARS), {"XetUploadProgressReporter": Reporter}))
    with ExitStack() as stack:
        for module, replaced in places:
            for name, value in replaced.items():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield


class _CountedFile(io.BufferedReader):
    """A file that counts the bytes read from it."""

    def __init__(self, path: Path, counter: liveness.Counter) -> None:
        super().__init__(io.FileIO(path))
        self._counter = counter

    def read(self, size: int | None = -1, /) -> bytes:
        """Read and count."""
        data = super().read(size)
        self._counter.advance(len(data))
        return data


@contextmanager
def _clear_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the hub and the network into clear messages; none of them contains the token."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ExportError("push: HF_HUB_OFFLINE is set in the environment of the training process") from error
    except HFValidationError as error:
        raise ExportError(f"push: {repo_id!r} is not a valid repository name: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = {
            401: "the token (HF_TOKEN) is not valid there",
            403: "the token (HF_TOKEN) can't write there",
            404: "the repository does not exist, or the token (HF_TOKEN) can't see it",
        }.get(status, error.server_message or " ".join(str(error).split())[:300])
        raise ExportError(f"push: {endpoint} refused {repo_id} with {status}: {why}") from error
    except (_HTTPError, OSError) as error:  # the former from the httpx that huggingface_hub uses
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ExportError(
            f"push: {endpoint} does not answer, or the connection broke ({why}); push again to resume"
        ) from error
