"""`RayExecutor`: jobs on an existing Ray cluster, through its Jobs API (HTTP; Ray itself is not imported).

Each attempt is one Ray job with a unique name, and the store knows that name before the cluster does. So a lost answer
can't cause a second run. The Ray job runs `compute.worker.ray.group`. Stop requests and the environment are passed in
`cluster.json` in the job's folder, which every node must see, so they arrive even if the cluster does not answer.
https://docs.ray.io/en/releases-2.60.0/cluster/running-applications/job-submission/rest.html
"""

import json
import logging
import os
import re
import secrets
import shlex
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from llama_stack_provider_moe.control.supervisor.executors import Child, Exit, Record
from llama_stack_provider_moe.control.supervisor.executors.local import child_environment, secrets_for_children
from llama_stack_provider_moe.jobdir.attempt import ATTEMPT_VARIABLE, JOB_VARIABLE
from llama_stack_provider_moe.jobdir.cluster_run import RUN_FILE, ClusterRun, Wish, read_run
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.engines_config import ENGINES_VARIABLE
from llama_stack_provider_moe.spec.executors_config import RayConfig
from llama_stack_provider_moe.spec.graders_config import JUDGES_VARIABLE
from llama_stack_provider_moe.spec.server_config import (
    MIRROR_VARIABLE,
    SECRETS_VARIABLE,
    TRUST_VARIABLE,
    ProviderConfig,
)
from llama_stack_provider_moe.spec.serving_config import SERVING_VARIABLE

# A request must end between two renewals of the supervisor's lease.
TIMEOUT = httpx.Timeout(5.0, connect=3.0)
# Time between two checks of one run, and between two tries of a cluster that does not answer.
LOOK_S = 1.0
RETRY_S = 5.0
_MESSAGE_LIMIT = 500  # characters of a message of Ray
_LOG_LIMIT = 20_000  # characters of the driver's output that Ray kept
# Environment variables that are only valid on this machine; each node has its own.
_BOUND_TO_A_MACHINE = frozenset({
    "PATH", "HOME", "TMPDIR", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH", "CC", "CXX", "XDG_CACHE_HOME", "LLAMA_CPP_DIR", "MOE_TRAIN_CACHE",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
})  # fmt: skip
# Errors that would happen again, because Ray could not even start the job.
_NEVER_BEGINS = frozenset({"RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR"})

# Lines that Ray itself writes into every driver's output.
_RAY_LINES = re.compile(r"Runtime env is setting up|^Running entrypoint for job ")

log = logging.getLogger("llama_stack_provider_moe.supervisor")

type Answer = dict[str, Any]  # a JSON object from Ray


class NoAnswer(Exception):
    """The cluster can't be reached now."""


class RayExecutor:
    """Runs jobs on one Ray cluster.

    Args:
        config: The provider's configuration; processes get its `child_env` on every node.
        ray: The cluster's settings.
        transport: Transport for the requests; by default the network.
    """

    def __init__(self, config: ProviderConfig, ray: RayConfig, transport: httpx.BaseTransport | None = None) -> None:
        self._config = config
        self._ray = ray
        self._http = httpx.Client(
            base_url=ray.address,
            timeout=TIMEOUT,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),  # no connection stays open, so nobody must close it
            transport=transport,
        )
        self._silent_since: float | None = None  # time.monotonic() of the first try without an answer
        self._why = ""  # why the last try had no answer
        self._ask_at = 0.0  # time.monotonic() of the next try if the cluster does not answer
        self._waits_since: dict[Path, float] = {}  # jobs that could not be submitted yet
        self._look_at: dict[Child, float] = {}
        self._stop_at: dict[Child, float] = {}
        self._pending: set[Child] = set()  # runs that Ray has not started yet
        self._unsent: dict[Child, Mapping[str, object]] = {}  # in the store, but perhaps not known to the cluster

    def submit(self, folder: Path, record: Record, devices: str | None, attempt: str) -> bool:
        """See `Executor`. `devices` are this machine's devices, so the cluster ignores them.

        Returns False while the cluster does not answer, and raises OSError after `executors.ray.unreachable_s`.
        """
        first = folder not in self._waits_since
        waits_since = self._waits_since.setdefault(folder, time.monotonic())
        try:
            self._ask("GET", "/api/version", "ray_version")
        except NoAnswer as error:
            if first:
                with suppress(OSError), JobFolder(folder).output.open("a", encoding="utf-8") as output:
                    output.write(f"waits for up to {self._ray.unreachable_s:g} s: {error}\n")
            if time.monotonic() - waits_since < self._ray.unreachable_s:
                return False
            del self._waits_since[folder]
            raise OSError(f"{error} (for `executors.ray.unreachable_s`, {self._ray.unreachable_s:g} s)") from None
        del self._waits_since[folder]
        number = _starts_before(folder) + 1
        child = Child(folder, 0, 0.0, f"{folder.name[:80]}-{number}-{secrets.token_hex(4)}", attempt)
        # Written while the fence holds: later, it would end the run of a supervisor that has taken over meanwhile.
        record(child, lambda: self._new_run(child, number).write(folder))
        command = [
            self._ray.python or self._config.training_python,
            "-m",
            "llama_stack_provider_moe.compute.worker.ray.group",
        ]
        self._unsent[child] = {
            "submission_id": child.run,
            # Ray runs it in a shell. Without `exec`, the shell's exit code would hide the signal that ended the driver.
            "entrypoint": f"exec {shlex.join([*command, str(folder), str(child.run)])}",
            "runtime_env": {"env_vars": {JOB_VARIABLE: str(folder), ATTEMPT_VARIABLE: attempt}},
            "metadata": {"moe_job": folder.name},
        }
        with suppress(NoAnswer):  # `poll` sends it
            self._send(child)
        return True

    def _new_run(self, child: Child, number: int) -> ClusterRun:
        ours = child_environment(os.environ, self._config, child.folder, attempt=child.attempt)
        kept = (
            JOB_VARIABLE, ATTEMPT_VARIABLE, MIRROR_VARIABLE, SECRETS_VARIABLE, SERVING_VARIABLE, TRUST_VARIABLE,
            JUDGES_VARIABLE, ENGINES_VARIABLE,
        )  # fmt: skip
        decided = {name: ours[name] for name in kept}
        return ClusterRun(
            run=str(child.run),
            number=number,
            environment={name: value for name, value in ours.items() if name not in _BOUND_TO_A_MACHINE},
            overrides=self._config.child_env | secrets_for_children(os.environ, self._config) | decided,
            cpus_per_process=self._ray.cpus_per_process,
            placement_s=self._ray.placement_s,
        )

    def _send(self, child: Child) -> None:
        """Submit a run to the cluster. A second submission has no effect."""
        self._ask("POST", "/api/jobs/", "submission_id", self._unsent[child], else_=("already exists",))
        del self._unsent[child]

    def poll(self, child: Child) -> Exit | None:
        """See `Executor`. If the cluster does not answer, its jobs count as running for up to `unreachable_s`."""
        if time.monotonic() < self._look_at.get(child, 0.0):
            return None
        self._look_at[child] = time.monotonic() + LOOK_S
        try:
            if child in self._unsent:
                self._send(child)
            known = self._ask("GET", f"/api/jobs/{child.run}", "status", else_=("does not exist",))
        except NoAnswer as error:
            if self._silent_s() < self._ray.unreachable_s:
                return None
            return self._ended(child, Exit(None, message=f"{error} (`executors.ray.unreachable_s`)"))
        if known is None:
            message = f"the Ray cluster at {self._ray.address} does not know run {child.run}: its head was restarted"
            return self._ended(child, Exit(None, message=f"{message}, or the run never reached it"))
        if known["status"] in ("PENDING", "RUNNING"):
            (self._pending.add if known["status"] == "PENDING" else self._pending.discard)(child)
            return None
        if known["status"] != "SUCCEEDED":
            self._keep_output(child)
        return self._ended(child, _exit(known))

    def _ended(self, child: Child, end: Exit) -> Exit:
        self._wish(child, "kill")  # for processes left on nodes that the cluster has lost
        self._look_at.pop(child, None)
        self._stop_at.pop(child, None)
        self._unsent.pop(child, None)
        self._pending.discard(child)
        if end.message is not None:
            log.warning("run %s: %s", child.run, end.message)
        return end

    def stop(self, child: Child, number: int) -> None:
        """See `Executor`. The job's leaders on the nodes pass a gentle stop on; for a kill, Ray is asked too."""
        kill = number == signal.SIGKILL
        changed = self._wish(child, "kill" if kill else "stop")
        if self._unsent.pop(child, None) is not None or not (kill or child in self._pending):
            return
        if changed or time.monotonic() >= self._stop_at.get(child, 0.0):
            self._stop_at[child] = time.monotonic() + RETRY_S
            with suppress(NoAnswer):
                self._ask("POST", f"/api/jobs/{child.run}/stop", "stopped", else_=("does not exist",))

    def _wish(self, child: Child, wish: Wish) -> bool:
        """Write a request to `cluster.json`; return False if it is there already, or this run does not count."""
        try:
            now = read_run(child.folder)
        except ValueError as error:
            log.warning("%s is damaged: %s", child.folder / RUN_FILE, error)
            return False
        if now is None or now.run != child.run or now.wish in (wish, "kill"):
            return False
        cleared: dict[str, object] = {"environment": {}, "overrides": {}} if wish == "kill" else {}
        with suppress(OSError):  # on a full disk, the request to Ray must do
            now.model_copy(update={"wish": wish, **cleared}).write(child.folder)
        return True

    def _keep_output(self, child: Child) -> None:
        """Append the output that the driver printed before it opened the job's output file."""
        with suppress(NoAnswer, OSError):
            kept = self._ask("GET", f"/api/jobs/{child.run}/logs", "logs", else_=("does not exist",)) or {}
            logs = str(kept.get("logs") or "")[-_LOG_LIMIT:]
            lines = [line for line in logs.splitlines() if not _RAY_LINES.search(line)]
            with JobFolder(child.folder).output.open("a", encoding="utf-8") as output:
                output.writelines(f"{line}\n" for line in lines)

    def _silent_s(self) -> float:
        return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since

    def _ask(
        self, method: str, path: str, key: str, body: Mapping[str, object] | None = None, else_: tuple[str, ...] = ()
    ) -> Answer | None:
        """Send a request and return the cluster's answer.

        Args:
            method: Method of the request.
            path: Path of the request.
            key: A key that every answer of Ray to this request has.
            body: Body of the request, sent as JSON.
            else_: Texts of refusals that are valid answers; they are returned as None.

        Raises:
            NoAnswer: There is no answer, or the dashboard does not work.
        """
        if self._silent_since is not None and time.monotonic() < self._ask_at:
            raise NoAnswer(self._unreached(self._why))
        try:
            answer = self._http.request(method, path, json=body, headers=self._headers())
            found = answer.json() if answer.status_code == httpx.codes.OK else None
            if isinstance(found, dict) and key in found:
                return self._reached(found)
            if answer.status_code >= 400 and any(words in answer.text for words in else_):
                return self._reached(None)
            why = f"it answers {answer.status_code}: {_line(answer.text)}"
            if answer.status_code in (401, 403):
                why = "it refuses the request: it expects a token (`executors.ray.token_file`)"
        except (httpx.HTTPError, OSError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
        if self._silent_since is None:
            self._silent_since = time.monotonic()
            log.warning("%s; trying again for %g s", self._unreached(why), self._ray.unreachable_s)
        self._why, self._ask_at = why, time.monotonic() + RETRY_S
        raise NoAnswer(self._unreached(why))

    def _reached[T](self, answer: T) -> T:
        if self._silent_since is not None:
            log.info("the Ray cluster at %s answers again", self._ray.address)
        self._silent_since = None
        return answer

    def _unreached(self, why: str) -> str:
        return f"the Ray cluster at {self._ray.address} (`executors.ray.address`) can't be reached: {why}"

    def _headers(self) -> dict[str, str]:
        if self._ray.token_file is None:
            return {}
        return {"Authorization": f"Bearer {self._ray.token_file.read_text(encoding='utf-8').strip()}"}


def _starts_before(folder: Path) -> int:
    try:
        before = read_run(folder)
    except ValueError as error:  # the number is only for people; names are unique anyway
        log.warning("%s is damaged and is written again: %s", folder / RUN_FILE, error)
        return 0
    return 0 if before is None else before.number


def _exit(known: Answer) -> Exit:
    """Return how an ended run ended, according to Ray's JobInfo."""
    if known["status"] == "SUCCEEDED":
        return Exit(0)
    if known["status"] == "STOPPED":
        return Exit(-signal.SIGTERM, message="it was stopped on the Ray cluster and not by this server")
    code = known.get("driver_exit_code")
    if code is not None:
        return Exit(int(code))
    message = f"Ray: {_line(str(known.get('message') or known.get('error_type') or 'the run failed'))}"
    return Exit(1 if known.get("error_type") in _NEVER_BEGINS else None, message=message)


def _line(text: str) -> str:
    """Return the last line of Ray's message, which is often a traceback."""
    with suppress(ValueError):
        text = str(json.loads(text).get("msg", text))
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return (lines or [""])[-1][:_MESSAGE_LIMIT]
