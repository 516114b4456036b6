"""A store's figures in Prometheus' text format, version 0.0.4; counted anew at each request, so right after a restart.

All are gauges: a deleted job is no longer counted.
"""

from collections.abc import Mapping
from datetime import datetime

from llama_stack_provider_moe.host.telemetry import RECIPES
from llama_stack_provider_moe.jobs.census import Census
from llama_stack_provider_moe.jobs.state import JobState

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = Mapping[str, str]


def exposition(census: Census, moment: datetime, supervisor_is_alive: bool) -> str:
    """The document.

    Args:
        census: all jobs.
        moment: when it was taken.
        supervisor_is_alive: whether a supervisor holds the lease.
    """
    known = sorted({*RECIPES, *(recipe for recipe, _ in census.groups)})
    groups = [
        ({"recipe": recipe, "state": state.value}, census.groups.get((recipe, state)))
        for recipe in known
        for state in JobState
    ]
    waited_s = 0.0 if census.waits_since is None else max(0.0, (moment - census.waits_since).total_seconds())
    return "".join([
        _family("moe_jobs", "Jobs in the store.", [(about, found.jobs if found else 0) for about, found in groups]),
        _family("moe_jobs_starts", "Training processes started for the jobs in the store.",
                [(about, found.attempts if found else 0) for about, found in groups]),
        _family("moe_jobs_lost", "Training processes lost by the jobs in the store since they were last submitted or "
                "resumed.", [(about, found.lost if found else 0) for about, found in groups]),
        _family("moe_jobs_longest_wait_seconds", "How long the job waits that waits longest; 0: none waits.",
                [({}, waited_s)]),
        _family("moe_supervisor_alive", "1 where a supervisor holds the lease, which idle ones give back.",
                [({}, int(supervisor_is_alive))]),
    ])  # fmt: skip


def _family(name: str, meaning: str, samples: list[tuple[Labels, float]]) -> str:
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
    return "\n".join([*lines, *(f"{name}{_labels(labels)} {value}" for labels, value in samples)]) + "\n"


def _labels(labels: Labels) -> str:
    inner = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""
