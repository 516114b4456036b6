"""The `export` block, what a job leaves that is ready to serve, and the job that makes it: recipe `export`."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.llama_cpp import GgufType
from llama_stack_provider_moe.spec.blocks import JOB_ID_PATTERN, Block, OneProcess
from llama_stack_provider_moe.spec.destinations import HubPush, OllamaServer
from llama_stack_provider_moe.spec.sources import RowSource

MergedDType = Literal["bf16", "fp16", "fp32"]
SHARD_PATTERN = r"^(\d{1,15})(KB|MB|GB)?$"
_UNITS = {None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def shard_bytes(text: str) -> int:
    """`5GB` -> 5000000000.

    Raises:
        ValueError: it is no number of bytes.
    """
    match = re.fullmatch(SHARD_PATTERN, text)
    if match is None:
        raise ValueError(f"{text!r} is no number of bytes")
    return int(match[1]) * _UNITS[match[2]]


# By the bits of a weight, the fewest first.
_BY_SIZE: tuple[GgufType, ...] = (
    "q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q4_1", "q5_0", "q5_k_s", "q5_k_m", "q5_1", "q6_k", "q8_0", "f16",
    "bf16", "f32",
)  # fmt: skip


class Ollama(OllamaServer):
    """A model of an Ollama server, made of one of the GGUF files."""

    gguf: GgufType | None = Field(default=None, description="Which of `gguf`; left out: the smallest.")


class Exports(Block):
    """What is made of a trained model; at least one thing."""

    merged: bool = Field(default=False, description="Base plus adapter as one Hugging Face folder.")
    dtype: MergedDType | None = Field(
        default=None, description="Of the merged model's matrices; left out: the base's. Of jobs with an adapter."
    )
    shard_size: str = Field(
        default="5GB", pattern=SHARD_PATTERN, description="Most bytes of one of its files; KB, MB and GB are known."
    )

    gguf: list[GgufType] = Field(
        default_factory=list, description="GGUF files for llama.cpp and Ollama, each verified; none twice."
    )
    ollama: Ollama | None = Field(default=None, description="Also make a model of an Ollama server of one of them.")
    push: HubPush | None = Field(default=None, description="Also upload to a repository of the Hugging Face hub.")
    load_check: bool = Field(
        default=True,
        description="Load what was trained, and what was merged, and compare the logits; takes a model's memory.",
    )

    @field_validator("shard_size", mode="after")
    @classmethod
    def _at_least_a_kilobyte(cls, text: str) -> str:
        if shard_bytes(text) < 1000:
            raise ValueError(f"{text!r} is not valid; expected at least 1KB")
        return text

    @model_validator(mode="after")
    def _asks_for_something(self) -> "Exports":
        if not self.merged and not self.gguf and self.ollama is None and self.push is None:
            raise ValueError("nothing is asked for; expected merged: true, types in gguf, or push")
        return self

    @model_validator(mode="after")
    def _files_once_and_there(self) -> "Exports":
        twice = [each for each in self.gguf if self.gguf.count(each) > 1]
        if twice:
            raise ValueError(f"gguf: {twice[0]!r} stands there twice; expected each type once")
        if self.ollama is not None and not self.gguf:
            raise ValueError("ollama: needs a GGUF file; name its type in gguf")
        if self.ollama is not None and self.ollama.gguf not in (None, *self.gguf):
            raise ValueError(f"ollama.gguf: {self.ollama.gguf!r} is not among those asked for in gguf: "
                             f"{', '.join(self.gguf)}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _only_what_is_made_is_pushed(self) -> "Exports":
        if self.push is not None and self.push.what == "merged" and not self.merged:
            raise ValueError("push.what: 'merged' needs merged: true beside it")
        if self.push is not None and self.push.what == "gguf" and not self.gguf:
            raise ValueError("push.what: 'gguf' needs types in gguf beside it")
        return self

    @property
    def for_ollama(self) -> GgufType:
        """The type of the file that Ollama gets."""
        assert self.ollama is not None, "nothing is for Ollama"
        return self.ollama.gguf if self.ollama.gguf is not None else min(self.gguf, key=_BY_SIZE.index)

    def check_without_adapter(self, prefix: str) -> None:
        """Raise ValueError where something is asked for that only a model with an adapter has.

        Args:
            prefix: of the fields' names in the error.
        """
        if self.push is not None and self.push.what == "merged":
            raise ValueError(
                f"{prefix}push.what: 'merged' is for the merging of an adapter; all weights were trained, and "
                "'adapter' pushes the whole model"
            )
        if self.dtype is not None:
            raise ValueError(
                f"{prefix}dtype: {self.dtype!r} is for the merging of an adapter; all weights were trained, and "
                "artifacts/model is the whole model, in the dtype of its training"
            )


class ExportSpec(Block):
    """Makes exports of what a completed job has trained."""

    recipe: Literal["export"] = Field(description="Exports of what a completed job has trained.")
    job_uuid: str | None = Field(
        default=None, pattern=JOB_ID_PATTERN, description="Name of the job; left out: one is made."
    )
    of: str = Field(pattern=JOB_ID_PATTERN, description="The training job: one of the caller's, completed.")
    model: str = Field(
        default="", max_length=1024, description="The model that it trained: filled in, never to be given."
    )
    export: Exports = Field(description="A block; its fields follow.")
    resources: OneProcess = Field(default_factory=OneProcess)

    def resolved(self) -> "ExportSpec":
        """The same, with what is left to be decided: who loads no model needs no GPU."""
        if self.export.load_check or self.resources.gpus is not None:
            return self
        return self.model_copy(update={"resources": self.resources.model_copy(update={"gpus": 0})})

    def row_sources(self) -> list[RowSource]:
        """None: no rows are read."""
        return []
