"""`ExecutorsConfig`: where a server runs its jobs; a block of `ProviderConfig`."""

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec import Block, server_config_rules
from llama_stack_provider_moe.spec.blocks import ExecutorName
from llama_stack_provider_moe.spec.destinations import check_url

MAX_S = 10**8  # three years, which stand for "for ever"


class RayConfig(Block):
    """An existing Ray cluster, whose nodes share `state_dir`."""

    address: str = Field(
        max_length=512,
        description="URL of the cluster's dashboard, which serves Ray's Jobs API: `http://HEAD:8265` or https.",
    )
    python: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Python interpreter on the nodes, with this package's extras `train` and `ray`; left out: "
        "`training_python`.",
    )
    token_file: Path | None = Field(
        default=None, description="File with the token of a cluster that has RAY_AUTH_MODE=token; left out: no token."
    )
    cpus_per_process: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Number of CPUs that a job reserves for each of its processes, and of threads in each.",
    )
    placement_s: float = Field(
        default=3600.0,
        ge=0,
        le=MAX_S,
        description="Seconds that a job waits for its nodes in the cluster before it fails; 0: for ever.",
    )
    unreachable_s: float = Field(
        default=600.0,
        ge=0,
        le=MAX_S,
        description="Seconds without an answer from the cluster after which its jobs count as lost, and are started "
        "again.",
    )

    _address = field_validator("address", mode="after")(staticmethod(check_url))

    _token = field_validator("token_file", mode="before")(staticmethod(server_config_rules.not_blank))

    @field_validator("token_file", mode="after")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else server_config_rules.absolute(path)


class ExecutorsConfig(Block):
    """Where jobs run."""

    default: ExecutorName = Field(
        default="local", description="Executor of jobs that train and leave out `resources.executor`."
    )
    ray: RayConfig | None = Field(default=None, description="Ray cluster that jobs may use; left out: none.")

    @model_validator(mode="after")
    def _is_there(self) -> "ExecutorsConfig":
        if self.default == "ray" and self.ray is None:
            raise ValueError(
                "default: 'ray' is not valid without a cluster; expected also a block ray with its address"
            )
        return self
