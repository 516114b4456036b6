"""Withdraw what a deleted export has put on the inference server."""

import logging
from pathlib import Path

from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.serving.record import read_record
from llama_stack_provider_moe.serving.servers import server_of
from llama_stack_provider_moe.serving.wire import BRIEF_S
from llama_stack_provider_moe.spec.serving_config import ServingConfig

log = logging.getLogger(__name__)


def withdraw(folder: Path, serving: ServingConfig | None) -> bool:
    """Withdraw the model of a deleted export.

    Only what the server's own configuration names is touched: of the record, which the training process wrote, the name
    of the model counts, and for a file its identity.

    Args:
        folder: Where the export's folder is now.
        serving: The server's configuration.

    Returns:
        Whether nothing is left that a later attempt could withdraw.
    """
    try:
        record = read_record(JobFolder(folder))
    except (OSError, ValueError) as error:
        log.warning("%s: what it has on the inference server can't be read, and stays there: %s", folder.name, error)
        return True
    if record is None:
        return True
    if serving is None or (serving.kind, serving.provider_id) != (record.kind, record.provider_id):
        log.warning("model %s (%s) stays on its server: `serving` has changed since", record.model_id, record.kind)
        return True
    try:
        server_of(serving, record.name, BRIEF_S).withdraw(record)
    except (MoeError, OSError) as error:
        log.warning("model %s is withdrawn later: %s", record.model_id, error)
        return False
    log.info("model %s is withdrawn", record.model_id)
    return True
