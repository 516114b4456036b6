"""`cluster.json` in a job's folder: which run of the job counts on a cluster, and what is wished of it.

The supervisor writes it, and the job's leaders on the nodes look at it once a second (`training.node`), so a wish
reaches them without a way from here to there but the folder that all share. It is a fence too: a leader that finds
another run named has been replaced, as after a head that was restarted and knows no jobs any more, and ends at once.

The environment stands here and not in Ray's `runtime_env`, which Ray shows to whoever may open its dashboard.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.jobs.folder import write_atomic
from llama_stack_provider_moe.spec import Block

RUN_FILE = "cluster.json"
HEED_S = 1.0  # between two looks of a leader
# Before a run's processes begin, so that those of the run before it have seen that they were replaced, and are gone.
FENCE_S = 5.0

Wish = Literal["train", "stop", "kill"]


class ClusterRun(Block):
    """One start of a job on a cluster."""

    run: str = Field(description="Its name there, used once.")
    number: int = Field(ge=1, description="How many starts of the job there were on a cluster, with this one.")
    wish: Wish = Field(default="train", description="stop: save a checkpoint and end; kill: end at once.")
    environment: dict[str, str] = Field(default_factory=dict, description="For processes, where a node has no other.")
    overrides: dict[str, str] = Field(default_factory=dict, description="For processes, whatever a node has.")
    cpus_per_process: int = Field(default=1, ge=1, description="See `RayConfig`.")
    placement_s: float = Field(default=0.0, ge=0, description="See `RayConfig`.")

    def write(self, folder: Path) -> None:
        """Make it the one that counts; readable by this user alone."""
        write_atomic(folder / RUN_FILE, self)


def read_run(folder: Path) -> ClusterRun | None:
    """What counts in a job's folder; None where it has never been on a cluster, or this machine does not see it.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return ClusterRun.model_validate_json((folder / RUN_FILE).read_bytes())
    except FileNotFoundError:
        return None
