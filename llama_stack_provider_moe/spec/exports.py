"""The `export` block (what a job produces that is ready to serve), and the job that makes it: recipe `export`."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import JOB_ID_PATTERN, Block, DType, OneProcess
from llama_stack_provider_moe.spec.destinations import HubPush, OllamaServer
from llama_stack_provider_moe.spec.gguf_types import GgufType
from llama_stack_provider_moe.spec.row_sources import RowSource

SHARD_PATTERN = r"^(\d{1,15})(KB|MB|GB)?$"
_UNITS = {None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def shard_bytes(text: str) -> int:
    """`5GB` -> 5000000000.

    Raises:
        ValueError: it is not a number of bytes.
    """
    match = re.fullmatch(SHARD_PATTERN, text)
    if match is None:
        raise ValueError(f"{text!r} is not a number of bytes")
    return int(match[1]) * _UNITS[match[2]]


# By the number of bits of a weight, the smallest first.
_BY_SIZE: tuple[GgufType, ...] = (
    "q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q4_1", "q5_0", "q5_k_s", "q5_k_m", "q5_1", "q6_k", "q8_0", "f16",
    "bf16", "f32",
)  # fmt: skip


class Ollama(OllamaServer):
    """A model on an Ollama server, made from one of the GGUF files."""

    gguf: GgufType | None = Field(
        default=None, description="Type of the GGUF file to use, one of `gguf`; left out: the smallest."
    )


class Exports(Block):
    """Exports of a trained model; at least one."""

    merged: bool = Field(default=False, description="Make one Hugging Face folder of base plus adapter.")
    dtype: DType | None = Field(
        default=None,
        description="Data type of the matrices in the merged model, for jobs with an adapter; left out: the base's.",
    )
    shard_size: str = Field(
        default="5GB",
        pattern=SHARD_PATTERN,
        description="Largest size of one file of the merged model, in bytes or with KB, MB or GB, e.g. `5GB`.",
    )

    gguf: list[GgufType] = Field(
        default_factory=list,
        description="Types of the GGUF files to make for llama.cpp and Ollama, each once; every file is verified.",
    )
    ollama: Ollama | None = Field(
        default=None, description="Model to create on an Ollama server from one of the GGUF files; left out: none."
    )
    push: HubPush | None = Field(
        default=None, description="Repository on the Hugging Face hub to upload to; left out: none."
    )
    serve: bool = Field(
        default=False,
        description="Serve the result with the server's inference (`serving` of the server), and require an answer; "
        "the GGUF file that this needs is made too.",
    )
    load_check: bool = Field(
        default=True,
        description="Load the trained and the merged model and compare their logits; needs the memory of a model.",
    )

    @field_validator("shard_size", mode="after")
    @classmethod
    def _at_least_a_kilobyte(cls, text: str) -> str:
        if shard_bytes(text) < 1000:
            raise ValueError(f"{text!r} is not valid; expected at least 1KB")
        return text

    @model_validator(mode="after")
    def _asks_for_something(self) -> "Exports":
        if not (self.merged or self.gguf or self.serve) and self.ollama is None and self.push is None:
            raise ValueError("asks for no export; expected merged: true, serve: true, types in gguf, or push")
        return self

    @model_validator(mode="after")
    def _files_once_and_there(self) -> "Exports":
        twice = [each for each in self.gguf if self.gguf.count(each) > 1]
        if twice:
            raise ValueError(f"gguf: {twice[0]!r} is named twice; expected each type once")
        if self.ollama is not None and not self.gguf:
            raise ValueError("ollama: needs a GGUF file; name its type in gguf")
        if self.ollama is not None and self.ollama.gguf not in (None, *self.gguf):
            raise ValueError(f"ollama.gguf: {self.ollama.gguf!r} is not valid; expected one of those in gguf: "
                             f"{', '.join(self.gguf)}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _only_what_is_made_is_pushed(self) -> "Exports":
        if self.push is not None and self.push.what == "merged" and not self.merged:
            raise ValueError("push.what: 'merged' needs merged: true")
        if self.push is not None and self.push.what == "gguf" and not self.gguf:
            raise ValueError("push.what: 'gguf' needs types in gguf")
        return self

    @property
    def for_ollama(self) -> GgufType:
        """The type of the GGUF file that Ollama gets."""
        assert self.ollama is not None, "no model for Ollama is asked for"
        return self.ollama.gguf if self.ollama.gguf is not None else min(self.gguf, key=_BY_SIZE.index)

    def check_without_adapter(self, prefix: str) -> None:
        """Raise ValueError if the block asks for something that only a model with an adapter has.

        Args:
            prefix: of the field names in the error.
        """
        if self.push is not None and self.push.what == "merged":
            raise ValueError(
                f"{prefix}push.what: 'merged' needs an adapter to merge, and all weights were trained; expected "
                "'adapter', which pushes the whole model"
            )
        if self.dtype is not None:
            raise ValueError(
                f"{prefix}dtype: {self.dtype!r} needs an adapter to merge, and all weights were trained; leave it out: "
                "artifacts/model is the whole model, in the data type of its training"
            )


class ExportSpec(Block):
    """Makes exports from the result of a completed job."""

    recipe: Literal["export"] = Field(description="Exports of the result of a completed job.")
    job_uuid: str | None = Field(
        default=None, pattern=JOB_ID_PATTERN, description="Name of the job; left out: the server chooses one."
    )
    of: str = Field(
        pattern=JOB_ID_PATTERN, description="Id of the training job to export: a completed job of the caller's."
    )
    model: str = Field(
        default="",
        max_length=1024,
        description="Model that the training job started from; the server fills it in, never set it.",
    )
    model_from: str | None = Field(
        default=None,
        max_length=1024,
        description="Setting `model_from` of the training job; the server fills it in, never set it.",
    )
    export: Exports = Field(description="Exports to make: a block, its fields follow.")
    resources: OneProcess = Field(default_factory=OneProcess)

    def resolved(self) -> "ExportSpec":
        """The same job with open choices made: one that loads no model needs no GPU."""
        if self.export.load_check or self.resources.gpus is not None:
            return self
        return self.model_copy(update={"resources": self.resources.model_copy(update={"gpus": 0})})

    def row_sources(self) -> list[RowSource]:
        """An empty list: the job reads no rows."""
        return []
