"""Every server's watch over the supervisor: one that died while jobs wait or run is replaced, without a request."""

import logging
import threading

from sqlalchemy.exc import SQLAlchemyError

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.jobs.store import JobStore
from llama_stack_provider_moe.jobs.supervisor import ensure_supervisor

log = logging.getLogger(__name__)


class Caretaker:
    """A thread that looks at the lease once in `supervisor.lease_s` seconds, the time after which it counts as lost.

    A thread, not a task: llama-stack initialises a provider in an event loop that it then throws away.

    Args:
        config: the provider's; with `supervisor.start` false nothing is ever started, nor looked at.
        store: the server's.
    """

    def __init__(self, config: ProviderConfig, store: JobStore) -> None:
        self._config = config
        self._store = store
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="moe-caretaker", daemon=True)

    def start(self) -> None:
        """Look now, so that jobs which an earlier server left are seen to, and from now on."""
        if self._config.supervisor.start:
            self._look()
            self._thread.start()

    def close(self) -> None:
        """Look no more; a supervisor goes on."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def see_to_jobs(self) -> None:
        """Have a supervisor alive. A job that is in the store is not lost when none can be started now."""
        try:
            ensure_supervisor(self._config, self._store)
        except OSError:
            log.exception("no supervisor could be started; jobs wait until one is")

    def _watch(self) -> None:
        while not self._closed.wait(self._config.supervisor.lease_s):
            try:
                self._look()
            except SQLAlchemyError as error:  # a database that restarts; requests tell their callers so
                log.warning("the job store could not be looked at: %s", str(error).partition("\n")[0])

    def _look(self) -> None:
        if self._store.has_work():
            self.see_to_jobs()
