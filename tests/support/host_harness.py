"""A real server for tests: `llama stack run` on a free port, with its state in the test's folder."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.processes import ProcessName, is_alive
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.free_ports import free_port
from tests.support.jobs_support import TINY_CHILD

RUN_CONFIGS = Path(__file__).parents[2] / "run_configs"
TEMPLATES = RUN_CONFIGS.parent / "job_templates"
QUICKSTART = RUN_CONFIGS / "quickstart.yaml"
API = "/v1alpha/post-training"
# The models of the tests' jobs and of the templates.
HUB_MODELS = {
    "owner/name", "plan/completes", "plan/fails", "plan/talks", "plan/goes-on",
    *(json.loads(path.read_text(encoding="utf-8")).get(name, "owner/name")
      for path in TEMPLATES.glob("*.json") for name in ("model", "teacher")),
}  # fmt: skip
STOP_LIMIT_S = 120.0
START_LIMIT_S = 600.0  # the imports take some 9 CPU-seconds, on a core that others may use too


def hub_cache(folder: Path, *models: str) -> Path:
    """A hub cache that contains these models, as huggingface_hub would leave it."""
    for model in models:
        cached = folder / f"models--{model.replace('/', '--')}"
        snapshot = cached / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text("a" * 40)
        (snapshot / "config.json").write_text("{}")
    return folder


@dataclass
class Server:
    """A running server.

    Attributes:
        url: without a path.
        state_dir: the value of MOE_STATE_DIR.
        process: `llama stack run`.
        log: its standard output and error.
        healthy_s: seconds from start to the first healthy answer.
    """

    url: str
    state_dir: Path
    process: subprocess.Popen[bytes]
    log: Path
    healthy_s: float

    def http(self, timeout_s: float = 60.0, token: str | None = None) -> httpx.Client:
        """A client whose paths start after the post-training prefix; `token` identifies the user."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url + API, timeout=timeout_s, headers=headers)

    def client(self) -> Any:
        """llama-stack-client without retries, because a test needs the first answer."""
        from llama_stack_client import LlamaStackClient

        return LlamaStackClient(base_url=self.url, max_retries=0)

    def register(self, dataset_id: str, rows: list[dict[str, Any]]) -> str:
        """Register `rows` with the host as a user would."""
        source = {"type": "rows", "rows": rows}
        with warnings.catch_warnings():
            # llama-stack-client 0.6.1 marks this call as deprecated, but has no other.
            warnings.filterwarnings("ignore", "deprecated", DeprecationWarning)
            self.client().beta.datasets.register(dataset_id=dataset_id, purpose="post-training/messages", source=source)
        return dataset_id

    def config(self) -> ProviderConfig:
        """The provider's config for the state folder, to read the store or the jobs."""
        return ProviderConfig(state_dir=self.state_dir)


def tiny_interpreter(folder: Path) -> str:
    """A `training_python` whose jobs take 2 steps, or 2,000 slow ones if their id starts with `slow`."""
    script = folder / "python"
    script.write_text(
        f"""#!/bin/sh
        case "$3" in */slow*) steps=2000 ;; *) steps=2 ;; esac
        echo "{{\\"steps\\": $steps, \\"step_s\\": 0.02}}" > "$3/child.json"
        exec "{sys.executable}" -S "{TINY_CHILD}" "$3"
        """
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with `changes` merged into it at every depth."""
    result = dict(tree)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def run_config(
    path: Path, folder: Path, provider: dict[str, Any] | None = None, stack: dict[str, Any] | None = None
) -> Path:
    """A copy in `folder` of the run YAML at `path`, with changes to this provider's `config:` and to the whole."""
    given = provider or {}
    if "training_python" in given or not given.get("supervisor", {}).get("start", True):
        # Tiny children load no model, so the server's cache contains every name that the tests use.
        cache = hub_cache(folder / "hub", *HUB_MODELS)
        provider = merged({"child_env": {"HF_HUB_CACHE": str(cache)}}, given)
    content = merged(yaml.safe_load(path.read_text(encoding="utf-8")), stack or {})
    ours = content["providers"]["post_training"][0]
    ours["config"] = merged(ours["config"], provider or {})
    changed = folder / path.name
    changed.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return changed


@contextlib.contextmanager
def serving(
    config: Path,
    state_dir: Path,
    health: str = API + "/health",
    env: dict[str, str] | None = None,
    command: Sequence[str | Path] = (Path(sys.executable).parent / "llama", "stack", "run"),
    cwd: Path | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """`llama stack run` of `config` until the block ends; no job, supervisor or server is left then.

    Args:
        config: a run YAML.
        state_dir: its MOE_STATE_DIR, created if needed. The server's output goes there too.
        health: the path that answers 200 when the server is ready.
        env: added to this process's environment.
        command: starts a host; the run YAML and the port follow.
        cwd: where it is started; None: here.
        port: of the server; None: a free one.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    log, port, began = state_dir / "server.log", port or free_port(), time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, str(config), "--port", str(port)], cwd=cwd,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **(env or {}), "MOE_STATE_DIR": str(state_dir)},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url + health, process, log)
        yield Server(url, state_dir, process, log, time.monotonic() - began)
    finally:
        _stop(process)
        stop_jobs(ProviderConfig(state_dir=state_dir))


def stop_jobs(config: ProviderConfig) -> None:
    """Cancel every job of a store, and end the supervisor that a test's server started, which outlives the server."""
    if not (config.state_dir / "jobs.db").exists():
        return
    store = JobStore(config.url)
    try:
        for job in store.list(None):
            if not job.state.ended:
                store.request_cancel(job.id, None)
        _until(lambda: not store.running() or store.live_supervisor() is None)
        for job in store.running():
            if job.pid is not None and job.pid_birth is not None and is_alive(job.pid, job.pid_birth):
                os.killpg(job.pid, signal.SIGKILL)
        holder = store.live_supervisor()
        name = None if holder is None else ProcessName.parse(holder.id)
        if name is not None and not name.has_ended():
            os.kill(name.pid, signal.SIGTERM)
            _until(name.has_ended)
            assert name.has_ended(), f"supervisor {name.pid} does not leave"
    finally:
        store.close()


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STOP_LIMIT_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    with httpx.Client(timeout=30) as client:  # one: to make another for each look costs more than the look
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(0.25)
    raise AssertionError(f"no server ({process.poll()}):\n{log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
