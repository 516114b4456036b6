"""Load that overloads a real server, and how fast its `/health` answers meanwhile."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import psutil
import psycopg

from tests.support.host_harness import API, Server

JOB = {"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "words"}}


@dataclass
class Watched:
    """How `/health` answered.

    Attributes:
        seconds: of each answer.
        statuses: the number of each.
        answered: statuses of the requests that are the load.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)

    def __str__(self) -> str:
        ordered = sorted(self.seconds)
        median_ms, longest_ms = ordered[len(ordered) // 2] * 1000, ordered[-1] * 1000
        health = f"{len(ordered)} answers of /health, {dict(self.statuses)}"
        return f"{health}: median {median_ms:.0f} ms, longest {longest_ms:.0f} ms; requests: {dict(self.answered)}"


@contextmanager
def watching(server: Server, every_s: float = 0.05) -> Iterator[Watched]:
    """Inside, request `/health` again and again, one request after the other."""
    found = Watched()
    # In another process: threads of this one would wait for the threads that make the load.
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.overload", server.url + API + "/health", str(every_s)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as watcher:  # fmt: skip
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "begun\n"
        try:
            yield found
        finally:
            for status, seconds in json.loads(watcher.communicate("", timeout=600)[0]):
                found.statuses[status] += 1
                found.seconds.append(seconds)


def _watch(url: str, every_s: float) -> None:
    """Run until standard input ends; the answers go to standard output."""
    answers: list[tuple[int, float]] = []
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    with httpx.Client(timeout=300) as client:
        client.get(url)  # connects
        print("begun", flush=True)
        while not answers or not ended.wait(every_s):
            began = time.monotonic()
            status = client.get(url).status_code
            answers.append((status, time.monotonic() - began))
    print(json.dumps(answers))


def at_a_time(
    count: int, total: int, ask: Callable[[httpx.Client, int], httpx.Response], server: Server
) -> Counter[int]:
    """Send `total` requests, `count` at a time; returns their statuses."""
    limits = httpx.Limits(max_connections=count)
    with (
        httpx.Client(base_url=server.url + API, timeout=600, limits=limits) as client,
        ThreadPoolExecutor(count) as threads,
    ):
        return Counter(threads.map(lambda number: ask(client, number).status_code, range(total)))


def unknown_keys(server: Server) -> Watched:
    """Send 100 bodies with 1 MB of unknown keys."""
    bodies = [
        json.dumps(
            JOB | {f"unknown{'x' * size}{number:06d}": number for number in range(1_000_000 // (24 + size))}
        ).encode()
        for size in (0, 8)  # more values than a body may have, or fewer
    ]
    headers = {"Content-Type": "application/json"}
    with watching(server) as found:
        found.answered = at_a_time(
            25, 100, lambda client, number: client.post("/jobs", content=bodies[number % 2], headers=headers), server
        )
    return found


def fifos(server: Server, folder: Path) -> Watched:
    """Name 20 model folders whose config.json is a FIFO, 5 times each."""
    for number in range(20):
        (folder / f"m{number}").mkdir(parents=True)
        os.mkfifo(folder / f"m{number}" / "config.json")
    with watching(server) as found:
        found.answered = at_a_time(
            20,
            100,
            lambda client, number: client.post("/jobs", json=JOB | {"model": str(folder / f"m{number % 20}")}),
            server,
        )
    return found


def failing(server: Server, store_url: str) -> Watched:
    """Send 100 requests that raise an exception in the provider, because the store's table was changed."""
    with psycopg.connect(_address(store_url), autocommit=True) as database:
        database.execute("ALTER TABLE moe_jobs RENAME COLUMN recipe TO receipt")
        try:
            with watching(server) as found:
                found.answered = at_a_time(10, 100, lambda client, number: client.get(f"/jobs/j{number}"), server)
        finally:
            database.execute("ALTER TABLE moe_jobs RENAME COLUMN receipt TO recipe")
    return found


def followers(server: Server, job_id: str, count: int = 200, for_s: float = 15.0) -> Watched:
    """Let 200 clients follow a job that waits."""
    found = Watched()

    async def follow() -> None:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=server.url + API, timeout=300, limits=limits) as client:

            async def one() -> None:
                async with client.stream("GET", f"/jobs/{job_id}/logs", params={"follow": True}) as answer:
                    found.answered[answer.status_code] += 1
                    async for _ in answer.aiter_bytes():
                        pass

            tasks = []
            for _ in range(count):  # like users, not all at the same moment
                tasks.append(asyncio.ensure_future(one()))
                await asyncio.sleep(0.05)
            await asyncio.wait(tasks, timeout=for_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with watching(server) as seen:
        asyncio.run(follow())
    found.seconds, found.statuses = seen.seconds, seen.statuses
    return found


def stopped_database(server: Server, store_url: str) -> Watched:
    """Stop a database (it neither answers nor refuses), and send 60 requests."""
    postmaster, stopped = psutil.Process(_postmaster(store_url)), []
    with watching(server) as found:
        try:
            postmaster.send_signal(signal.SIGSTOP)  # first, because it starts the others
            for process in (postmaster, *postmaster.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP)
                    stopped.append(process)
            found.answered = at_a_time(20, 60, lambda client, number: client.get(f"/jobs/j{number}"), server)
            time.sleep(7)
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
    return found


def ended_database(server: Server, store_url: str) -> Watched:
    """Shut a database down, and send 60 requests."""
    postmaster = psutil.Process(_postmaster(store_url))
    with watching(server) as found:
        postmaster.send_signal(signal.SIGINT)
        with suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
            postmaster.wait(60)
        found.answered = at_a_time(20, 60, lambda client, number: client.get(f"/jobs/j{number}"), server)
    return found


def _address(store_url: str) -> str:
    query: dict[str, Any] = parse_qs(urlsplit(store_url).query)
    return f"host={query['host'][0]} user=moe dbname=postgres options={query['options'][0]}"


def _postmaster(store_url: str) -> int:
    folder = parse_qs(urlsplit(store_url).query)["host"][0]
    return int((Path(folder) / "data" / "postmaster.pid").read_text().splitlines()[0])


if __name__ == "__main__":
    _watch(sys.argv[1], float(sys.argv[2]))
