"""`cluster.json` in a job's folder: which run of the job counts on a cluster, and what the run should do.

The supervisor writes it, and the job's leaders on the nodes read it once a second (`compute.worker.ray.node`). So a
request reaches them through the shared folder alone. The file is also a fence: a leader that finds another run in it
was replaced, for example after a restart of the cluster's head, which forgets all jobs. It ends at once.

The environment is in this file and not in Ray's `runtime_env`, which Ray shows to everybody who can open its dashboard.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec import Block

RUN_FILE = "cluster.json"
HEED_S = 1.0  # time between two reads by a leader
# Delay before a run's processes start, so that the processes of the previous run notice the change and end.
FENCE_S = 5.0

Wish = Literal["train", "stop", "kill"]


class ClusterRun(Block):
    """One start of a job on a cluster."""

    run: str = Field(description="Unique name of the run on the cluster.")
    number: int = Field(ge=1, description="Number of this start of the job on a cluster, from 1.")
    wish: Wish = Field(default="train", description="stop: save a checkpoint and end; kill: end at once.")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables for processes; a node's own values go first."
    )
    overrides: dict[str, str] = Field(
        default_factory=dict, description="Environment variables for processes; they replace a node's own values."
    )
    cpus_per_process: int = Field(default=1, ge=1, description="See `RayConfig`.")
    placement_s: float = Field(default=0.0, ge=0, description="See `RayConfig`.")

    def write(self, folder: Path) -> None:
        """Write the file, so that this run counts. Only this user can read it."""
        write_atomic(folder / RUN_FILE, self, mode=0o600)  # it contains secrets


def read_run(folder: Path) -> ClusterRun | None:
    """Return the run that counts; None if the job was never on a cluster or this machine does not see its folder.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return read_as(ClusterRun, (folder / RUN_FILE).read_bytes())
    except FileNotFoundError:
        return None
