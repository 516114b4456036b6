"""A folder -> a repository on the Hugging Face hub, by huggingface_hub.

The token is HF_TOKEN of this process and nothing else, the hub HF_ENDPOINT (huggingface.co). A repository that is made
is private unless asked otherwise; into a public one nothing is put that was to be private. Afterwards the hub is asked
what it has. What is there already is not sent again, so a push that broke off is simply pushed again.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from pydantic import BaseModel, Field

from llama_stack_provider_moe.errors import ExportError, InvalidInput
from llama_stack_provider_moe.spec.destinations import HubPush, check_url

Say = Callable[[str], None]
ENDPOINT = "https://huggingface.co"
_HTTPError: type[Exception] = vars(hub_errors)["HTTPError"]  # it has the one of its own httpx, and exports it not
_HIDDEN = (".*", "**/.*", "**/.*/**")  # half-written files have such names


class HubResult(BaseModel):
    """What the hub now has."""

    repo_id: str
    url: str
    commit: str = Field(description="Of the default branch.")
    private: bool
    files: int = Field(description="Of the folder, each there with its size.")
    bytes: int

    def text(self) -> str:
        """For a person."""
        kind = "private" if self.private else "public"
        return f"{self.url} ({kind}): {self.files} files, {self.bytes:,} bytes, commit {self.commit[:12]}"


def push(folder: Path, hub: HubPush, say: Say = print) -> HubResult:
    """Put all files of `folder`, hidden ones left out, into the repository; those of it with other names stay.

    Raises:
        InvalidInput: there is no such folder, or nothing in it; HF_ENDPOINT is no address.
        ExportError: no token; it may not write there; the repository is public and was to be private; the hub does not
            answer, or does not have what was sent.
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
    with _told(hub.repo_id, endpoint):
        made = api.create_repo(hub.repo_id, private=hub.private, repo_type="model", exist_ok=True)
        before = api.model_info(hub.repo_id)
        if hub.private and not before.private:
            raise ExportError(f"push: {hub.repo_id} is public, and push.private is true; nothing was sent")
        say(f"push: {len(files)} files, {sum(files.values()):,} bytes, to {made}")
        api.upload_folder(
            repo_id=hub.repo_id, folder_path=folder, repo_type="model", ignore_patterns=[*_HIDDEN],
            commit_message=f"Upload of {folder.name}",
        )  # fmt: skip
        after = api.model_info(hub.repo_id, files_metadata=True)
    there = {each.rfilename: each.size for each in after.siblings or ()}
    if lost := [name for name, size in files.items() if there.get(name) != size]:
        raise ExportError(f"push: {hub.repo_id} has {len(lost)} file(s) not as they were sent: {', '.join(lost[:3])}")
    return HubResult(
        repo_id=hub.repo_id, url=str(made), commit=str(after.sha), private=bool(after.private), files=len(files),
        bytes=sum(files.values()),
    )  # fmt: skip


@contextmanager
def _told(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns what the hub and the network answer into errors for a person; none of them holds the token."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ExportError("push: HF_HUB_OFFLINE is set in the environment of the training process") from error
    except HFValidationError as error:
        raise ExportError(f"push: {repo_id!r} is no name of a repository: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = {
            401: "the token (HF_TOKEN) is not valid there",
            403: "the token (HF_TOKEN) may not write there",
            404: "there is no such repository, or the token (HF_TOKEN) may not see it",
        }.get(status, error.server_message or " ".join(str(error).split())[:300])
        raise ExportError(f"push: {endpoint} refused {repo_id} with {status}: {why}") from error
    except (_HTTPError, OSError) as error:  # the former of whichever httpx huggingface_hub is built on
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ExportError(f"push: {endpoint} does not answer, or broke off ({why}); pushing again goes on") from error
