"""A Ray cluster of a test's own: a head of two processors and nodes of one, on this machine, on ports that are free.

`ray stop` would end every cluster of the user; what was started here is known by its environment, and alone ended.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx

from llama_stack_provider_moe.jobs.processes import with_environment

MARK = "MOE_TEST_CLUSTER"
START_LIMIT_S = 300.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at; below those that the system gives out itself, so that they stay free."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with suppress(OSError), socket.create_server(("", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no ports are free")


class Cluster:
    """A head with its dashboard, and more nodes."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moe-ray-", dir="/tmp"))  # its sockets' paths may have 107 bytes
        # All are named: a node whose agent may choose waits 15 s for it at most, and then dies.
        self._ports = iter(free_ports(20))
        self._head, self._dashboard, self._client = (next(self._ports) for _ in range(3))
        self.token_file = self._folder / "token"  # it asks who calls
        self.token_file.write_text(secrets.token_hex(32))
        self.url = f"http://127.0.0.1:{self._dashboard}"

    def start(self, nodes: int = 1) -> None:
        """Have it answer, with `nodes` nodes."""
        common = [
            "--object-store-memory", "80000000", "--num-gpus", "0", "--min-worker-port", "0", "--max-worker-port", "0",
            "--disable-usage-stats",
        ]  # fmt: skip
        self._ray(
            "--head", "--port", str(self._head), "--dashboard-port", str(self._dashboard), "--dashboard-host",
            "127.0.0.1", "--ray-client-server-port", str(self._client), "--temp-dir", str(self._folder),
            "--num-cpus", "2", *common, *self._agents(),
        )  # fmt: skip
        for _ in range(1, nodes):
            self._ray("--address", f"127.0.0.1:{self._head}", "--num-cpus", "1", *common, *self._agents())
        until = time.monotonic() + START_LIMIT_S
        while not self._answers():
            assert time.monotonic() < until, "the dashboard does not answer"
            time.sleep(0.2)

    def _agents(self) -> list[str]:
        """Ports of one node's agents."""
        names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        return [word for name in names for word in (f"--{name}-port", str(next(self._ports)))]

    def _answers(self) -> bool:
        with suppress(httpx.HTTPError):
            headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}
            answer = httpx.get(f"{self.url}/api/version", headers=headers, timeout=5, trust_env=False)
            return answer.status_code == httpx.codes.OK
        return False

    def _ray(self, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONDONT"))}
        environment |= {
            MARK: str(self._folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            # On a machine whose processors are taken its parts take longer to begin than it has patience for.
            "RAY_raylet_start_wait_time_s": "240",
            "RAY_agent_register_timeout_ms": "240000",
            "RAY_worker_register_timeout_seconds": "240",
            "RAY_worker_niceness": "0",  # by default its processes stand behind every other test's
            "RAY_enable_worker_prestart": "0",  # a process for each processor, of seconds each, that nobody uses
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [str(Path(sys.executable).with_name("ray")), "start", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def kill(self) -> None:
        """As the machines' end does; nobody is asked."""
        until = time.monotonic() + 60
        while pids := with_environment(MARK, str(self._folder)):
            assert time.monotonic() < until, f"they do not end: {pids}"
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def close(self) -> None:
        """Leave nothing."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
