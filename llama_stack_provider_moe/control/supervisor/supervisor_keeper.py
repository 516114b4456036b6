"""Each server watches the supervisor, and replaces one that died while jobs wait or run, even without a request."""

import logging
import threading

from sqlalchemy.exc import SQLAlchemyError

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.failure_log import FailureLog
from llama_stack_provider_moe.control.supervisor.starting import ensure_supervisor
from llama_stack_provider_moe.errors import StoreReplaced
from llama_stack_provider_moe.spec.server_config import ProviderConfig

log = logging.getLogger(__name__)


class SupervisorKeeper:
    """A thread that checks the lease every `supervisor.lease_s` seconds, the time after which the lease expires.

    It is a thread and not a task, because llama-stack initialises a provider in an event loop that it then discards.

    Args:
        config: The provider's configuration. If `supervisor.start` is false, nothing is checked or started.
        store: The server's store.
    """

    def __init__(self, config: ProviderConfig, store: JobStore) -> None:
        self._config = config
        self._store = store
        self._closed = threading.Event()
        self._failures = FailureLog(log, config.state_dir)
        self._thread = threading.Thread(target=self._watch, name="moe-supervisor-keeper", daemon=True)

    def start(self) -> None:
        """Check now, so that jobs of an earlier server are continued, and then regularly."""
        if self._config.supervisor.start:
            self._look()
            self._thread.start()

    def close(self) -> None:
        """Stop checking. The supervisor continues."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def ensure_alive(self) -> None:
        """Make sure that a supervisor is alive. If none can be started now, jobs stay in the store and wait."""
        try:
            ensure_supervisor(self._config, self._store)
            self._failures.recovered()
        except StoreReplaced as replaced:
            log.error("%s", replaced)
        except SQLAlchemyError as error:
            log.warning("the supervisor could not be read from the job store: %s", str(error).partition("\n")[0])
        except OSError as error:
            self._failures.report(error, "no supervisor could be started; jobs wait until one can")

    def _watch(self) -> None:
        while not self._closed.wait(self._config.supervisor.lease_s):
            try:
                self._look()
            except (SQLAlchemyError, StoreReplaced) as error:  # requests report it to their callers
                log.warning("the job store could not be read: %s", str(error).partition("\n")[0])

    def _look(self) -> None:
        if self._store.has_work():
            self.ensure_alive()
