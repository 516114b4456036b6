"""The vLLM servers that GRPO jobs may generate with: where they are, and the folder through which they get weights."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, TypeAdapter, field_validator

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import server_config_rules
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.destinations import check_url
from llama_stack_provider_moe.spec.notify import VARIABLE_PATTERN

ENGINE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
# Passes the servers to a training process, as JSON; which URLs it may ask is not for the job's owner to decide.
ENGINES_VARIABLE = "MOE_ENGINES"


class EngineConfig(Block):
    """A vLLM server for GRPO jobs, one job at a time."""

    url: str = Field(max_length=512, description="URL of the server without a path: http or https, host and port.")
    weights_dir: Path = Field(
        description="Folder that jobs write and that server reads by the same path, such as one in /dev/shm; it needs "
        "room for the model once."
    )
    key_variable: str | None = Field(
        default=None,
        pattern=VARIABLE_PATTERN,
        description="Environment variable of the server with the key, which is sent as a bearer token; jobs get the "
        "variable too. Left out: no key.",
    )

    _url = field_validator("url", mode="after")(staticmethod(check_url))
    _blank = field_validator("weights_dir", mode="before")(staticmethod(server_config_rules.not_blank))

    @field_validator("weights_dir", mode="after")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        if not path.expanduser().is_absolute():
            raise ValueError(f"{str(path)!r} is not valid; expected an absolute path")
        return server_config_rules.absolute(path)


def engine_named(name: str, engines: Mapping[str, EngineConfig], field: str) -> EngineConfig:
    """Return a server.

    Args:
        name: that a job has for it.
        engines: that the operator names.
        field: the caller's name for the name.

    Raises:
        InvalidInput: the operator names none of this name.
    """
    if name in engines:
        return engines[name]
    where = "`engines` of the server's configuration"
    named = f"one of {', '.join(engines)}, which {where} names" if engines else f"a name in {where}, which has none"
    raise InvalidInput(field, name, named)


ENGINES: TypeAdapter[dict[str, EngineConfig]] = TypeAdapter(dict[str, EngineConfig])
