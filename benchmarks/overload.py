"""How soon `/health` of a real server with a real PostgreSQL answers, while the server is overloaded in six ways.

    python -m benchmarks.overload [--out FILE]

The load comes from the same machine. The benchmark starts its own database, as the tests do.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.server_start import PACKAGES
from tests.support import overload
from tests.support.bad_inputs import DATASETS
from tests.support.host_harness import QUICKSTART, run_config, serving
from tests.support.overload import Watched
from tests.support.postgres_server import new_store_urls


def measure() -> dict[str, Watched]:
    """`/health` beside each kind of load, and alone; each is printed as it ends."""
    found: dict[str, Watched] = {}

    def note(kind: str, watched: Watched) -> None:
        found[kind] = watched
        print(f"{kind}: {watched}", flush=True)

    with tempfile.TemporaryDirectory() as name, new_store_urls() as new_url:
        folder, store_url = Path(name), new_url()
        roots = [str(folder / "models")]
        provider = {"store_url": store_url, "supervisor": {"start": False}, "allowed_roots": roots}
        with serving(run_config(QUICKSTART, folder, provider=provider), folder / "state") as server:
            server.register("words", DATASETS["words"])
            with overload.watching(server) as idle:
                server.http().post("/jobs", json=overload.JOB | {"job_uuid": "waits"}).raise_for_status()
                time.sleep(3)
            note("no load", idle)
            note("100 bodies of 1 MB of unknown keys", overload.unknown_keys(server))
            note("20 folders with FIFOs, named 5 times each", overload.fifos(server, folder / "models"))
            note("200 followers", overload.followers(server, "waits"))
            note("100 failing requests", overload.failing(server, store_url))
            note("a stopped database", overload.stopped_database(server, store_url))
            note("a database that was shut down", overload.ended_database(server, store_url))
    return found


def result(found: dict[str, Watched]) -> dict[str, Any]:
    """Per kind of load: answers by status, their median and longest time in milliseconds, the load's own answers."""
    return {
        kind: {
            "answers": {str(status): count for status, count in watched.statuses.items()},
            "median_ms": round(statistics.median(watched.seconds) * 1000, 1),
            "longest_ms": round(max(watched.seconds) * 1000, 1),
            "requests": {str(status): count for status, count in watched.answered.items()},
        }
        for kind, watched in found.items()
    }


def main() -> None:
    """Measure, print one line per kind of load, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / f"overload_{date.today()}.json", help="result file")
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    found = measure()
    written = {"machine": machine(), "versions": versions(*PACKAGES), "health": result(found)}
    arguments.out.write_text(json.dumps(written, indent=2) + "\n")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
