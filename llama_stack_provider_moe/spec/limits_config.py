"""`LimitsConfig` and `AuditConfig`: what one owner may use of a server, and what the server writes down about them."""

from pydantic import Field

from llama_stack_provider_moe.spec import Block


class LimitsConfig(Block):
    """What each owner may use; administrators have the same limits for their own jobs."""

    waiting_jobs: int | None = Field(
        default=None, ge=1, le=10**6, description="Maximum number of an owner's jobs that wait; left out: no limit."
    )
    running_jobs: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Maximum number of an owner's jobs that run at once; more of them wait. Left out: no limit.",
    )
    gpu_hours_per_day: float | None = Field(
        default=None,
        gt=0,
        le=10**6,
        description="GPU-hours of an owner in 24 hours, after which no other job of theirs starts on GPUs; "
        "running jobs continue. Left out: no limit.",
    )
    stored_bytes: int | None = Field(
        default=None,
        ge=1 << 16,
        le=1 << 53,
        description="Maximum size in bytes of an owner's jobs and data sets in `state_dir`; running jobs may exceed "
        "it. Left out: no limit.",
    )
    sweep_jobs: int = Field(default=64, ge=1, le=1000, description="Maximum number of jobs of one sweep.")


class AuditConfig(Block):
    """The audit trail `state_dir/audit/audit.jsonl`: who submitted, cancelled, deleted, uploaded or downloaded what."""

    write: bool = Field(default=True, description="Write the audit trail.")
    max_bytes: int = Field(
        default=64 << 20,
        ge=64 << 10,
        le=1 << 40,
        description="Size in bytes from which a new file is begun and the old one is kept as `audit.jsonl.1`.",
    )
    kept_files: int = Field(
        default=10, ge=1, le=1000, description="Number of old files to keep; the oldest one beyond is deleted."
    )
