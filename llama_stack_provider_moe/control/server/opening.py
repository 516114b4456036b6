"""What a server opens when it starts: the state folder, the store, and the watch over a supervisor.

A host loads this module at its start, so it imports nothing that only a request needs. All that can be wrong with a
configuration, a folder or a store is found here, before the host says that it is ready.
"""

import logging
from dataclasses import dataclass

from opentelemetry.metrics import Meter, get_meter

from llama_stack_provider_moe.control.config_check.start import plain_start_errors
from llama_stack_provider_moe.control.server import compat, host_models
from llama_stack_provider_moe.control.server.telemetry import METER, Telemetry
from llama_stack_provider_moe.control.store import dataset_files, intake, state_layout
from llama_stack_provider_moe.control.store.state_folder import claim_state_folder
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor import removal
from llama_stack_provider_moe.control.supervisor.supervisor_keeper import SupervisorKeeper
from llama_stack_provider_moe.spec.server_config import ProviderConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """What a started server has open.

    Attributes:
        store: the store of jobs.
        telemetry: its figures for the host's exporter.
        keeper: starts a supervisor when there is work for one.
    """

    store: JobStore
    telemetry: Telemetry
    keeper: SupervisorKeeper

    def close(self) -> None:
        """Close all of it; the supervisor and its jobs continue."""
        self.telemetry.close()
        self.keeper.close()
        self.store.close()


def opened(config: ProviderConfig, deps: compat.Deps, meter: Meter | None = None) -> Opened:
    """Make the state folder, open the store, and start a supervisor for the jobs that an earlier server left.

    Args:
        config: the server's configuration.
        deps: the host's APIs.
        meter: receives the figures; None: the host's exporter, if it has one.

    Raises:
        InvalidConfig: the server can't start with this configuration.
    """
    with plain_start_errors(config):
        return _opened(config, deps, get_meter(METER) if meter is None else meter)


def _opened(config: ProviderConfig, deps: compat.Deps, meter: Meter) -> Opened:
    host_models.must_have_provider(config.serving, deps)
    state_layout.tighten(config.state_dir, config.privacy, log.warning)
    staging = config.state_dir / "staging"
    for folder in (config.jobs_dir, config.models_dir, staging, removal.deleted_dir(config)):
        config.privacy.make_folder(folder)
    store = JobStore(config.url)
    try:
        claim_state_folder(config, store)
        removal.sweep(store, config)
        dataset_files.sweep(config, store.datasets)
    except BaseException:
        store.close()
        raise
    telemetry = Telemetry(meter, store, config.state_dir / "telemetry.lock")
    intake.remove_stale(staging)
    keeper = SupervisorKeeper(config, store)
    keeper.start()
    return Opened(store, telemetry, keeper)
