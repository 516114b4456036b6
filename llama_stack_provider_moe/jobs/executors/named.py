"""Executors by the names that jobs know them by (`Job.executor`), each made when the first job needs it."""

from collections.abc import Callable
from pathlib import Path

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.jobs.executors import Child, Executor, Exit
from llama_stack_provider_moe.jobs.executors.local import LocalExecutor

LOCAL = None
RAY = "ray"


class Executors:
    """What the supervisor's jobs run on.

    Args:
        config: the provider's.
        local: what runs the jobs of this machine; left out: `LocalExecutor`.
    """

    def __init__(self, config: ProviderConfig, local: Executor | None = None) -> None:
        self._config = config
        self._made: dict[str | None, Executor] = {LOCAL: LocalExecutor(config) if local is None else local}

    def __getitem__(self, name: str | None) -> Executor:
        """The executor of jobs whose `executor` is `name`."""
        if name not in self._made:
            self._made[name] = self._make(str(name))
        return self._made[name]

    def _make(self, name: str) -> Executor:
        if name != RAY or self._config.executors.ray is None:
            return Gone(name)
        # httpx takes half a second to import, and most supervisors know no cluster.
        from llama_stack_provider_moe.jobs.executors.ray import RayExecutor

        return RayExecutor(self._config, self._config.executors.ray)


class Gone:
    """Stands for an executor that the configuration names no more, while the store still has jobs of it.

    Args:
        name: its.
    """

    def __init__(self, name: str) -> None:
        self._said = f"the job is to run on {name!r}, and this supervisor's configuration has no `executors.{name}`"

    def submit(self, folder: Path, record: Callable[[Child], None], devices: str | None) -> bool:
        """See `Executor`: it is not possible."""
        raise OSError(self._said)

    def poll(self, child: Child) -> Exit | None:
        """See `Executor`: nobody can look."""
        return Exit(1, said=self._said)

    def stop(self, child: Child, number: int) -> None:
        """See `Executor`: nobody can be told."""
