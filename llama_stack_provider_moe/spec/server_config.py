"""`ProviderConfig`: where a server stores its data, and how much it may use. A job's options are in `spec`."""

import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, field_validator, model_validator

from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.spec import Block, JobDefaults, server_config_rules
from llama_stack_provider_moe.spec.destinations import OLLAMA_URL, check_url
from llama_stack_provider_moe.spec.engines_config import ENGINE_NAME_PATTERN, EngineConfig
from llama_stack_provider_moe.spec.executors_config import MAX_S, ExecutorsConfig
from llama_stack_provider_moe.spec.feedback_config import FeedbackFolder
from llama_stack_provider_moe.spec.graders_config import GradersConfig, JudgeConfig
from llama_stack_provider_moe.spec.limits_config import AuditConfig, LimitsConfig
from llama_stack_provider_moe.spec.notify import NotifyConfig
from llama_stack_provider_moe.spec.rows.images import ImageLimits
from llama_stack_provider_moe.spec.serving_config import LlamaCppServing, ServingConfig

_DEVICE_ID = re.compile(r"[0-9]{1,4}|(GPU|MIG)-[A-Za-z0-9/-]{1,120}")
# No part begins with a dot or a dash: the hub has no such names, and `..` names a folder.
_MODEL_PATTERN = re.compile(r"[A-Za-z0-9_*?][A-Za-z0-9._*?-]{0,95}(/[A-Za-z0-9_*?][A-Za-z0-9._*?-]{0,95})?")

HOST_NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?)*$"
MIRROR_URL_PATTERN = r"^(s3://[a-z0-9][a-z0-9.-]{1,62}(/[A-Za-z0-9_.=-]+)*|file:///[^?#*\[\]]+)/?$"


class SupervisorConfig(Block):
    """Times and limits of the process that runs the jobs."""

    start: bool = Field(
        default=True,
        description="Start a supervisor when a job is waiting and none is running; false: run your own.",
    )
    max_concurrent_jobs: int = Field(default=1, ge=1, le=64, description="Maximum number of jobs that run at once.")
    poll_s: float = Field(default=0.5, gt=0, le=60, description="Seconds between checks of store and processes.")
    lease_s: float = Field(
        default=15.0,
        ge=2,
        le=3600,
        description="Seconds without a heartbeat after which a supervisor counts as dead.",
    )
    idle_exit_s: float = Field(
        default=300.0,
        ge=0,
        le=MAX_S,
        description="Seconds without a job after which the supervisor exits; the next job starts another.",
    )
    cancel_grace_s: float = Field(
        default=60.0, ge=0, le=3600, description="Seconds between SIGTERM and SIGKILL when a job is stopped."
    )
    warm: bool = Field(
        default=True,
        description="Keep a process with torch and TRL imported, and fork jobs from it, so that they start in seconds.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Maximum number of starts of a job whose process is lost (killed, machine restarted) before it "
        "fails; 1: no retry.",
    )
    stall_s: float = Field(
        default=1800.0,
        ge=0,
        le=MAX_S,
        description="Seconds without an event or a line of output after which a job is stopped and fails; 0: never.",
    )
    max_log_bytes: int = Field(
        default=256 << 20,
        ge=64 << 10,
        le=1 << 40,
        description="Maximum size of a job's output.log in bytes; the middle of a longer log is removed while the job "
        "runs.",
    )
    devices: list[str] | None = Field(
        default=None,
        description="GPUs that jobs may use, by index or UUID; left out: those in CUDA_VISIBLE_DEVICES, else all.",
    )
    retention_days: float | None = Field(
        default=None,
        gt=0,
        le=36500,
        description="Days after which a job that has ended is deleted with its folder; left out: never.",
    )

    @field_validator("devices", mode="after")
    @classmethod
    def _device_ids(cls, devices: list[str] | None) -> list[str] | None:
        for device in devices or ():
            if not _DEVICE_ID.fullmatch(device):
                raise ValueError(
                    f"{device!r} is not a GPU's index or UUID (such as '0', 'GPU-8a56d8e5-...', 'MIG-...')"
                )
        if devices is not None and len(set(devices)) < len(devices):
            raise ValueError("a device is named twice; expected each once")
        return devices


# Passes `models.trust_remote_code` to a training process, as a JSON list. Not in the job's spec: its owner writes that.
TRUST_VARIABLE = "MOE_TRUST_REMOTE_CODE"


class ModelsConfig(Block):
    """Which models jobs may train; `allowed_roots` governs folders."""

    allowed: list[str] | None = Field(
        default=None,
        description="Hub ids that jobs may name, with `ibm-granite/*` for all of an owner; left out: any, []: none.",
    )
    trust_remote_code: list[str] = Field(
        default_factory=list,
        description="Hub ids, without wildcards, of repositories whose own Python code may run in training processes.",
    )

    @field_validator("trust_remote_code", mode="after")
    @classmethod
    def _in_full(cls, names: list[str]) -> list[str]:
        for name in names:
            if not _MODEL_PATTERN.fullmatch(name) or set("*?[") & set(name):
                raise ValueError(
                    f"{name!r} is not a hub id without wildcards; name each repository whose code runs here"
                )
        return names

    @field_validator("allowed", mode="after")
    @classmethod
    def _hub_ids(cls, patterns: list[str] | None) -> list[str] | None:
        for pattern in patterns or ():
            if not _MODEL_PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern!r} is not a hub id; expected owner/name, with * and ? as wildcards, or a "
                                 "name without an owner (for folders see `allowed_roots`)")  # fmt: skip
        return patterns

    def allow(self, hub_id: str) -> bool:
        """Whether jobs may name this hub id. A `*` matches within the owner or the name."""
        return self.allowed is None or any(_matches(hub_id, pattern) for pattern in self.allowed)


def _matches(hub_id: str, pattern: str) -> bool:
    parts, patterns = hub_id.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


class ExportsConfig(Block):
    """Where exports may go: a job's owner names the place, and the machine that runs the job connects to it."""

    ollama_urls: list[str] = Field(
        default_factory=lambda: [OLLAMA_URL],
        description="URLs of Ollama servers that jobs may push to, each `http://HOST:PORT` or https; []: none.",
    )

    hub_repositories: list[str] = Field(
        default_factory=list,
        description="Hub repositories that jobs may push to with the server's HF_TOKEN, with `owner/*` for all of an "
        "owner; []: none.",
    )

    @field_validator("hub_repositories", mode="after")
    @classmethod
    def _repositories(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            if not _MODEL_PATTERN.fullmatch(pattern) or "/" not in pattern:
                raise ValueError(f"{pattern!r} is not a repository; expected owner/name, with * and ? as wildcards")
        return patterns

    def allow_push(self, repo_id: str) -> bool:
        """Whether jobs may push to this repository. A `*` matches within the owner or the name."""
        return any(_matches(repo_id, pattern) for pattern in self.hub_repositories)

    @field_validator("ollama_urls", mode="after")
    @classmethod
    def _urls(cls, urls: list[str]) -> list[str]:
        return [check_url(url) for url in urls]


# Tells a training process which of its variables are secret, as a JSON list of names.
SECRETS_VARIABLE = "MOE_CHILD_SECRETS"

# Passes `mirror.url` to a training process; like trust, it is not for the job's owner to decide.
MIRROR_VARIABLE = "MOE_MIRROR_URL"


class MirrorConfig(Block):
    """A second copy of every job's checkpoints and artifacts."""

    url: str | None = Field(
        default=None,
        pattern=MIRROR_URL_PATTERN,
        description="Prefix of the copies, `s3://bucket/prefix` (extra `s3`, the machine's AWS_* settings) or "
        "`file:///folder`; files that are missing are restored from it. Left out: no copies.",
    )

    @field_validator("url", mode="after")
    @classmethod
    def _stays_below(cls, url: str | None) -> str | None:
        if url is not None and {".", ".."} & set(url.split("/")):
            raise ValueError(f"{url!r} is not valid; expected a path without '.' and '..'")
        return url

    @property
    def folder(self) -> Path | None:
        """The folder of a `file://` mirror; None for other mirrors."""
        url = self.url or ""
        return Path(url.removeprefix("file://")) if url.startswith("file:") else None


class ProviderConfig(Block):
    """The `config:` of provider `inline::moe` in a run YAML.

    It contains no secret: hosts log it, and show it in `GET /v1/providers`.
    """

    # Its errors do not show the input either, which may be a secret: a server logs them.
    model_config = ConfigDict(hide_input_in_errors=True)

    state_dir: Path = Field(
        default=Path("~/.llama/moe"),
        validate_default=True,  # without it, `~` is a folder of that name
        description="Folder of the job store, the jobs and their artifacts.",
    )
    store_url: str | None = Field(
        default=None,
        description="SQLAlchemy URL of the job store, without a password; left out: SQLite in `state_dir`.",
    )
    store_password_file: Path | None = Field(
        default=None,
        description="File with the password for `store_url`, read when a server or supervisor starts; left out: "
        "PGPASSWORD, PGPASSFILE or ~/.pgpass, as libpq finds them.",
    )
    training_python: str = Field(
        default=sys.executable,
        description="Python interpreter of the training processes; it may belong to another environment.",
    )
    unsloth_python: str | None = Field(
        default=None,
        min_length=1,
        description="Python interpreter of an environment with Unsloth, for jobs with `loader` unsloth; left out: the "
        "server refuses them.",
    )
    allowed_roots: list[Path] = Field(
        default_factory=list,
        description="Folders, besides `state_dir`, that jobs may read models from and write checkpoints to.",
    )
    child_env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables to set for training processes (HF_HOME, ...); for secrets use "
        "`child_secrets`.",
    )
    child_secrets: list[str] = Field(
        default_factory=list,
        description="Names of the server's environment variables that training processes get too (WANDB_API_KEY, "
        "...); they always get HF_*, and AWS_* if there is a mirror on S3.",
    )
    max_body_bytes: int = Field(
        default=8 << 20, ge=1 << 16, le=1 << 30, description="Maximum size of a request's body in bytes."
    )
    max_rows: int = Field(
        default=10_000_000, ge=1, le=10**12, description="Maximum number of rows in a data set of a job."
    )
    max_dataset_bytes: int = Field(
        default=16 << 30,
        ge=1 << 16,
        le=1 << 50,
        description="Maximum size of an uploaded data set in bytes, uncompressed.",
    )
    dataset_quota_bytes: int = Field(
        default=64 << 30,
        ge=1 << 16,
        le=1 << 50,
        description="Maximum size of all versions of all data sets that one owner has uploaded, in bytes.",
    )
    images: ImageLimits = Field(default_factory=ImageLimits)
    group_access: bool = Field(
        default=False,
        description="Let the group of `state_dir` read the files in it; false: only the server's user.",
    )
    allowed_hosts: list[Annotated[str, Field(pattern=HOST_NAME_PATTERN, max_length=253)]] = Field(
        default_factory=list,
        max_length=64,
        description="Names, such as moe.example.org, under which a server without authentication answers requests that "
        "come over a loopback address, beside localhost: what a reverse proxy on this machine passes on in `Host`. "
        "Others get a 403, against DNS rebinding.",
    )
    prometheus: bool = Field(
        default=False,
        description="Serve `GET /v1alpha/post-training/metrics`; with authentication, only to administrators.",
    )
    models: ModelsConfig = Field(default_factory=ModelsConfig)
    exports: ExportsConfig = Field(default_factory=ExportsConfig)
    serving: ServingConfig | None = Field(
        default=None,
        description="Inference server that serves results of jobs: a block whose `kind` is llama_cpp, ollama or vllm. "
        "Left out: none.",
    )
    mirror: MirrorConfig = Field(default_factory=MirrorConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    audit: AuditConfig = Field(default_factory=AuditConfig)
    notify: NotifyConfig = Field(default_factory=NotifyConfig)
    feedback: FeedbackFolder | None = Field(
        default=None,
        description="Flagged conversations that shields keep: their users' jobs may read them. Left out: none do.",
    )
    graders: GradersConfig = Field(default_factory=GradersConfig)
    engines: dict[Annotated[str, Field(pattern=ENGINE_NAME_PATTERN)], EngineConfig] = Field(
        default_factory=dict,
        max_length=64,
        description="vLLM servers that generate for GRPO jobs, by the name that `rl.engine.server` gives; {}: none.",
    )
    supervisor: SupervisorConfig = Field(default_factory=SupervisorConfig)
    executors: ExecutorsConfig = Field(default_factory=ExecutorsConfig)
    defaults: JobDefaults = Field(default_factory=JobDefaults)

    @field_validator("state_dir", mode="after")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return server_config_rules.exclusive_folder(path)

    @field_validator("allowed_roots", mode="after")
    @classmethod
    def _all_absolute(cls, paths: list[Path]) -> list[Path]:
        return [server_config_rules.absolute(path) for path in paths]

    @field_validator("store_password_file", mode="after")
    @classmethod
    def _absolute_file(cls, path: Path | None) -> Path | None:
        return None if path is None else server_config_rules.absolute(path)

    _paths = field_validator("state_dir", "allowed_roots", "store_password_file", mode="before")(
        staticmethod(server_config_rules.not_blank)
    )
    _password = field_validator("store_url", mode="after")(staticmethod(server_config_rules.without_password))
    _secrets = field_validator("child_env", mode="after")(staticmethod(server_config_rules.without_secrets))
    _names = field_validator("child_secrets", mode="after")(staticmethod(server_config_rules.names_alone))

    @model_validator(mode="after")
    def _together(self) -> "ProviderConfig":
        server_config_rules.check_secrets(self.store_url, self.store_password_file, self.child_env, self.child_secrets)
        server_config_rules.check_roots(
            self.allowed_roots,
            (self.state_dir, server_config_rules.absolute(self.jobs_dir)),
            server_config_rules.absolute(self.models_dir),
            self.mirror.folder,
        )
        folders = {f"engines.{name}.weights_dir": engine.weights_dir for name, engine in self.engines.items()}
        if isinstance(self.serving, LlamaCppServing):
            folders["serving.models_dir"] = self.serving.models_dir
        for setting, folder in folders.items():
            server_config_rules.check_outside(setting, folder, self.state_dir, self.allowed_roots, self.mirror.folder)
        return self

    @property
    def secrets(self) -> list[str]:
        """The names of variables of the server that training processes get, and that are secret."""
        asked: list[JudgeConfig | EngineConfig] = [*self.graders.judges.values(), *self.engines.values()]
        keys = {each.key_variable for each in asked} - {None, *self.child_secrets}
        return [*self.child_secrets, *sorted(map(str, keys))]

    @property
    def privacy(self) -> Privacy:
        """The modes of files and folders."""
        return Privacy(self.group_access)

    @property
    def jobs_dir(self) -> Path:
        """The folder with one folder for each job, named by its id."""
        return self.state_dir / "jobs"

    @property
    def datasets_dir(self) -> Path:
        """The folder of uploaded data sets, with one folder for each version."""
        return self.state_dir / "datasets"

    @property
    def models_dir(self) -> Path:
        """The folder of models made on this machine (upcycled ones); every job may read it."""
        return self.state_dir / "models"

    @property
    def url(self) -> str:
        """The store's SQLAlchemy URL, including the password if there is a password file: never show it.

        Raises:
            OSError: `store_password_file` can't be read.
            ValueError: the file has no password in it.
        """
        if self.store_password_file is None or self.store_url is None:
            return self.store_url or f"sqlite:///{self.state_dir / 'jobs.db'}"
        return server_config_rules.with_password(self.store_url, self.store_password_file)

    @classmethod
    def sample_run_config(cls, __distro_dir__: str = "", **_: object) -> dict[str, str]:
        """The settings that `llama stack` writes into a new run YAML for this provider."""
        return {"state_dir": "${env.MOE_STATE_DIR:=~/.llama/moe}"}
