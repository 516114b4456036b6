"""A Ray cluster for a test: a head with two processors and nodes with one, on this machine, on free ports.

`ray stop` would end every cluster of the user. This module marks its processes in their environment and ends only them.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx

from llama_stack_provider_moe.control.supervisor.processes import with_environment
from tests.support.free_ports import free_ports

MARK = "MOE_TEST_CLUSTER"
START_LIMIT_S = 300.0


class Cluster:
    """A head with its dashboard, and other nodes."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moe-ray-", dir="/tmp"))  # its sockets' paths may have 107 bytes
        # All ports are given: a node waits at most 15 s for an agent that chooses its port, and then dies.
        self._ports = iter(free_ports(20))
        self._head, self._dashboard, self._client = (next(self._ports) for _ in range(3))
        self.token_file = self._folder / "token"  # it checks the caller
        self.token_file.write_text(secrets.token_hex(32))
        self.url = f"http://127.0.0.1:{self._dashboard}"

    def start(self, nodes: int = 1) -> None:
        """Start the cluster with `nodes` nodes, and wait until it answers."""
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
            # On a machine with busy processors its parts need longer to start than Ray waits by default.
            "RAY_raylet_start_wait_time_s": "240",
            "RAY_agent_register_timeout_ms": "240000",
            "RAY_worker_register_timeout_seconds": "240",
            "RAY_worker_niceness": "0",  # by default its processes have a lower priority than other tests
            "RAY_enable_worker_prestart": "0",  # unused processes, one for each processor, that take seconds each
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [str(Path(sys.executable).with_name("ray")), "start", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def kill(self) -> None:
        """Kill processes, as the failure of a machine would."""
        until = time.monotonic() + 60
        while pids := with_environment(MARK, str(self._folder)):
            assert time.monotonic() < until, f"they do not end: {pids}"
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def close(self) -> None:
        """End all processes of the cluster."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
