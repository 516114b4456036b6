"""One server with a real supervisor, which modules of tests share, also those in other processes of the same run.

A server, its supervisor and its forkserver cost some 45 s of processor time before the first job. A module whose tests
leave the server as it is takes this one; its names of jobs, models and data sets must be its own, or mean the same.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.supervisor.processes import birth
from tests.support import tiny_models
from tests.support.chat_server import MODEL
from tests.support.free_ports import free_port
from tests.support.host_harness import QUICKSTART, Server, run_config, serving

PROVIDER = {
    "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    "supervisor": {"max_concurrent_jobs": 2, "poll_s": 0.5, "max_attempts": 9},
}
JUDGE = "judge"  # a name that graders may ask; the module that does serves it at `Shared.judge_port`


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process of the run is in such a block at the same time."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Shared:
    """The server, as a module of tests uses it."""

    def __init__(self, folder: Path, server: Server, judge_port: int) -> None:
        self._folder = folder
        self.server = server
        self.judge_port = judge_port

    def once(self, name: str, make: Callable[[], Any]) -> None:
        """Call `make` unless a module, here or in another process, has made what has this name."""
        done = self.server.state_dir / f"made-{name}"
        with alone(self._folder):
            if not done.exists():
                make()
                done.touch()

    def model(self, family: str, build: Callable[[str, Path], Any] = tiny_models.build) -> None:
        """A tiny model in the models' folder, by its family's name."""
        self.once(f"model-{family}", lambda: build(family, self.server.state_dir / "models" / family))

    def rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """A data set of the host."""
        self.once(f"rows-{name}", lambda: self.server.register(name, rows))


class Owner:
    """What this process does for the server: nothing, if another one has started it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told, self.users = folder / "server.json", folder / "users"
        self.users.mkdir(parents=True, exist_ok=True)
        self._running = ExitStack()
        self._started = False

    def server(self) -> Server:
        """The server of this run, started if nobody has; call it alone."""
        if self.told.exists():
            about = json.loads(self.told.read_text())
            process: Any = None  # another process's child
            return Server(about["url"], Path(about["state_dir"]), process, Path(about["log"]), 0.0)
        folder = self.folder / f"of-{os.getpid()}"
        folder.mkdir()
        port = free_port()
        judge = {"url": f"http://127.0.0.1:{port}/v1/chat/completions", "model": MODEL}
        provider = {**PROVIDER, "graders": {"judges": {JUDGE: judge}}}
        server = self._running.enter_context(serving(run_config(QUICKSTART, folder, provider), folder / "state"))
        about = {"url": server.url, "state_dir": str(server.state_dir), "log": str(server.log), "judge_port": port}
        self.told.write_text(json.dumps(about))
        self._started = True
        return server

    def close(self) -> None:
        """Stop the server if this process has started it, once no module uses it."""
        while self._started:
            with alone(self.folder):
                if not any(birth(int(user.name)) for user in self.users.iterdir()):
                    self.told.unlink()
                    self._started = False
            time.sleep(0.2)
        self._running.close()


@pytest.fixture(scope="session")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    """Of this process; processes of one run have one folder."""
    own = tmp_path_factory.getbasetemp()
    owner = Owner((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared-server")
    try:
        yield owner
    finally:
        owner.close()


@pytest.fixture(scope="module")
def shared(owner: Owner) -> Iterator[Shared]:
    """The server, which stays while the module uses it."""
    user = owner.users / str(os.getpid())
    with alone(owner.folder):
        server = owner.server()
        judge_port = int(json.loads(owner.told.read_text())["judge_port"])
        user.touch()
    try:
        yield Shared(owner.folder, server, judge_port)
    finally:
        user.unlink()
