"""Resolves the names of a job that waited for other jobs, once these have completed.

The supervisor runs this module as a process of its own (`supervisor.late_resolution`):

    python -m llama_stack_provider_moe.control.server.late_names JOB

with a ProviderConfig as JSON on standard input. It makes the checks of the submission again, this time with the files
that the other jobs left, and writes `spec.json`. The exit code is 0, or `REFUSED` with the reason on standard output.
"""

import json
import sys

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import resolve, views
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.store.state_folder import require_same_store
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.late_resolution import REFUSED
from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.jobdir.later import Later
from llama_stack_provider_moe.jobdir.reading import read_as, read_with, why_unreadable
from llama_stack_provider_moe.spec import JOB_SPEC, ExportSpec, JobSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig


def resolved(store: JobStore, config: ProviderConfig, job_id: str) -> JobSpec:
    """Return the spec of a job that waited, with its names resolved, and write it to the job's folder.

    Args:
        store: the store that has the job.
        config: the server's configuration.
        job_id: the job.

    Raises:
        InvalidInput, Forbidden, NotFound, Conflict: a named thing does not exist, or the job can't use it.
        ValidationError, OSError: its `later.json` can't be read.
    """
    folder = views.folder_of(store.get(job_id, None))
    later = read_as(Later, folder.later.read_bytes())
    spec = read_with(JOB_SPEC, json.dumps(later.spec).encode())
    assert not isinstance(spec, ExportSpec), "an export names no model"
    request = Draft(later.body, later.names, may_wait=False)
    found = resolve.resolve_names(request, spec, job_id, config, store, later.whose)
    write_atomic(folder.spec, found, mode=0o666 & ~config.privacy.umask)
    return found


def main() -> int:
    """Resolve the names of the job that the command line names; return the process's exit code."""
    config = read_as(ProviderConfig, sys.stdin.buffer.read())
    require_same_store(config)
    store = JobStore(config.url)
    try:
        resolved(store, config, sys.argv[1])
    except MoeError as refused:
        sys.stdout.write(str(refused))
        return REFUSED
    except ValidationError as damaged:
        sys.stdout.write(f"its later.json can't be read: {why_unreadable(damaged)}")
        return REFUSED
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
