"""The places that exports may be pushed to: names and addresses, checked when a job is submitted."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from llama_stack_provider_moe.ground.redaction import without_passwords
from llama_stack_provider_moe.spec.blocks import Block

# [[HOST/]NAMESPACE/]MODEL[:TAG], as types/model/name.go of Ollama 0.33 reads it.
OLLAMA_NAME_PATTERN = (
    r"^((?:[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}/)?[A-Za-z0-9_][A-Za-z0-9_-]{0,79}/)?"
    r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})?$"
)
OLLAMA_URL = "http://127.0.0.1:11434"
# NAMESPACE/NAME; a validator below checks the hub's further rules (no `--`, no `..`, no `.git` at the end).
HUB_REPO_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"


def check_url(url: str) -> str:
    """`url`, without a slash at its end.

    Raises:
        ValueError: it is not a plain http or https address of a server.
    """
    parts = urlsplit(url)
    plain = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/")
    if not plain or parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        raise ValueError(f"{without_passwords(url)!r} is not valid; expected http://HOST:PORT or https://HOST[:PORT], "
                         "without a user or a path")  # fmt: skip
    if parts.port == 0:  # beyond 65535 `port` itself raises
        raise ValueError(f"{url!r} is not valid; expected a port from 1 to 65535")
    return url.rstrip("/")


class OllamaServer(Block):
    """A model on an Ollama server."""

    name: str = Field(
        pattern=OLLAMA_NAME_PATTERN,
        max_length=513,
        description="Name of the model there, as [NAMESPACE/]MODEL[:TAG]; a model that has this name is replaced.",
    )
    url: str = Field(default=OLLAMA_URL, max_length=512, description="URL of the server: http or https, host and port.")

    _url = field_validator("url", mode="after")(staticmethod(check_url))


class HubPush(Block):
    """A repository on the Hugging Face hub; the token is HF_TOKEN of the training process, never a field."""

    repo_id: str = Field(
        pattern=HUB_REPO_PATTERN, description="Repository as NAMESPACE/NAME; it is created if it does not exist."
    )
    private: bool = Field(
        default=True,
        description="Create a new repository as private, and refuse to push to a public one; false: create a public "
        "one, and push to either.",
    )
    what: Literal["adapter", "merged", "gguf"] = Field(
        default="adapter",
        description="Files to push. adapter: the adapter (or the whole model, if all weights were trained); merged: "
        "the merged model; gguf: all GGUF files. Each with a model card.",
    )

    @field_validator("repo_id", mode="after")
    @classmethod
    def _is_a_name_that_the_hub_accepts(cls, repo_id: str) -> str:
        name = repo_id.partition("/")[2]
        if "--" in repo_id or ".." in repo_id or name.endswith((".git", ".ipynb")) or name[-1] in "-.":
            raise ValueError(
                f"{repo_id!r} is not valid; expected NAMESPACE/NAME without '--' or '..', not ending in '-', '.', "
                "'.git' or '.ipynb'"
            )
        return repo_id
