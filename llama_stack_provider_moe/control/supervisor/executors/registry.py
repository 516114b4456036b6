"""Executors by name (`Job.executor`), each created when the first job needs it."""

from pathlib import Path

from llama_stack_provider_moe.control.supervisor.executors import Child, Executor, Exit, Record
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor
from llama_stack_provider_moe.spec.server_config import ProviderConfig

LOCAL = None
RAY = "ray"


class Executors:
    """The executors of a supervisor.

    Args:
        config: The provider's configuration.
        local: What runs the jobs of this machine; by default a `LocalExecutor`.
    """

    def __init__(self, config: ProviderConfig, local: Executor | None = None) -> None:
        self._config = config
        self._made: dict[str | None, Executor] = {LOCAL: LocalExecutor(config) if local is None else local}

    def __getitem__(self, name: str | None) -> Executor:
        """Return the executor for jobs whose `executor` is `name`."""
        if name not in self._made:
            self._made[name] = self._make(str(name))
        return self._made[name]

    def _make(self, name: str) -> Executor:
        if name != RAY or self._config.executors.ray is None:
            return MissingExecutor(name)
        # httpx takes half a second to import, and most supervisors use no cluster.
        from llama_stack_provider_moe.control.supervisor.executors.ray import RayExecutor

        return RayExecutor(self._config, self._config.executors.ray)


class MissingExecutor:
    """Placeholder for an executor that is no longer configured while the store still has jobs for it.

    Args:
        name: Name of the executor.
    """

    def __init__(self, name: str) -> None:
        self._message = f"the job should run on {name!r}, but this supervisor's configuration has no `executors.{name}`"

    def submit(self, folder: Path, record: Record, devices: str | None, attempt: str) -> bool:
        """See `Executor`. It always raises OSError."""
        raise OSError(self._message)

    def poll(self, child: Child) -> Exit | None:
        """See `Executor`. The run can't be watched, so it counts as failed."""
        return Exit(1, message=self._message)

    def stop(self, child: Child, number: int) -> None:
        """See `Executor`. The run can't be reached, so nothing happens."""
