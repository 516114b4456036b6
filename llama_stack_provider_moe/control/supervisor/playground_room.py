"""`PlaygroundRoom`: asks idle playgrounds to make room while another job waits for what they hold.

A playground holds a device, and one of `supervisor.max_concurrent_jobs`, while nobody asks anything. The request is a
file in its folder of prompts. Its training process reads it, and completes once it has been idle for `YIELD_S` seconds.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.prompts import PromptFiles
from llama_stack_provider_moe.spec.limits_config import LimitsConfig

RECIPE = "playground"
log = logging.getLogger("llama_stack_provider_moe.supervisor")


class PlaygroundRoom:
    """The running playgrounds of one store. Only the supervisor that holds the lease may call it.

    Args:
        store: The store.
        devices: All devices that may be assigned; None if none are known.
        limits: What each owner may use.
    """

    def __init__(self, store: JobStore, devices: Sequence[str] | None, limits: LimitsConfig) -> None:
        self._store = store
        self._devices = devices
        self._limits = limits

    def look(self, running: Sequence[Job]) -> None:
        """Call it after the claims of a step: ask for room, or take the request back if no job waits any more.

        Args:
            running: The jobs in progress, without those that this step has claimed.
        """
        jobs = [job for job in running if job.recipe == RECIPE]
        if not jobs:
            return
        is_wanted = self._store.would_start_without(RECIPE, self._devices, self._limits)
        for job in jobs:
            files = PromptFiles(JobFolder(Path(job.folder)).prompts)
            with suppress(FileNotFoundError):  # the folder is not made yet, or is gone
                if files.ask_for_room(is_wanted):
                    log.info("job %s: %s", job.id, "another job waits for its place" if is_wanted else "no job waits")
