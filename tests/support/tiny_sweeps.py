"""Sweeps of tiny children."""

import json
from collections.abc import Sequence
from typing import Any

from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.control.store.sweep_rows import NewSweep
from llama_stack_provider_moe.spec.limits_config import LimitsConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.sweeps import Halving


def add_sweep(
    store: JobStore,
    config: ProviderConfig,
    held_out: Sequence[Sequence[float]],
    max_parallel: int = 2,
    halving: Halving | None = None,
    metric: str = "validation_loss",
    direction: str = "minimize",
    **plan: Any,
) -> list[str]:
    """Add a sweep of jobs with these figures, one list a job; returns the jobs' names."""
    steps = len(held_out[0])
    jobs = []
    for number, figures in enumerate(held_out):
        folder = config.jobs_dir / f"sweep-{number}"
        folder.mkdir(parents=True)
        (folder / "child.json").write_text(
            json.dumps({"steps": steps, "held_out": list(figures), "metric": metric, **plan})
        )
        new = NewJob(folder.name, "ann", "sft", "some/model", str(folder), 0, sweep="sweep")
        jobs.append((new, {"lr": number}))
    asked = {
        "metric": metric, "direction": direction, "evaluations": steps, "parameters": {"lr": []},
        "random": None, "seed": 0, "halving": None if halving is None else halving.model_dump(),
    }  # fmt: skip
    added = store.sweeps.add(NewSweep("sweep", "ann", max_parallel, asked, jobs), LimitsConfig())
    return [job.id for job in added]
