"""A process that renders samples of rows with models' chat templates, for a server that checks a job's rows.

`control.server.template_check` starts it. The two sides exchange lines of JSON:

    process: {"ready": true}                            everything is imported
    process: {"unavailable": reason}                    an import failed; the process ends
    server:  {"model": folder, "name": ..., "chat_template": ..., "rendering": {...}, "limit_s": ...,
              "parts": {part: {"kind": ..., "rows": [[number, canonical row], ...]}}}
    process: {"problems": [[part, number, field, reason], ...]}
    process: {"refused": reason}                        no conversation can be rendered; reason follows the model's name
    process: {"unavailable": reason}                    the rows could not be checked

A chat template is a program from elsewhere. It runs in Jinja's sandbox, which does not end endless loops, so a timer
ends this process. The process also ends with its server, even in the middle of a loop, and once nobody asks any more.
"""

import json
import os
import queue
import resource
import signal
import sys
import threading
from typing import BinaryIO, NoReturn

IDLE_S = 600.0
MEMORY_BYTES = 4 << 30  # of its data; several large tokenizers fit

Answer = dict[str, object]


def main() -> NoReturn:
    """Answer requests on standard input until it closes, or until nobody asks any more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not spoil an answer
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, requests), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        code = _serve(requests, answers)
    except OSError:  # nobody reads the answers
        code = 1
    os._exit(code)  # Python's own end would wait for the thread that reads


def _serve(requests: "queue.SimpleQueue[bytes]", answers: BinaryIO) -> int:
    # A name that is None here can't be imported, and `find_spec` does not find it. So transformers, TRL and datasets
    # work as in an environment without torch: rendering does not need it, and importing it takes seconds and 600 MB.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        # Imported only here, because these import transformers.
        from llama_stack_provider_moe.compute.data.sample_rendering import SampleRendering

        renders = SampleRendering()
    except Exception as error:  # noqa: BLE001  # whatever an environment lacks, the server reports it
        _write(answers, {"unavailable": f"{type(error).__name__}: {error}"[:300]})
        return 1
    _write(answers, {"ready": True})
    while True:
        try:
            request = json.loads(requests.get(timeout=IDLE_S))
        except queue.Empty:
            return 0
        signal.setitimer(signal.ITIMER_REAL, float(request["limit_s"]))  # the default action ends the process
        answer = renders.answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, answer)


def _read(requests: BinaryIO, into: "queue.SimpleQueue[bytes]") -> None:
    for line in requests:
        into.put(line)
    os._exit(0)  # the server closed the pipe, or has ended


def _write(answers: BinaryIO, answer: Answer) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
