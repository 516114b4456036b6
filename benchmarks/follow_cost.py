"""What it costs the server to look at a long job: processor time of each poll, of a viewer, and of 200 followers.

    python -m benchmarks.follow_cost [--folder DIR] [--out FILE]

Two jobs in progress, each with about 1.3 GB of events: 50,000 steps of 8 layers of 128 experts, and 10,000 steps of 48
layers of 128 experts. Between two polls, one step is appended. The routes run in this process without a host, so that
its processor time is the server's; each figure is a mean over the polls. The first look reads the file once, and all
ratios compare within this run.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from fastapi import FastAPI

from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.control.server import timeline
from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.events import Routing, Step, now
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.routing_figures import LayerRouting
from tests.support.dashboard_jobs import Workshop
from tests.support.host_support import app_of, folder_of, scope_of, serving_in_process, submit

PACKAGES = ("fastapi", "pydantic", "sqlalchemy")
POLLS = 20
FOLLOWERS = 200
FOLLOWED_S = 20.0
EVERY_S = 0.5  # between two steps while a job is followed


class Shape(NamedTuple):
    """A job.

    Attributes:
        name: its name.
        steps: optimiser steps that are in its file.
        layers: layers with experts.
        experts: experts of each.
    """

    name: str
    steps: int
    layers: int
    experts: int


SHAPES = (Shape("steps", 50_000, 8, 128), Shape("tables", 10_000, 48, 128))


class Writer:
    """Appends the steps of a job as its training process does; the routing tables of all steps are the same.

    Args:
        shape: the job.
        path: its file of events.
    """

    def __init__(self, shape: Shape, path: Path) -> None:
        rng = random.Random(0)
        shares = [[rng.random() for _ in range(shape.experts)] for _ in range(shape.layers)]
        table = Routing(step=0, layers=[
            LayerRouting(layer=layer, share=share, min=min(share), max=max(share), cv=0.2, dead=0, load_entropy=2.6,
                         token_entropy=2.1)
            for layer, share in enumerate(shares)
        ])  # fmt: skip
        self._tables = table.model_dump_json().partition('"layers"')[2]
        self._file = path.open("ab")
        self.step = 0

    def add(self, count: int = 1) -> None:
        """Append steps."""
        for _ in range(count):
            self.step += 1
            figures = {"loss": 1.1, "ce": 1.1, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_s": 5000.0}
            step = Step(step=self.step, max_steps=60_000, epoch=self.step / 20_000, metrics=figures, eta_s=9.0)
            tables = f'{{"time":"{now().isoformat()}","type":"routing","step":{self.step},"layers"{self._tables}\n'
            self._file.write(step.model_dump_json().encode() + b"\n" + tables.encode())
        self._file.flush()


async def get(app: FastAPI, path: str, **query: Any) -> bytes:
    """The body of an answer, without the cost of a client."""
    body: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
        body.append(message.get("body", b""))

    await app(scope_of((PREFIX + path).encode(), urlencode(query).encode()), receive, send)
    return b"".join(body)


async def cost_ms(ask: Callable[[], Awaitable[object]], count: int, between: Callable[[], None]) -> float:
    """Processor milliseconds of this process for one call, without those of `between`."""
    used_s = 0.0
    for _ in range(count):
        between()
        before = time.process_time()
        await ask()
        used_s += time.process_time() - before
    return round(1000 * used_s / count, 3)


async def of_polls(app: FastAPI, shape: Shape, writer: Writer, path: Path) -> dict[str, float]:
    """Milliseconds of each kind of poll."""
    job = f"/jobs/{shape.name}"
    newest = lambda: get(app, f"{job}/metrics", since_step=writer.step - 2)  # noqa: E731
    await get(app, "/overview")  # imports
    found = {"a pass over the lines alone": await cost_ms(lambda: _lines(path), 1, lambda: None)}
    found["first look"] = await cost_ms(newest, 1, lambda: None)
    for name, ask, between in (
        ("status", lambda: get(app, f"{job}/status"), writer.add),
        ("status, nothing new", lambda: get(app, f"{job}/status"), lambda: None),
        ("figures", lambda: get(app, "/figures", jobs=shape.name), writer.add),
        ("metrics since the last step", newest, writer.add),
        ("metrics, 100 points", lambda: get(app, f"{job}/metrics", limit=100), writer.add),
        ("metrics, 1,000 points", lambda: get(app, f"{job}/metrics", limit=1000), writer.add),
        ("routing, 200 columns", lambda: get(app, f"{job}/routing", limit=200), writer.add),
    ):
        await ask()
        found[name] = await cost_ms(ask, POLLS, between)
    return found


async def _lines(path: Path) -> int:
    return sum(1 for _ in timeline.lines(path))


async def of_followers(app: FastAPI, shape: Shape, writer: Writer, cursor: int, count: int) -> float:
    """Share of a core that `count` followers of the curves need."""
    query = urlencode({"follow": True, "types": "step,evaluation,resumed", "cursor": cursor}).encode()
    received: list[int] = [0] * count

    async def follow(number: int) -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            received[number] += message.get("body", b"").count(b'"type": "step"')

        await asyncio.sleep(number / count * FOLLOWED_S / 4)  # like users, not all at the same moment
        await app(scope_of(f"{PREFIX}/jobs/{shape.name}/events".encode(), query), receive, send)

    tasks = [asyncio.ensure_future(follow(number)) for number in range(count)]
    before = time.process_time()
    for _ in range(round(FOLLOWED_S / EVERY_S)):
        writer.add()
        await asyncio.sleep(EVERY_S)
    used_s = time.process_time() - before
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert min(received) > 0, f"a follower got nothing: {received}"
    return round(used_s / FOLLOWED_S, 4)


def job(service: PostTrainingService, shape: Shape) -> tuple[Writer, JobFolder]:
    """A job that runs, with its steps."""
    submit(service, job_uuid=shape.name)
    Workshop(service).begin(shape.name)
    folder = folder_of(service, shape.name)
    writer = Writer(shape, folder.events)
    writer.add(shape.steps)
    return writer, folder


def measure(folder: Path, shapes: tuple[Shape, ...] = SHAPES) -> dict[str, Any]:
    """What each job costs, by its name."""
    found: dict[str, Any] = {}
    for shape in shapes:
        with serving_in_process(folder / shape.name) as service:
            writer, job_folder = job(service, shape)
            app, path = app_of(service), job_folder.events
            size = path.stat().st_size
            polls = asyncio.run(of_polls(app, shape, writer, path))
            alone = asyncio.run(of_followers(app, shape, writer, path.stat().st_size, 1))
            many = asyncio.run(of_followers(app, shape, writer, path.stat().st_size, FOLLOWERS))
            path.unlink()
        found[shape.name] = {
            "steps": shape.steps, "layers": shape.layers, "experts": shape.experts, "bytes": size,
            "cpu_ms": polls,
            "first_look_to_poll": {
                name: round(polls["first look"] / polls[name]) for name in ("status", "metrics since the last step")
            },
            "share_of_a_core": {"1 follower": alone, f"{FOLLOWERS} followers": many},
            "followers_to_one": round(many / alone, 1),
        }  # fmt: skip
        print(json.dumps({shape.name: found[shape.name]}, indent=2), flush=True)
    return found


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the files go; by default a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS / f"follow_cost_{date.today()}.json", help="result file")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found = measure(Path(name))
    written = {"command": "python -m benchmarks.follow_cost", "machine": machine(), "versions": versions(*PACKAGES)}
    arguments.out.write_text(json.dumps(written | {"jobs": found}, indent=2) + "\n")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
