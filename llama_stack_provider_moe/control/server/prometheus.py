"""The store's figures in Prometheus' text format, version 0.0.4.

Each request counts again, so the figures are right even after a restart. All of them are gauges, because deleted jobs
are not counted.
"""

from collections.abc import Mapping
from datetime import datetime

from llama_stack_provider_moe.control.store.job_counts import JobCounts
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.recipes import RECIPES

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = Mapping[str, str]


def of_store(store: JobStore) -> str:
    """Return the document of a store as it is now."""
    alive = store.live_supervisor() is not None
    return metrics_text(store.job_counts(), now(), alive)


def metrics_text(job_counts: JobCounts, moment: datetime, supervisor_is_alive: bool) -> str:
    """Return the document.

    Args:
        job_counts: the counts of all jobs.
        moment: the time at which they were counted.
        supervisor_is_alive: whether a supervisor holds the lease.
    """
    known = sorted({*RECIPES, *(recipe for recipe, _ in job_counts.groups)})
    groups = [
        ({"recipe": recipe, "state": state.value}, job_counts.groups.get((recipe, state)))
        for recipe in known
        for state in JobState
    ]
    waited_s = 0.0 if job_counts.waits_since is None else max(0.0, (moment - job_counts.waits_since).total_seconds())
    return "".join([
        _family("moe_jobs", "Jobs in the store.", [(about, found.jobs if found else 0) for about, found in groups]),
        _family("moe_jobs_starts", "Training processes started for the jobs in the store.",
                [(about, found.attempts if found else 0) for about, found in groups]),
        _family("moe_jobs_lost", "Training processes lost by the jobs in the store since their last submission or "
                "resumption.", [(about, found.lost if found else 0) for about, found in groups]),
        _family("moe_jobs_longest_wait_seconds", "Longest time that a job in the queue has waited; 0 if none waits.",
                [({}, waited_s)]),
        _family("moe_supervisor_alive", "1 while a supervisor holds the lease; idle supervisors return it.",
                [({}, int(supervisor_is_alive))]),
    ])  # fmt: skip


def _family(name: str, meaning: str, samples: list[tuple[Labels, float]]) -> str:
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
    return "\n".join([*lines, *(f"{name}{_labels(labels)} {value}" for labels, value in samples)]) + "\n"


def _labels(labels: Labels) -> str:
    inner = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""
