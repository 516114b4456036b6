"""Flagged conversations: where shields keep them, and where the post-training provider finds them again."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from llama_stack_provider_moe.spec import server_config_rules
from llama_stack_provider_moe.spec.blocks import Block


class FeedbackFolder(Block):
    """Flagged conversations that jobs may train on."""

    consent: Literal[True] = Field(
        description="That users have agreed that flagged conversations are stored and trained on; expected true."
    )
    folder: Path = Field(
        description="Folder with a file of flagged conversations for each user, which the server's user alone may "
        "read; the same for shields and for jobs."
    )

    _blank = field_validator("folder", mode="before")(staticmethod(server_config_rules.not_blank))
    _folder = field_validator("folder", mode="after")(staticmethod(server_config_rules.exclusive_folder))


class FeedbackConfig(FeedbackFolder):
    """Flagged conversations, kept as rows of a data set for training."""

    max_bytes: int = Field(
        default=256 << 20,
        ge=1 << 20,
        le=1 << 40,
        description="Most bytes of all users' files; later conversations are lost, which is counted.",
    )
    max_bytes_of_owner: int = Field(
        default=64 << 20,
        ge=1 << 20,
        le=1 << 40,
        description="Most bytes of one user's file, so that nobody takes up the room of the others.",
    )
