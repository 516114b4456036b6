"""A Llama Stack server with our provider, for as long as a demo needs it."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml
from demo_screen import DemoFailed, console, say, title

from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.follow import Follower
from llama_stack_provider_moe.control.cli.hosts import HOSTS, HostName
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import ServerLost, ServerRefused
from llama_stack_provider_moe.spec.server_config import ProviderConfig

if TYPE_CHECKING:
    from llama_stack_client import LlamaStackClient

ROOT = Path(__file__).resolve().parent.parent
# How long to wait for a server that does not answer: on a busy machine it may get no CPU time for minutes.
PATIENCE_S = 900.0


class Stack(NamedTuple):
    """The running server.

    Attributes:
        server: our client, which `moe-train` uses.
        client: Llama Stack's own client.
        submitted: names of the jobs that the demo has created.
        url: its address.
        process: the server's process.
        uploads_files: whether rows go to the host as files, because OGX has no data sets.
    """

    server: Client
    client: "LlamaStackClient"
    submitted: list[str]
    url: str
    process: "subprocess.Popen[bytes]"
    uploads_files: bool = False


@contextlib.contextmanager
def serving(state: Path, host: HostName = HostName.LLAMA_STACK_0_6, programs: Path | None = None) -> Iterator[Stack]:
    """Run a server; at the end of the block, stop it and everything that it has started.

    Args:
        state: state folder of the server.
        host: what the server runs on.
        programs: the `bin` folder of the host's environment; None: of this one.
    """
    title(f"2. Start a server on {HOSTS[host].title}")
    port, began = _free_port(), time.monotonic()
    state.mkdir(parents=True, exist_ok=True)
    log, url = state / "server.log", f"http://127.0.0.1:{port}"
    config = run_config(state, host)
    program, *words = HOSTS[host].command.format(file=config).replace("8321", str(port)).split()
    say(f"$ {program} {' '.join(words)}")
    # Later hosts refuse a client of another version; the API of ours is the same.
    environment = {**os.environ, "MOE_STATE_DIR": str(state), "LLAMA_STACK_DISABLE_VERSION_CHECK": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str((programs or Path(sys.executable).parent) / program), *words], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    from llama_stack_client import APIError, LlamaStackClient  # takes seconds to import; meanwhile the server starts

    logging.getLogger("httpx").setLevel(logging.WARNING)  # its line per request would hide the progress bar
    with Client(url) as server:
        client = LlamaStackClient(base_url=url, max_retries=0, timeout=PATIENCE_S)
        stack = Stack(server, client, [], url, process, uploads_files=HOSTS[host].is_external)
        try:
            with console.status("The server starts"):
                _wait_until_healthy(stack, process, log)
            say(f"The server was ready after {time.monotonic() - began:.0f} s. It writes its log to {log}")
            yield stack
        except APIError as error:
            raise DemoFailed(f"the server refused a request: {error.message}") from error
        finally:
            _stop(stack, process, state)


def page_of(stack: Stack, job: str) -> str:
    """Return the address of a job's page on the dashboard."""
    return f"{stack.url}/moe/jobs/{job}"


def stay(stack: Stack) -> None:
    """Wait until the user presses Ctrl-C, or the server ends."""
    say("The server stays up until you press Ctrl-C.")
    with contextlib.suppress(KeyboardInterrupt):
        code = stack.process.wait()
        raise DemoFailed(f"the server ended with exit code {code}")
    say("\nThe server is stopped.")


def run_config(state: Path, host: HostName) -> Path:
    """Return the run YAML of a host. One whose environment has no torch trains with this Python."""
    packaged = Path("run_configs") / f"{HOSTS[host].server}.yaml"
    if not HOSTS[host].is_external:
        return packaged
    content = yaml.safe_load((ROOT / packaged).read_text(encoding="utf-8"))
    content["providers"]["post_training"][0]["config"]["training_python"] = sys.executable
    changed = state / packaged.name
    changed.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return changed


def patiently[Answer](ask: Callable[[], Answer]) -> Answer:
    """Ask the server; if it does not answer, repeat the question for `PATIENCE_S`."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except ServerLost:
            if time.monotonic() >= until:
                raise
            time.sleep(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(stack: Stack, process: subprocess.Popen[bytes], log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(ServerLost):
            stack.server.health()
            return
        time.sleep(0.2)
    raise DemoFailed(f"the server ended with exit code {process.returncode}; the end of {log}:\n"
                     f"{log.read_text()[-1500:]}")  # fmt: skip


def _stop(stack: Stack, process: subprocess.Popen[bytes], state: Path) -> None:
    """Cancel jobs that still run, then end the supervisor and the server."""
    for job in stack.submitted:
        with contextlib.suppress(ServerLost, ServerRefused):  # the server refuses if the job has ended
            stack.server.cancel(job)
            for _ in Follower(stack.server, job, note=say, patience_s=10).statuses():
                pass
    store = JobStore(ProviderConfig(state_dir=state).url)
    supervisor = store.live_supervisor()
    if supervisor is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor.pid, signal.SIGTERM)
        _wait_for(lambda: store.live_supervisor() is None, 20)
    store.close()
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(met: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not met() and time.monotonic() < deadline:
        time.sleep(0.3)
