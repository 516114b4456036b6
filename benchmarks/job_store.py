"""The job store under load: many jobs in it, and many clients that poll a real server, on SQLite and on PostgreSQL.

Serves `run_configs/quickstart.yaml` by `llama stack run`, over a store that was filled before: half of the jobs belong
to the callers, the rest to 20 other owners; nine of ten have ended, 64 are in progress (a twentieth, of fewer than
1280), the others wait. Each has a folder with events. Each client sends one request after the other without a pause, on
its own connection; clients and server share the machine. The benchmark starts its own PostgreSQL, as the tests do: on a
socket, with its data in memory, without fsync. Run `make bench`, or

    python -m benchmarks.job_store [--jobs N] [--clients N] [--seconds S] [--out FILE]
"""

import argparse
import asyncio
import json
import math
import os
import random
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from sqlalchemy import insert, update

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.server_start import PACKAGES
from llama_stack_provider_moe.control.server.callers import ANONYMOUS
from llama_stack_provider_moe.control.store.opening import open_engine
from llama_stack_provider_moe.control.store.schema import jobs_table, supervisor_table
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.jobdir.events import Evaluation, EventLog, Routing, Started, Step, now
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.routing_figures import LayerRouting
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.host_harness import API, QUICKSTART, run_config, serving
from tests.support.postgres_server import binaries, new_store_urls

OWNERS, IN_PROGRESS, STEPS, LAYERS, EXPERTS = 20, 64, 500, 8, 16
PAGE = 100
ALONE = 100  # requests of each kind with nobody else there
ENDED = (JobState.COMPLETED,) * 8 + (JobState.FAILED, JobState.CANCELLED)
REQUEST_LIMIT_S = 60.0


class Request(NamedTuple):
    """One thing to ask, and what a right answer to it holds."""

    kind: str
    path: str
    is_right: Callable[[Any], bool]


def write_events(path: Path) -> None:
    """A run of `STEPS` steps with its experts' balance and ten evaluations, not at its end yet."""
    log = EventLog(path)
    log.append(Started(pid=1, versions={"device": "CPU"}))
    share = [1 / EXPERTS] * EXPERTS
    layers = [
        LayerRouting(layer=n, share=share, min=0.1, max=0.2, cv=0.1, dead=0, load_entropy=2.0, token_entropy=1.0)
        for n in range(LAYERS)
    ]
    names = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "tokens_per_s", "memory_bytes")
    for step in range(1, STEPS + 1):
        epoch, metrics = step / STEPS, dict.fromkeys(names, 1.23456 / step)
        log.append(Step(step=step, max_steps=2 * STEPS, epoch=epoch, metrics=metrics, eta_s=60.0))
        log.append(Routing(step=step, layers=layers))
        if step % (STEPS // 10) == 0:
            log.append(Evaluation(step=step, epoch=epoch, metrics={"validation_loss": 1.0}))
    log.close()


def fill(config: ProviderConfig, jobs: int) -> dict[str, list[str]]:
    """Put `jobs` jobs into a new store, in one transaction, and their folders on disk; the callers' own, by state."""
    template = config.state_dir / "events.jsonl"
    template.parent.mkdir(parents=True, exist_ok=True)
    write_events(template)
    first, waiting = now() - timedelta(seconds=jobs), jobs // 10 - min(IN_PROGRESS, jobs // 20)
    rows, own = [], defaultdict(list)
    for number in range(jobs):
        began = number >= jobs // 10 * 9 and number < jobs - waiting
        state = JobState.IN_PROGRESS if began else JobState.SCHEDULED
        if number < jobs // 10 * 9:
            state = ENDED[number // 2 % len(ENDED)]
        row = _row(config, number, first + timedelta(seconds=number), state)
        rows.append(row)
        if row["owner"] == ANONYMOUS:
            own[state.value].append(row["id"])
        folder = JobFolder(Path(row["folder"]))
        folder.root.mkdir(parents=True)
        if state is not JobState.SCHEDULED:
            os.link(template, folder.events)
    template.unlink()  # a server refuses a new state folder with a file that is not a server's
    engine = open_engine(config.url)
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(insert(jobs_table), rows)
        connection.execute(update(supervisor_table).values(turns=jobs))
    engine.dispose()
    return own


def _row(config: ProviderConfig, number: int, moment: datetime, state: JobState) -> dict[str, Any]:
    job_id = f"sft-{number:08x}"
    started = None if state is JobState.SCHEDULED else moment
    return {
        "id": job_id, "owner": f"owner{number // 2 % OWNERS}" if number % 2 else ANONYMOUS, "recipe": "sft",
        "model": "owner/some-model", "state": state.value, "scheduled_at": moment, "queued_at": moment,
        "started_at": started, "ended_at": moment if state.ended else None, "attempts": int(started is not None),
        "turn": number + 1, "folder": str(config.jobs_dir / job_id), "gpus": 0, "artifacts": "[]", "lost": 0,
        "reason": "the rows of this job are too strange" if state is JobState.FAILED else None,
    }  # fmt: skip


def requests(own: dict[str, list[str]], seed: int) -> Callable[[], Request]:
    """Draws what a dashboard asks: mostly how one job stands, sometimes a page of jobs."""
    dice = random.Random(seed)
    ended = sorted(own["completed"] + own["failed"] + own["cancelled"])  # by their age
    states = {"status_in_progress": own["in_progress"], "status_waiting": own["scheduled"], "status_ended": ended}

    def page(kind: str, query: str, size: int) -> Request:
        return Request(kind, f"/jobs?{query}", lambda answer: len(answer["data"]) == size)

    def draw() -> Request:
        kind = dice.choices([*states, "first_page", "later_page", "page_of_1000"], [4, 2, 2, 2, 2, 0.1])[0]
        if kind in states:
            job_id = dice.choice(states[kind])
            return Request(kind, f"/jobs/{job_id}/status", lambda answer: answer["job_uuid"] == job_id)
        if kind == "later_page":
            return page(kind, f"limit={PAGE}&after={dice.choice(ended[PAGE:])}", PAGE)
        size = PAGE if kind == "first_page" else min(1000, sum(map(len, own.values())))
        return page(kind, f"limit={size}", size)

    return draw


class Tally:
    """Milliseconds of every answer by kind of request, and what went wrong."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()

    async def ask(self, session: aiohttp.ClientSession, request: Request) -> None:
        """One request, from its first byte to the last one of its answer."""
        began = time.perf_counter()
        try:
            async with session.get(API + request.path) as response:
                content = await response.read()
            if response.status != 200:
                self.errors[f"{request.kind}: {response.status} {content[:200]!r}"] += 1
            elif not request.is_right(json.loads(content)):
                self.errors[f"{request.kind}: not the answer to {request.path}"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.errors[f"{request.kind}: {error!r}"] += 1
        self.ms[request.kind].append(1e3 * (time.perf_counter() - began))

    def summary(self, seconds: float) -> dict[str, Any]:
        """Figures for the result file."""
        count = sum(map(len, self.ms.values()))
        return {
            "requests": count, "requests_per_s": round(count / seconds, 1), "errors": self.errors.total(),
            "what_errors": dict(self.errors.most_common(5)),
            "ms": {kind: spread(ms) for kind, ms in sorted(self.ms.items())},
        }  # fmt: skip


def spread(ms: list[float]) -> dict[str, float]:
    """p50, p99 and the greatest; the p99 of n figures is the one that 99 % of them do not exceed."""
    ranked = sorted(ms)
    p99 = ranked[math.ceil(0.99 * len(ranked)) - 1]
    return {"n": len(ranked), "p50": round(statistics.median(ranked), 2), "p99": round(p99, 2),
            "max": round(ranked[-1], 2)}  # fmt: skip


def session_at(url: str) -> aiohttp.ClientSession:
    """A client with one connection of its own."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
    return aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=1))


async def one_client(url: str, own: dict[str, list[str]], each: int) -> dict[str, Any]:
    """`each` requests of every kind, one after the other."""
    tally, draw, began = Tally(), requests(own, seed=0), time.perf_counter()
    left = Counter(dict.fromkeys(KINDS, each))
    async with session_at(url) as session:
        while left.total():
            request = draw()
            if left[request.kind]:
                left[request.kind] -= 1
                await tally.ask(session, request)
    return tally.summary(time.perf_counter() - began)


async def many_clients(url: str, own: dict[str, list[str]], clients: int, seconds: float) -> dict[str, Any]:
    """`clients` at once, each without a pause, for so long."""
    tally, began = Tally(), time.perf_counter()

    async def poll(number: int) -> None:
        draw = requests(own, seed=number + 1)
        async with session_at(url) as session:
            while time.perf_counter() - began < seconds:
                await tally.ask(session, draw())

    await asyncio.gather(*(poll(number) for number in range(clients)))
    return tally.summary(time.perf_counter() - began)


KINDS = ("status_in_progress", "status_waiting", "status_ended", "first_page", "later_page", "page_of_1000")


def store_alone(url: str, own: dict[str, list[str]], each: int) -> dict[str, Any]:
    """The store's own part: the same questions without a server, in this process."""
    store, dice = JobStore(url), random.Random(0)
    ended = own["completed"][PAGE:]
    asked: dict[str, Callable[[], object]] = {
        "get": lambda: store.get(dice.choice(ended), ANONYMOUS),
        "first_page": lambda: store.list(ANONYMOUS, PAGE),
        "later_page": lambda: store.list(ANONYMOUS, PAGE, dice.choice(ended)),
        "page_of_1000": lambda: store.list(ANONYMOUS, 1000),
        "queue_position": lambda: store.queue_position(dice.choice(own["scheduled"])),
        "running": store.running,
        "counts": store.counts,
        "old_jobs": lambda: store.ended_before(now() - timedelta(days=1)),
        "claim_and_requeue": lambda: store.requeue(store.claim("benchmark").id, "benchmark"),  # type: ignore[union-attr]
        "submit": lambda: store.submit(f"new-{dice.random()}", "another", "sft", "m", "/nowhere"),
    }
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(each):
        for name, ask in asked.items():
            began = time.perf_counter()
            ask()
            found[name].append(1e3 * (time.perf_counter() - began))
    store.close()
    return {name: spread(ms) for name, ms in found.items()}


def measure(folder: Path, store_url: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill a store, serve it, ask; then the store without the server."""
    settings: dict[str, Any] = {"supervisor": {"start": False}}
    if store_url is not None:
        settings["store_url"] = store_url
    state_dir = folder / "state"
    config = ProviderConfig.model_validate({"state_dir": state_dir, **settings})
    own = fill(config, arguments.jobs)
    result: dict[str, Any] = {"store_ms": store_alone(config.url, own, arguments.alone)}
    with serving(run_config(QUICKSTART, folder, settings), state_dir) as server:

        async def both() -> list[dict[str, Any]]:
            asked: list[Callable[[], Awaitable[dict[str, Any]]]] = [
                lambda: one_client(server.url, own, arguments.alone),
                lambda: many_clients(server.url, own, arguments.clients, arguments.seconds),
            ]
            return [await ask() for ask in asked]

        result["one_client"], result["many_clients"] = asyncio.run(both())
    return result


def databases(stack: ExitStack) -> dict[str, tuple[str | None, str]]:
    """URL (None: a file in the state folder) and version, by name; PostgreSQL where it is installed."""
    found: dict[str, tuple[str | None, str]] = {"sqlite": (None, sqlite3.sqlite_version)}
    programs = binaries()
    if programs is None:
        print("PostgreSQL is not installed (Debian: apt-get install postgresql): measured on SQLite alone")
        return found
    told = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return found | {"postgresql": (stack.enter_context(new_store_urls())(), told.strip())}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs", type=int, default=10_000, help="number of jobs in the store, at least 500 (default: 10000)"
    )
    parser.add_argument("--clients", type=int, default=50, help="number of clients at the same time (default: 50)")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds for which they poll (default: 60)")
    parser.add_argument(
        "--alone", type=int, default=ALONE, help=f"requests of each kind without load (default: {ALONE})"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"job_store_{now():%Y-%m-%d}.json", help="result file")
    arguments = parser.parse_args()
    figures, load_before = {}, os.getloadavg()
    with ExitStack() as stack:
        found = databases(stack)
        for name, (url, _) in found.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            figures[name] = measure(folder, url, arguments)
            print(name, json.dumps(figures[name], indent=2), flush=True)
    result = {
        "what": f"llama stack run run_configs/quickstart.yaml over {arguments.jobs} jobs; {arguments.clients} clients "
        f"that poll for {arguments.seconds:g} s, and one alone; the store without a server",
        "time": now().isoformat(timespec="seconds"),
        "jobs": arguments.jobs,
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "databases": figures,
        "machine": machine() | {"load_average": {"before": load_before, "after": os.getloadavg()}},
        "versions": versions(*PACKAGES, "psycopg") | {name: told for name, (_, told) in found.items()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
