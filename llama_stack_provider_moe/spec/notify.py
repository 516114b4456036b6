"""Messages about jobs that ended: what a job asks for (`Notify`), and what a server allows (`NotifyConfig`)."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.ground.redaction import without_passwords
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.destinations import check_url

VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"

SWEEP_ENDED = "moe.sweep.ended"
PIPELINE_ENDED = "moe.pipeline.ended"
# OpenAI's names.
NotifyEvent = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
EVERY_EVENT: tuple[NotifyEvent, ...] = (
    "fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"
)  # fmt: skip
_DEFAULT_PORTS = {"http": 80, "https": 443}


def origin_of(url: str) -> str | None:
    """Return scheme, host and port of a URL in one form for all spellings; None if it is not an http or https URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:  # such as a port beyond 65535
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        return None
    return f"{parts.scheme}://{parts.hostname.lower()}:{port}"


def plain_url(url: str) -> str:
    """Return a URL.

    Raises:
        ValueError: it is not of http or https, or has a user or a fragment.
    """
    parts = urlsplit(url)
    with_user = parts.username is not None or parts.password is not None
    if origin_of(url) is None or with_user or parts.fragment or not url.isascii() or not url.isprintable():
        raise ValueError(f"{without_passwords(url)!r} is not valid; expected https://HOST[:PORT]/PATH or http, in "
                         "ASCII, without a user or a fragment")  # fmt: skip
    return url


class NotifyUrl(Block):
    """Whom to tell, by a signed webhook."""

    url: str = Field(
        max_length=2048,
        description="URL that gets a POST request; its host must be in `notify.allowed` of the server.",
    )

    @field_validator("url", mode="after")
    @classmethod
    def _plain(cls, url: str) -> str:
        return plain_url(url)


class Notify(NotifyUrl):
    """Whom to tell when the job has ended, by a signed webhook."""

    events: list[NotifyEvent] = Field(
        default_factory=lambda: list(EVERY_EVENT), min_length=1, description="Events to report; by OpenAI's names."
    )


class SweepNotify(NotifyUrl):
    """Whom to tell when all jobs of the sweep have ended, by one signed webhook."""


class PipelineNotify(NotifyUrl):
    """Whom to tell when all jobs of the pipeline have ended, by one signed webhook."""


class NotifyConfig(Block):
    """Webhooks about jobs that ended: the places that jobs may name, and the secret that signs the messages."""

    allowed: list[str] = Field(
        default_factory=list,
        description="Servers that may be told, each `https://HOST[:PORT]` or http; []: none, and jobs with `notify` "
        "are refused.",
    )
    secret_variable: str | None = Field(
        default=None,
        pattern=VARIABLE_PATTERN,
        description="Name of the supervisor's environment variable with the signing secret, `whsec_` and base64 of 24 "
        "to 64 bytes; several secrets, separated by spaces, sign each message once each. Left out: none.",
    )

    @field_validator("allowed", mode="after")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        return [check_url(url) for url in urls]

    @model_validator(mode="after")
    def _messages_are_signed(self) -> "NotifyConfig":
        if self.allowed and self.secret_variable is None:
            raise ValueError("secret_variable: is missing; expected the name of the environment variable with the "
                             "secret that signs the messages")  # fmt: skip
        return self

    def allows(self, url: str) -> bool:
        """Return whether messages may go to this URL: scheme, host and port must be those of an allowed server."""
        origin = origin_of(url)
        return origin is not None and origin in {origin_of(each) for each in self.allowed}
