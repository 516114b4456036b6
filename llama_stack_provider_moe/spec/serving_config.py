"""`ServingConfig`: which inference server the results of jobs are served with, and where it finds them."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, TypeAdapter, field_validator

from llama_stack_provider_moe.spec import Block, server_config_rules
from llama_stack_provider_moe.spec.destinations import OLLAMA_URL, check_url
from llama_stack_provider_moe.spec.gguf_types import GgufType

# Passes `serving` to an export's process, as JSON; where a result goes is not for the job's owner to decide.
SERVING_VARIABLE = "MOE_SERVING"
SERVED_PREFIX = "ft-"  # begins the name of each served model
NAME_LIMIT = 80  # characters of a model's name in Ollama
# llama.cpp's router takes a file with such a name for a part of another model, or cuts the name.
_MISREAD = (".gguf", "mmproj")


class _Serving(Block):
    provider_id: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="Name of the inference provider in the run YAML; a model's id begins with it.",
    )
    url: str = Field(
        max_length=512, description="URL of the inference server without a path: http or https, host and port."
    )
    answer_s: float = Field(
        default=600.0,
        ge=1,
        le=86400,
        description="Seconds in which a new model must give its first answer; the server loads it first.",
    )

    _url = field_validator("url", mode="after")(staticmethod(check_url))


class LlamaCppServing(_Serving):
    """llama.cpp's server in router mode, `llama-server --models-dir DIR`."""

    kind: Literal["llama_cpp"] = Field(description="llama.cpp's server, which serves each GGUF file of a folder.")
    models_dir: Path = Field(
        description="Folder of that server, which it and this server reach by the same path; GGUF files are linked or "
        "copied there."
    )
    gguf: GgufType = Field(default="q8_0", description="Type of the GGUF file that is served.")

    _blank = field_validator("models_dir", mode="before")(staticmethod(server_config_rules.not_blank))

    @field_validator("models_dir", mode="after")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        if not path.expanduser().is_absolute():
            raise ValueError(f"{str(path)!r} is not valid; expected an absolute path")
        return server_config_rules.absolute(path)


class OllamaServing(_Serving):
    """An Ollama server."""

    kind: Literal["ollama"] = Field(description="An Ollama server, which gets the GGUF file over HTTP.")
    url: str = Field(default=OLLAMA_URL, max_length=512, description="URL of the server: http or https, host and port.")
    gguf: GgufType = Field(default="q8_0", description="Type of the GGUF file that is served.")


class VllmServing(_Serving):
    """A vLLM server that runs the base model and loads adapters while it runs."""

    kind: Literal["vllm"] = Field(description="A vLLM server of the base model, which loads the job's adapter.")


ServingConfig = Annotated[LlamaCppServing | OllamaServing | VllmServing, Discriminator("kind")]
SERVING: TypeAdapter[LlamaCppServing | OllamaServing | VllmServing] = TypeAdapter(ServingConfig)


def gguf_of(serving: ServingConfig) -> GgufType | None:
    """The type of the GGUF file that is served; None where an adapter is."""
    return None if isinstance(serving, VllmServing) else serving.gguf


def served_name(job_id: str) -> str:
    """The name that the result of a training job has on the inference server."""
    name = f"{SERVED_PREFIX}{job_id}"
    if len(name) <= NAME_LIMIT and not any(part in name.lower() for part in _MISREAD):
        return name
    return f"{SERVED_PREFIX}{hashlib.sha256(job_id.encode()).hexdigest()[:32]}"
