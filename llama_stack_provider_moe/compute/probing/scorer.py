"""The scorer process: loads the models of its probes up to the highest layer they read, and scores what a server sends.

$ python -m llama_stack_provider_moe.compute.probing.scorer

Settings come as one line of standard input (`shields.scorer_wire.Start`); the process ends when that input ends, so it
does not outlive its server. One thread reads and writes the socket, another scores. A ping is answered by the one that
scores, so a process that hangs does not answer. An error that is no refusal ends the process, which is then replaced.
"""

import asyncio
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from transformers.utils import logging

from llama_stack_provider_moe.compute.probing.scorer_queue import Work, WorkQueue, score_for_ever
from llama_stack_provider_moe.compute.probing.scoring import ReadProbe, load_probes
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.private import take_umask
from llama_stack_provider_moe.shields.scorer_wire import (
    LENGTH_BYTES,
    Answer,
    Request,
    Start,
    WireError,
    frame,
    length_of,
    read_as,
    socket_in,
)

_BACKLOG = 1024
_MODE = 0o600


def main() -> int:
    """Run until standard input ends; returns 1 if no probe can be used."""
    take_umask(os.environ)
    logging.disable_progress_bar()
    start = read_as(Start, sys.stdin.buffer.readline())
    threading.excepthook = _end
    threading.Thread(target=_until_input_ends, daemon=True).start()
    if start.settings.threads is not None:
        torch.set_num_threads(start.settings.threads)
    began_s = time.monotonic()
    read, refused = list[ReadProbe](), dict[str, str]()
    for name, folder in start.settings.probes.items():
        try:
            read.append(ReadProbe.at(name, Path(folder)))
        except InvalidInput as error:
            refused[name] = str(error)
    probes, others = load_probes(read)
    refused |= others
    for name, why in refused.items():
        print(f"scorer: probe {name!r} is refused: {why}", flush=True)
    for name, probe in probes.items():
        print(f"scorer: probe {name!r}: block {probe.card.layers} of {probe.card.base.model}", flush=True)
    if not probes:
        return 1
    print(f"scorer: ready after {time.monotonic() - began_s:.1f} s", flush=True)
    queue = WorkQueue(start.settings.queue)
    batch_size = start.settings.batch_size
    threading.Thread(target=score_for_ever, args=(queue, probes, refused, batch_size), daemon=True).start()
    asyncio.run(_serve(Path(start.folder), queue))
    return 0


async def _serve(folder: Path, queue: WorkQueue) -> None:
    with socket_in(folder) as path:
        before = os.umask(0o777 & ~_MODE)
        try:
            server = await asyncio.start_unix_server(partial(_talk, queue), path, backlog=_BACKLOG)
        finally:
            os.umask(before)
        async with server:
            await server.serve_forever()


async def _talk(queue: WorkQueue, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        answer = await _answered(queue, reader)
        if answer is not None:
            writer.write(frame(answer))
            await writer.drain()
    except (WireError, asyncio.IncompleteReadError) as error:
        print(f"scorer: a request that can't be read: {error}", flush=True)
    except ConnectionError:
        return  # the server no longer waits
    finally:
        writer.close()


async def _answered(queue: WorkQueue, reader: asyncio.StreamReader) -> Answer | None:
    """The answer to a connection's request; None if the server closed it first."""
    length = length_of(await reader.readexactly(LENGTH_BYTES))
    request = read_as(Request, await reader.readexactly(length))
    loop = asyncio.get_running_loop()
    found: asyncio.Future[Answer] = loop.create_future()

    def answer(given: Answer) -> None:
        loop.call_soon_threadsafe(lambda: None if found.done() else found.set_result(given))

    work = Work(request.score, answer)
    if request.score is not None:
        work.deadline_s = time.monotonic() + request.score.deadline_s
    if not queue.put(work):
        return Answer(failed="overloaded", message=f"{queue.waiting} conversations wait already")
    gone = asyncio.create_task(reader.read(1))
    gone.add_done_callback(lambda _: found.cancel())
    try:
        return await found
    except asyncio.CancelledError:
        work.is_wanted = False
        return None
    finally:
        gone.cancel()


def _until_input_ends() -> None:
    while sys.stdin.buffer.read(1 << 12):
        pass
    os._exit(0)


def _end(args: threading.ExceptHookArgs) -> None:
    """A thread failed: without it nothing would be answered, so the process ends and is replaced."""
    traceback: TracebackType | None = args.exc_traceback
    sys.excepthook(args.exc_type, args.exc_value or args.exc_type(), traceback)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
