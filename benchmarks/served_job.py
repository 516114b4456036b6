"""A job on a running server, from its submission to its end."""

import time
from typing import Any

from tests.support.host_harness import Server

LIMIT_S = 3600.0


def run_to_end(server: Server, body: dict[str, Any], poll_s: float) -> dict[str, Any]:
    """Submit a job and wait until it has completed.

    Args:
        poll_s: how often to ask; asking costs a busy machine some of the time that is measured.
    """
    with server.http() as http:
        http.headers["Connection"] = "close"
        answer = http.post("/jobs", json=body)
        assert answer.status_code == 200, answer.text
        deadline = time.monotonic() + LIMIT_S
        job: dict[str, Any]
        while (job := http.get(f"/jobs/{body['job_uuid']}/status").json())["status"] in ("scheduled", "in_progress"):
            assert time.monotonic() < deadline, job
            time.sleep(poll_s)
    assert job["status"] == "completed", job
    return job
