"""`ProviderConfig`: where a server keeps things and how much it may use. A job's options are in `spec`."""

import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec import Block, JobDefaults
from llama_stack_provider_moe.spec.blocks import ExecutorName
from llama_stack_provider_moe.spec.destinations import OLLAMA_URL, check_url

_DEVICE_ID = re.compile(r"[0-9]{1,4}|(GPU|MIG)-[A-Za-z0-9/-]{1,120}")
# No part begins with a dot or a dash: the hub has no such names, and `..` would be a folder.
_MODEL_PATTERN = re.compile(r"[A-Za-z0-9_*?][A-Za-z0-9._*?-]{0,95}(/[A-Za-z0-9_*?][A-Za-z0-9._*?-]{0,95})?")


class SupervisorConfig(Block):
    """Times and limits of the process that runs the jobs."""

    start: bool = Field(
        default=True,
        description="Start a supervisor when a job waits and none is alive; false: run your own.",
    )
    max_concurrent_jobs: int = Field(default=1, ge=1, le=64, description="Training processes at a time.")
    poll_s: float = Field(default=0.5, gt=0, le=60, description="Seconds between two looks at store and children.")
    lease_s: float = Field(
        default=15.0,
        ge=2,
        le=3600,
        description="Seconds without a beat after which a supervisor counts as dead.",
    )
    idle_exit_s: float = Field(
        default=300.0,
        ge=0,
        description="Seconds without a job after which it ends; the next job starts another.",
    )
    cancel_grace_s: float = Field(
        default=60.0, ge=0, le=3600, description="Seconds from SIGTERM to SIGKILL when a job is stopped."
    )
    warm: bool = Field(
        default=True,
        description="Keep a process that has torch and TRL imported, and fork jobs from it: they start in seconds.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Starts of a job whose process is lost (killed, machine restarted) before it fails; 1: no retry.",
    )
    stall_s: float = Field(
        default=1800.0,
        ge=0,
        description="Seconds without an event or a line of output after which a job is stopped and fails; 0: never.",
    )
    max_log_bytes: int = Field(
        default=256 << 20,
        ge=64 << 10,
        description="Bytes of a job's output.log; of a longer one the middle is cut out while the job goes on.",
    )
    devices: list[str] | None = Field(
        default=None,
        description="GPUs to give out, by index or UUID; left out: CUDA_VISIBLE_DEVICES, else all there are.",
    )
    retention_days: float | None = Field(
        default=None,
        gt=0,
        description="Days after which an ended job is deleted with its folder; left out: it is kept.",
    )

    @field_validator("devices", mode="after")
    @classmethod
    def _device_ids(cls, devices: list[str] | None) -> list[str] | None:
        for device in devices or ():
            if not _DEVICE_ID.fullmatch(device):
                raise ValueError(f"{device!r} is no GPU's index or UUID (such as '0', 'GPU-8a56d8e5-...', 'MIG-...')")
        if devices is not None and len(set(devices)) < len(devices):
            raise ValueError("a device is named twice; expected each once")
        return devices


# Tells a training process `models.trust_remote_code`, as a JSON list. Not the job's spec: that is its owner's to write.
TRUST_VARIABLE = "MOE_TRUST_REMOTE_CODE"


class ModelsConfig(Block):
    """Which models jobs may train; folders are ruled by `allowed_roots`."""

    allowed: list[str] | None = Field(
        default=None,
        description="Hub ids that jobs may name, `ibm-granite/*` for all of an owner; left out: any, []: none.",
    )
    trust_remote_code: list[str] = Field(
        default_factory=list,
        description="Hub ids, each in full, whose repositories may run their own Python code in training processes.",
    )

    @field_validator("trust_remote_code", mode="after")
    @classmethod
    def _in_full(cls, names: list[str]) -> list[str]:
        for name in names:
            if not _MODEL_PATTERN.fullmatch(name) or set("*?[") & set(name):
                raise ValueError(f"{name!r} is no hub id in full; whose code runs here is named one by one")
        return names

    @field_validator("allowed", mode="after")
    @classmethod
    def _hub_ids(cls, patterns: list[str] | None) -> list[str] | None:
        for pattern in patterns or ():
            if not _MODEL_PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern!r} is no hub id; expected owner/name, in which * and ? may stand, or a "
                                 "name without an owner (folders: `allowed_roots`)")  # fmt: skip
        return patterns

    def allow(self, hub_id: str) -> bool:
        """Whether jobs may name this hub id. A `*` stays within the owner or the name."""
        return self.allowed is None or any(_matches(hub_id, pattern) for pattern in self.allowed)


def _matches(hub_id: str, pattern: str) -> bool:
    parts, patterns = hub_id.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


class ExportsConfig(Block):
    """Where exports may go; a job's owner names the place, and the machine that runs the job reaches it."""

    ollama_urls: list[str] = Field(
        default_factory=lambda: [OLLAMA_URL],
        description="Ollama servers that jobs may push to, each `http://HOST:PORT` or https; []: none.",
    )

    hub_repositories: list[str] = Field(
        default_factory=list,
        description="Repositories of the hub that jobs may push to by HF_TOKEN, `owner/*` for all of one; []: none.",
    )

    @field_validator("hub_repositories", mode="after")
    @classmethod
    def _repositories(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            if not _MODEL_PATTERN.fullmatch(pattern) or "/" not in pattern:
                raise ValueError(f"{pattern!r} is no repository; expected owner/name, in which * and ? may stand")
        return patterns

    def allow_push(self, repo_id: str) -> bool:
        """Whether jobs may push to this repository. A `*` stays within the owner or the name."""
        return any(_matches(repo_id, pattern) for pattern in self.hub_repositories)

    @field_validator("ollama_urls", mode="after")
    @classmethod
    def _urls(cls, urls: list[str]) -> list[str]:
        return [check_url(url) for url in urls]


# Tells a training process `mirror.url`; like trust it is not the job's owner's to say.
MIRROR_VARIABLE = "MOE_MIRROR_URL"


class MirrorConfig(Block):
    """A second place of every job's checkpoints and artifacts."""

    url: str | None = Field(
        default=None,
        pattern=r"^(s3://[a-z0-9][a-z0-9.-]{1,62}(/[A-Za-z0-9_.=-]+)*|file:///[^?#*\[\]]+)/?$",
        description="Prefix that they are copied under, `s3://bucket/prefix` (extra `s3`, the machine's AWS_* "
        "settings) or `file:///folder`, and come back from where they are gone; left out: none.",
    )

    @field_validator("url", mode="after")
    @classmethod
    def _stays_below(cls, url: str | None) -> str | None:
        if url is not None and {".", ".."} & set(url.split("/")):
            raise ValueError(f"{url!r} has a part that leads elsewhere ('.' or '..')")
        return url


class RayConfig(Block):
    """A Ray cluster that is there already; its nodes share `state_dir`."""

    address: str = Field(
        max_length=512,
        description="Of the cluster's dashboard, which serves Ray's Jobs API: `http://HEAD:8265` or https.",
    )
    python: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Interpreter on the nodes, with this package's extras `train` and `ray`; left out: "
        "`training_python`.",
    )
    token_file: Path | None = Field(
        default=None, description="File that has the token of a cluster with RAY_AUTH_MODE=token; left out: none."
    )
    cpus_per_process: int = Field(
        default=1, ge=1, le=256, description="CPUs that a job reserves for each of its processes, and threads of each."
    )
    placement_s: float = Field(
        default=3600.0,
        ge=0,
        description="Seconds that a job waits in the cluster for its nodes before it fails; 0: for ever.",
    )
    unreachable_s: float = Field(
        default=600.0,
        ge=0,
        description="Seconds without an answer of the cluster after which its jobs count as lost, and are tried again.",
    )

    _address = field_validator("address", mode="after")(staticmethod(check_url))

    @field_validator("token_file", mode="after")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().resolve()


class ExecutorsConfig(Block):
    """Where jobs run."""

    default: ExecutorName = Field(
        default="local", description="For jobs that train and do not say (`resources.executor`)."
    )
    ray: RayConfig | None = Field(default=None, description="A Ray cluster for jobs; left out: there is none.")

    @model_validator(mode="after")
    def _is_there(self) -> "ExecutorsConfig":
        if self.default == "ray" and self.ray is None:
            raise ValueError("default: 'ray' is not valid without a cluster; expected a block ray with its address")
        return self


class ProviderConfig(Block):
    """The `config:` of provider `inline::moe` in a run YAML."""

    state_dir: Path = Field(
        default=Path("~/.llama/moe"), description="Folder of the store, the jobs and their artifacts."
    )
    store_url: str | None = Field(
        default=None, description="SQLAlchemy URL of the job store; left out: SQLite in `state_dir`."
    )
    training_python: str = Field(
        default=sys.executable,
        description="Interpreter of the training processes; may be another environment.",
    )
    unsloth_python: str | None = Field(
        default=None,
        min_length=1,
        description="Interpreter of an environment with Unsloth, for jobs with `loader` unsloth; left out: they are "
        "refused.",
    )
    allowed_roots: list[Path] = Field(
        default_factory=list,
        description="Folders, beside `state_dir`, that models may be read from and checkpoints written to.",
    )
    child_env: dict[str, str] = Field(
        default_factory=dict, description="Environment variables set for training processes (HF_HOME, ...)."
    )
    max_body_bytes: int = Field(
        default=8 << 20, ge=1 << 16, le=1 << 30, description="Bytes that a request's body may have."
    )
    max_rows: int = Field(default=10_000_000, ge=1, description="Rows that a data set of a job may have.")
    prometheus: bool = Field(
        default=False,
        description="Serve `GET /v1alpha/post-training/metrics`; with authentication, to administrators alone.",
    )
    models: ModelsConfig = Field(default_factory=ModelsConfig)
    exports: ExportsConfig = Field(default_factory=ExportsConfig)
    mirror: MirrorConfig = Field(default_factory=MirrorConfig)
    supervisor: SupervisorConfig = Field(default_factory=SupervisorConfig)
    executors: ExecutorsConfig = Field(default_factory=ExecutorsConfig)
    defaults: JobDefaults = Field(default_factory=JobDefaults)

    @field_validator("state_dir", mode="after")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().resolve()

    @field_validator("allowed_roots", mode="after")
    @classmethod
    def _all_absolute(cls, paths: list[Path]) -> list[Path]:
        return [path.expanduser().resolve() for path in paths]

    @property
    def jobs_dir(self) -> Path:
        """One folder for each job, named by its id."""
        return self.state_dir / "jobs"

    @property
    def models_dir(self) -> Path:
        """Where models made on this machine (upcycled ones) are kept; readable by every job."""
        return self.state_dir / "models"

    @property
    def url(self) -> str:
        """The store's SQLAlchemy URL."""
        return self.store_url or f"sqlite:///{self.state_dir / 'jobs.db'}"

    @classmethod
    def sample_run_config(cls, __distro_dir__: str = "", **_: Any) -> dict[str, Any]:
        """What `llama stack` writes into a new run YAML for this provider."""
        return {"state_dir": "${env.MOE_STATE_DIR:=~/.llama/moe}"}
