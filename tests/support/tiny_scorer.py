"""A scorer process without models, for tests of the server's side: the probe's name says what becomes of a request.

fine: the share of a conversation's last message that is capital letters; stuck: no answer, ever; silent: no answer, and
none to checks from then on; dies: the process ends; wrong: an answer that is none; short: too few scores.

With the environment variable TINY_SCORER_ENDS it ends at once.
"""

import asyncio
import os
import sys
import threading
from pathlib import Path

from llama_stack_provider_moe.shields.scorer_wire import (
    LENGTH_BYTES,
    Answer,
    Request,
    Start,
    frame,
    length_of,
    read_as,
    socket_in,
)

silent = threading.Event()


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    request = read_as(Request, await reader.readexactly(length_of(await reader.readexactly(LENGTH_BYTES))))
    if request.score is None:
        answer = Answer(probes=["fine"], refused={"bad": "it is bad"})
    else:
        probe, texts = request.score.probe, [each[-1]["content"] for each in request.score.conversations]
        shares = [sum(sign.isupper() for sign in text) / max(1, len(text)) for text in texts]
        answer = Answer(scores=[(share, 0.5, 3) for share in shares])
        if probe == "silent":
            silent.set()
        if probe == "stuck":
            await asyncio.sleep(3600)
        if probe == "dies":
            os._exit(3)
        if probe == "short":
            answer = Answer(scores=[])
        if probe == "wrong":
            writer.write(b"\0\0\0\2no")
            writer.close()
            return
    if silent.is_set():
        await asyncio.sleep(3600)
    writer.write(frame(answer))
    await writer.drain()
    writer.close()


async def serve(folder: Path) -> None:
    with socket_in(folder) as path:
        server = await asyncio.start_unix_server(talk, path)
        async with server:
            await server.serve_forever()


def until_input_ends() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    start = read_as(Start, sys.stdin.buffer.readline())
    if "TINY_SCORER_ENDS" in os.environ:
        sys.exit("it ends at once, as asked")
    threading.Thread(target=until_input_ends, daemon=True).start()
    asyncio.run(serve(Path(start.folder)))
