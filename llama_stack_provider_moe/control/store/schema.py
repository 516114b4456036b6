"""The store's tables. `opening` opens connections to them.

The table `moe_supervisor` always has one row. If nobody holds the lease, the row has no holder. So there is always a
row to lock.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Double,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    TypeDecorator,
)

SCHEMA_VERSION = 10
# Placeholder for a time that can't be read; no job is that old.
UNREADABLE_TIME = datetime(1970, 1, 1, tzinfo=UTC)

# A row of one of the tables below. SQLAlchemy does not type the columns of a `Table`.
type TableRow = Row[Any]


class UtcDateTime(TypeDecorator[datetime]):
    """Aware times in UTC. SQLite has no time zones and stores the same instant without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    @property
    def python_type(self) -> type[datetime]:
        """Type of the values that come from the database."""
        return datetime

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[object], datetime | None]:
        """Convert values from the database. A value that is not a time (SQLite allows it) becomes `UNREADABLE_TIME`."""
        convert = super().result_processor(dialect, coltype)
        assert convert is not None, "there is a process_result_value"

        def converted(value: object) -> datetime | None:
            try:
                found: datetime | None = convert(value)
            except (ValueError, TypeError):
                return UNREADABLE_TIME
            return found

        return converted

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a value for the database."""
        if value is None:
            return None
        assert value.tzinfo is not None, "times of the store are aware"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a value from the database."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


METADATA = MetaData()

schema_table = Table("moe_schema", METADATA, Column("version", Integer, primary_key=True, autoincrement=False))

jobs_table = Table(
    "moe_jobs",
    METADATA,
    # The order of submission. Times can't give it: they may be equal, or jump.
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("owner", String(256), nullable=False),
    Column("recipe", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("scheduled_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("cancel_requested_at", UtcDateTime),
    Column("attempts", Integer, nullable=False, default=0),
    Column("reason", Text),
    Column("artifacts", Text, nullable=False, default="[]"),
    Column("supervisor", String(256)),
    Column("pid", Integer),
    Column("pid_birth", Double),
    Column("folder", Text, nullable=False),
    Column("queued_at", UtcDateTime, nullable=False),
    Column("lost", Integer, nullable=False, default=0),
    Column("stopped_by", String(64)),
    Column("gpus", Integer),
    Column("devices", Text),
    # The place in the queue, see `queue`; a counter, for the same reason as `seq`.
    Column("turn", Integer, nullable=False),
    Column("parent", String(128)),  # id of the job that this job exports
    Column("executor", String(16)),  # where the job runs; null: on the supervisor's machine
    Column("run", String(128)),  # the job's name on a cluster
    Column("note", Text),  # its owner's words about it
    Column("sweep", String(128)),  # id of the sweep that it belongs to
    Column("notify", Text),  # JSON: where its end is reported, see `outbox`
    Column("pipeline", String(128)),  # id of the pipeline that it belongs to
    Index("moe_jobs_state_owner_turn", "state", "owner", "turn"),
    Index("moe_jobs_owner_started_at", "owner", "started_at"),
    Index("moe_jobs_ended_at", "ended_at"),
    Index("moe_jobs_state_seq", "state", "seq"),
    Index("moe_jobs_owner_seq", "owner", "seq"),
    Index("moe_jobs_parent", "parent"),
    Index("moe_jobs_sweep", "sweep"),
    Index("moe_jobs_pipeline", "pipeline"),
    sqlite_autoincrement=True,
)

supervisor_table = Table(
    "moe_supervisor",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("holder", String(256)),
    Column("pid", Integer),
    Column("beat_at", UtcDateTime),
    Column("lease_s", Double),
    Column("turns", Integer, nullable=False, server_default="0"),  # turns given out so far
)

# Identifies the store, whatever URL leads to it. Each state folder names the store that knows its jobs.
identity_table = Table("moe_store", METADATA, Column("id", String(36), primary_key=True))

# Which job needs the files of which. A row is deleted with either job.
uses_table = Table(
    "moe_uses",
    METADATA,
    Column("job", String(128), primary_key=True),
    Column("used", String(128), primary_key=True),
    Column("until_completed", Boolean, nullable=False),  # once completed, the job no longer needs them
    Index("moe_uses_used", "used"),
)

# One row for each version of an owner's data set; the rows are in the file that `id` names.
datasets_table = Table(
    "moe_datasets",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("owner", String(256), nullable=False),
    Column("name", String(128), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("turn", Integer, nullable=False),  # the highest turn of a name is its current version
    Column("rows", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("columns", Text, nullable=False),  # JSON
    Column("created_at", UtcDateTime, nullable=False),
    Index("moe_datasets_version", "owner", "name", "sha256", unique=True),
    Index("moe_datasets_turn", "owner", "name", "turn"),
)

# The time during which a job held GPUs, see `limits`. Rows are deleted after two days.
gpu_use_table = Table(
    "moe_gpu_use",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("owner", String(256), nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime, nullable=False),
    Index("moe_gpu_use_owner_ended_at", "owner", "ended_at"),
    Index("moe_gpu_use_ended_at", "ended_at"),
)

# What owners label their jobs with; a row is deleted with its job.
labels_table = Table(
    "moe_labels",
    METADATA,
    Column("job", String(128), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    Index("moe_labels_key_value", "key", "value", "job"),
)

# Sweeps, see `sweep_rows`. The jobs of a sweep are ordinary jobs, and its state follows from theirs.
sweeps_table = Table(
    "moe_sweeps",
    METADATA,
    Column("turn", Integer, primary_key=True, autoincrement=False),  # the order of submission
    Column("id", String(128), nullable=False, unique=True),
    Column("owner", String(256), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("cancel_requested_at", UtcDateTime),
    Column("max_parallel", Integer, nullable=False),
    Column("plan", Text, nullable=False),  # JSON of what was asked for
    Index("moe_sweeps_owner_turn", "owner", "turn"),
)

# What a job of a sweep is in it; a row is deleted with its job, and a sweep with its last row.
trials_table = Table(
    "moe_trials",
    METADATA,
    Column("job", String(128), primary_key=True),
    Column("sweep", String(128), nullable=False),
    Column("number", Integer, nullable=False),
    Column("chosen", Text, nullable=False),  # JSON: the values of the swept settings
    Column("is_read", Boolean, nullable=False),  # the job has ended, and every figure of it is in the store
    Column("pruned_at", Integer),  # number of the evaluation after which the sweep ended it; 0: resumed since
    Column("pruner_state", Text, nullable=False),  # JSON: what the pruner remembers about it
    Index("moe_trials_sweep_number", "sweep", "number", unique=True),
    Index("moe_trials_is_read", "is_read"),
)

# The held-out figures of a job of a sweep, in the order of its evaluations.
trial_figures_table = Table(
    "moe_trial_figures",
    METADATA,
    Column("job", String(128), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # 1 for the first evaluation after a step
    Column("step", BigInteger, nullable=False),
    Column("value", Double),  # null: not a number
)

# Which job must complete before another one starts, see `wait_rows`. Rows go once the waiting job's names are resolved.
waits_table = Table(
    "moe_waits",
    METADATA,
    Column("job", String(128), primary_key=True),
    Column("used", String(128), primary_key=True),
    Column("used_seq", Integer, nullable=False),  # of the same job: a later one may get the id of a deleted one
    Column("through_export", Boolean, nullable=False),  # the export that `used` makes when it completes is waited for
    Index("moe_waits_used_seq", "used_seq"),
)

# Pipelines, see `pipeline_rows`. Their parts are ordinary jobs, and their state follows from those.
pipelines_table = Table(
    "moe_pipelines",
    METADATA,
    Column("turn", Integer, primary_key=True, autoincrement=False),  # the order of submission
    Column("id", String(128), nullable=False, unique=True),
    Column("owner", String(256), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("cancel_requested_at", UtcDateTime),
    Column("notify", Text),  # JSON: where its end is reported, see `pipeline_ends`
    Index("moe_pipelines_owner_turn", "owner", "turn"),
)

# What a job is in its pipeline; a row is deleted with its job if that has completed. A pipeline and the rows that are
# left are deleted with its last job.
parts_table = Table(
    "moe_parts",
    METADATA,
    Column("job", String(128), primary_key=True),
    Column("pipeline", String(128), nullable=False),
    Column("number", Integer, nullable=False),
    Column("name", String(64), nullable=False),
    Index("moe_parts_pipeline_number", "pipeline", "number", unique=True),
)

# Messages about jobs that ended, see `outbox`; a row is deleted with its job.
webhooks_table = Table(
    "moe_webhooks",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),  # the receiver's key against a second delivery
    Column("job", String(128), nullable=False),
    Column("url", Text, nullable=False),
    Column("event", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("told", Text),  # what the last attempt met
    Index("moe_webhooks_state_due_at", "state", "due_at"),
    Index("moe_webhooks_job", "job"),
    sqlite_autoincrement=True,
)
