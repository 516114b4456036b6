"""A process that grades: reads tasks from a socket, answers each, and ends when the socket does. No torch.

    {"do": "regex", "with": {...}}        one line of JSON
    {"value": 1.0}                        one line of JSON
    {"failed": code, "message": ...}

$ python -m llama_stack_provider_moe.graders.child MEMORY_MB    standard input is the socket
"""

import json
import resource
import socket
import sys
from collections.abc import Sequence

from llama_stack_provider_moe.graders import bounded
from llama_stack_provider_moe.graders.samples import Failure

MOST_LINE = 16 << 20  # bytes: JSON may write a character with six


def main(argv: Sequence[str] | None = None) -> int:
    """Answer tasks until the socket ends."""
    (memory_mb,) = sys.argv[1:] if argv is None else argv
    limit = int(memory_mb) << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as connection, connection.makefile("rwb") as stream:
        while line := stream.readline(MOST_LINE):
            stream.write(json.dumps(answer(line)).encode() + b"\n")
            stream.flush()
    return 0


def answer(line: bytes) -> dict[str, object]:
    """Run the task in a line."""
    try:
        return {"value": bounded.run(json.loads(line))}
    except MemoryError:
        return _failed(Failure("memory", "it needed more memory than a grader may have"))
    except bounded.BadReference as error:
        return _failed(Failure("bad_reference", str(error)))
    except Exception as error:  # noqa: BLE001  # whatever a library raises for the texts of strangers; the row fails
        return _failed(Failure("raised", f"{type(error).__name__}: {str(error)[:200]}"))


def _failed(failure: Failure) -> dict[str, object]:
    return {"failed": failure.code, "message": failure.message}


if __name__ == "__main__":
    sys.exit(main())
