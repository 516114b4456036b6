"""Latency of a scorer with many clients, and what they get when it is killed, hangs, or has too much to do.

    $ python -m benchmarks.probe_quality --keep FOLDER
    $ python -m benchmarks.scorer_latency --probe FOLDER [--clients 50] [--seconds 60] [--threads N]

Each client asks for the score of one prompt, waits for it, and asks again. Then, with as many clients: the process is
killed; it is stopped, so that it hangs; and more clients ask at once than the queue holds. Of each the result has the
reasons of failures, and the longest time until one was told.
"""

import argparse
import asyncio
import json
import os
import signal
import tempfile
import time
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.probe_prompts import PromptSets
from llama_stack_provider_moe.control.scorer.client import ScorerClient
from llama_stack_provider_moe.shields.probe_card import read_card
from llama_stack_provider_moe.shields.scorer_settings import ScorerSettings
from llama_stack_provider_moe.shields.scores import ScorerFailed

NAME = "cooking"
HUNG_AFTER_S = 5.0
LIMIT_S = 600.0


class Tally:
    """Seconds of each score, and of each failure by its reason."""

    def __init__(self) -> None:
        self.scored: list[float] = []
        self.failed: dict[str, list[float]] = {}

    def figures(self, wall_s: float) -> dict[str, Any]:
        """For the result."""
        found: dict[str, Any] = {
            "scores": len(self.scored), "scores_per_s": len(self.scored) / wall_s,
            "failures": {
                reason: {"count": len(each), "longest_s": max(each)} for reason, each in sorted(self.failed.items())
            },
        }  # fmt: skip
        if len(self.scored) > 1:
            cuts = quantiles(self.scored, n=100)
            found |= {"p50_s": cuts[49], "p99_s": cuts[98], "longest_s": max(self.scored)}
        return found


async def ask(client: ScorerClient, prompt: str, deadline_s: float, tally: Tally) -> None:
    """Ask for one score."""
    began_s = time.monotonic()
    try:
        await client.score(NAME, [[{"role": "user", "content": prompt}]], deadline_s)
    except ScorerFailed as failed:
        tally.failed.setdefault(failed.reason, []).append(time.monotonic() - began_s)
        await asyncio.sleep(0.1)
    else:
        tally.scored.append(time.monotonic() - began_s)


async def crowd(client: ScorerClient, clients: int, seconds: float, deadline_s: float, tally: Tally) -> None:
    """Let clients ask, each one thing at a time, until the time is over."""
    prompts = cycle(PromptSets.made().baseline)
    until_s = time.monotonic() + seconds

    async def one() -> None:
        while time.monotonic() < until_s:
            await ask(client, next(prompts), deadline_s, tally)

    await asyncio.gather(*(one() for _ in range(clients)))


async def ready(client: ScorerClient) -> float:
    """Seconds until the scorer is ready."""
    began_s = time.monotonic()
    while (await client.health()).status != "ready":
        if time.monotonic() - began_s > LIMIT_S:
            raise SystemExit(f"the scorer is not ready: {(await client.health()).detail}")
        await asyncio.sleep(0.05)
    return time.monotonic() - began_s


async def disturbed(client: ScorerClient, number: signal.Signals, given: argparse.Namespace) -> dict[str, Any]:
    """Send the process a signal while clients ask; what they got, and when it was replaced."""
    tally, process = Tally(), client.keeper.process
    assert process is not None
    asking = asyncio.create_task(crowd(client, given.clients, given.deadline + 3, given.deadline, tally))
    await asyncio.sleep(1)
    before = (await client.health()).restarts
    began_s = time.monotonic()
    os.kill(process.pid, number)
    while (await client.health()).restarts == before:  # noqa: ASYNC110 - the keeper is a thread
        await asyncio.sleep(0.05)
    noticed_s = time.monotonic() - began_s
    await asking
    await ready(client)
    return {**tally.figures(given.deadline + 3), "noticed_s": noticed_s, "ready_again_s": time.monotonic() - began_s}


async def overloaded(client: ScorerClient, given: argparse.Namespace) -> dict[str, Any]:
    """Four times as many requests as the queue holds, all at once."""
    tally, began_s = Tally(), time.monotonic()
    prompts = islice(cycle(PromptSets.made().baseline), 4 * given.queue)
    await asyncio.gather(*(ask(client, prompt, given.deadline, tally) for prompt in prompts))
    return tally.figures(time.monotonic() - began_s)


async def measured(client: ScorerClient, given: argparse.Namespace) -> dict[str, Any]:
    """All parts, one after the other."""
    start_s = await ready(client)
    calm = Tally()
    await crowd(client, 1, min(10.0, given.seconds), given.deadline, Tally())  # warm
    await crowd(client, given.clients, given.seconds, given.deadline, calm)
    alone = Tally()
    await crowd(client, 1, min(10.0, given.seconds), given.deadline, alone)
    found: dict[str, Any] = {
        "start_s": start_s,
        "clients": calm.figures(given.seconds),
        "one_client": alone.figures(min(10.0, given.seconds)),
    }
    print(json.dumps(found, indent=2), flush=True)
    found["overloaded"] = await overloaded(client, given)
    found["killed"] = await disturbed(client, signal.SIGKILL, given)
    found["hung"] = await disturbed(client, signal.SIGSTOP, given)
    return found


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probe", type=Path, required=True, metavar="FOLDER", help="folder of the probe")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=64, help="conversations (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="of the scorer (default: torch's choice)")
    given = parser.parse_args()
    card = read_card(given.probe, "--probe")
    settings = ScorerSettings(
        probes={NAME: str(given.probe.resolve())}, queue=given.queue, threads=given.threads, ping_s=0.2,
        hung_after_s=HUNG_AFTER_S,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        client = ScorerClient(settings, Path(folder) / "scorer", os.environ)
        client.start()
        try:
            found = asyncio.run(measured(client, given))
        finally:
            client.close()
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "versions": versions("torch", "transformers"),
        "shape": {
            "model": Path(card.base.model).name, "layers": card.layers, "dtype": card.base.dtype,
            "clients": given.clients, "seconds": given.seconds, "deadline_s": given.deadline, "queue": given.queue,
            "threads": given.threads, "hung_after_s": HUNG_AFTER_S,
        },
        **found,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    path = RESULTS / f"scorer_latency_{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
