"""Serves a GGUF file with llama.cpp's server, and chats with it through Llama Stack's inference API.

    $ python examples/serve_gguf.py granite-q8_0.gguf --ask "How long should I boil an egg for a soft yolk?"

llama.cpp's server is `llama-server` if it is on the PATH (or --llama-server names it), else the server in the package
`xllamacpp` (the extra `serve`). Llama Stack runs run_configs/serve_llama_cpp.yaml. Both listen on 127.0.0.1 on free
ports, and end with this program; with --stay, they run until Ctrl-C.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
MODEL = "served"
READY_WITHIN_S = 300.0
# The server of xllamacpp gets a separate process, because llama.cpp may abort the process.
_NATIVE = """
import signal, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.model_alias = sys.argv[1], {sys.argv[5]}
parameters.hostnames, parameters.port = ["127.0.0.1"], int(sys.argv[2])
parameters.n_ctx, parameters.cpuparams.n_threads, parameters.n_parallel = int(sys.argv[3]), int(sys.argv[4]), 1
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
"""


class ServingFailed(Exception):
    """A server did not start, or gave no usable answer; the text says which."""


def main() -> int:
    """Serve, ask and print; the exit code is 0 if there was an answer."""
    parser = argparse.ArgumentParser(
        description="Chat with a GGUF file through Llama Stack.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("gguf", type=Path, help="GGUF file to serve")
    parser.add_argument("--ask", default="What is the capital of France?", help="question to ask")
    parser.add_argument("--max-tokens", type=int, default=64, help="largest number of tokens in the answer")
    parser.add_argument("--context", type=int, default=2048, help="largest number of tokens in a conversation")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="number of threads of llama.cpp")
    parser.add_argument(
        "--llama-server", type=Path, help="program of llama.cpp's server; None: from the PATH, else xllamacpp"
    )
    parser.add_argument("--stay", action="store_true", help="keep serving until Ctrl-C")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that every `finally` runs
    try:
        with (
            tempfile.TemporaryDirectory(prefix="moe-serving-") as state,
            llama_cpp(given.gguf, Path(state), given.context, given.threads, given.llama_server) as native,
            llama_stack(native, Path(state)) as stack,
        ):
            print(f"llama.cpp's server: {native}\nLlama Stack: {stack}, model llama-cpp/{MODEL}")
            print(f"> {given.ask}\n{chat(stack, given.ask, given.max_tokens)}", flush=True)
            if given.stay:
                signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except ServingFailed as failure:
        print(f"serve_gguf: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@contextlib.contextmanager
def llama_cpp(
    gguf: Path, state: Path, context: int, threads: int, program: Path | None = None, alias: str = MODEL
) -> Iterator[str]:
    """Run llama.cpp's server with a model; yield its address.

    Args:
        gguf: file of the model.
        state: folder for the log.
        context: largest number of tokens in a conversation.
        threads: number of threads.
        program: program of the server; default: `llama-server` from the PATH, else xllamacpp.
        alias: name of the model on the server.
    """
    if not gguf.is_file():
        raise ServingFailed(f"there is no file {gguf}")
    port = free_port()
    found = str(program) if program is not None else shutil.which("llama-server")
    if found is not None:
        command = [
            found, "-m", str(gguf), "--alias", alias, "--host", "127.0.0.1", "--port", str(port),
            "-c", str(context), "-t", str(threads), "--jinja",
        ]  # fmt: skip
    elif importlib.util.find_spec("xllamacpp") is not None:
        command = [sys.executable, "-c", _NATIVE, str(gguf), str(port), str(context), str(threads), alias]
    else:
        raise ServingFailed(
            "llama-server is not on the PATH, and xllamacpp is not installed in this environment; "
            "pip install 'llama-stack-provider-moe[serve]'"
        )
    url = f"http://127.0.0.1:{port}"
    what, log = f"llama.cpp's server for {alias}", state / f"llama_cpp.{alias}.log"
    with running(what, command, log, {}):
        yield wait_for(what, url, "/health", log)


@contextlib.contextmanager
def llama_stack(native: str, state: Path) -> Iterator[str]:
    """Run a Llama Stack server that uses llama.cpp's server at `native` for inference; yield its address."""
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "llama"),
        "stack",
        "run",
        str(ROOT / "run_configs/serve_llama_cpp.yaml"),
    ]
    environment = {"LLAMA_CPP_URL": f"{native}/v1", "LLAMA_CPP_MODEL": MODEL, "MOE_STATE_DIR": str(state)}
    log = state / "llama_stack.log"
    with running("Llama Stack", [*command, "--port", str(port)], log, environment):
        yield wait_for("Llama Stack", f"http://127.0.0.1:{port}", "/v1/health", log)


def chat(stack: str, question: str, max_tokens: int) -> str:
    """Return the greedy answer to a question, through Llama Stack."""
    from llama_stack_client import LlamaStackClient  # takes seconds to import

    client = LlamaStackClient(base_url=stack, max_retries=0, timeout=READY_WITHIN_S)
    answer = client.chat.completions.create(
        model=f"llama-cpp/{MODEL}", messages=[{"role": "user", "content": question}], temperature=0.0,
        max_tokens=max_tokens,
    )  # fmt: skip
    content = answer.choices[0].message.content
    if not isinstance(content, str) or not content.strip():
        raise ServingFailed(f"the answer has no text: {answer}")
    return content.strip()


@contextlib.contextmanager
def running(what: str, command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a process in its own process group; end the whole group at the end of the block.

    Args:
        what: name of the process, for errors.
        command: command line.
        log: file for its output.
        environment: variables to add to this environment.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
    _LIVE[what] = process.poll
    try:
        yield
    finally:
        del _LIVE[what]
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)


_LIVE: dict[str, Callable[[], int | None]] = {}


def wait_for(what: str, url: str, path: str, log: Path) -> str:
    """Wait until a server answers; return `url`.

    Args:
        what: name of the process in `running`.
        url: address of the server.
        path: path that answers when the server is ready.
        log: file with its output.
    """
    until = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until:
        code = _LIVE[what]()
        if code is not None:
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise ServingFailed(f"{what} ended with exit code {code}:\n{said}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url + path, timeout=5.0, trust_env=False).status_code == 200:
                return url
        time.sleep(0.2)
    raise ServingFailed(
        f"{what} was not ready within {READY_WITHIN_S:g} s; the end of its output:\n{log.read_text()[-2000:]}"
    )


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
