"""`RayExecutor`: jobs on a Ray cluster that is there already, through its Jobs API (HTTP; Ray itself is not imported).

A job's start is one Ray job with a name used once, and the store knows that name before the cluster does: an answer
that gets lost can't become a second run. What the Ray job does is `training.on_ray`. Wishes and the environment go by
`cluster.json` in the job's folder, which every node must see, so they arrive also where the cluster does not answer.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from llama_stack_provider_moe.config import MIRROR_VARIABLE, TRUST_VARIABLE, ProviderConfig, RayConfig
from llama_stack_provider_moe.jobs.cluster_run import RUN_FILE, ClusterRun, Wish, read_run
from llama_stack_provider_moe.jobs.executors import Child, Exit
from llama_stack_provider_moe.jobs.executors.local import JOB_VARIABLE, child_environment
from llama_stack_provider_moe.jobs.folder import JobFolder

# Requests are made between two beats of the supervisor's lease.
TIMEOUT = httpx.Timeout(5.0, connect=3.0)
# Between two looks at one run, and two tries of a cluster that did not answer.
LOOK_S = 1.0
RETRY_S = 5.0
_SAID_LIMIT = 500  # characters of what Ray says
_LOG_LIMIT = 20_000  # characters of what it kept of the driver's output
# Names of our environment that mean something on this machine alone; a node has its own.
_BOUND_TO_A_MACHINE = frozenset({
    "PATH", "HOME", "TMPDIR", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH", "CC", "CXX", "XDG_CACHE_HOME", "LLAMA_CPP_DIR", "MOE_TRAIN_CACHE",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
})  # fmt: skip
# Ends that the job would come to again: Ray could not even begin it.
_NEVER_BEGINS = frozenset({"RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR"})

# Lines of Ray's own in what it kept of every driver.
_OF_RAY = re.compile(r"Runtime env is setting up|^Running entrypoint for job ")

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class NoAnswer(Exception):
    """The cluster can't be asked now."""


class RayExecutor:
    """Runs jobs on one Ray cluster.

    Args:
        config: the provider's; `child_env` is what processes get on every node.
        ray: which cluster.
        transport: of the requests; left out: the network.
    """

    def __init__(self, config: ProviderConfig, ray: RayConfig, transport: httpx.BaseTransport | None = None) -> None:
        self._config = config
        self._ray = ray
        self._http = httpx.Client(
            base_url=ray.address,
            timeout=TIMEOUT,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),  # nothing is left open that somebody had to close
            transport=transport,
        )
        self._silent_since: float | None = None  # time.monotonic() of the first try without an answer
        self._why = ""  # the last try had no answer
        self._ask_at = 0.0  # time.monotonic() of the next try of a cluster that does not answer
        self._waits_since: dict[Path, float] = {}  # of jobs that the cluster could not be told of
        self._look_at: dict[Child, float] = {}
        self._stop_at: dict[Child, float] = {}
        self._pending: set[Child] = set()  # of which Ray says that they have not begun
        self._unsent: dict[Child, dict[str, Any]] = {}  # known to the store, and not to the cluster as far as we know

    def submit(self, folder: Path, record: Callable[[Child], None], devices: str | None = None) -> bool:
        """See `Executor`; `devices` are this machine's, and none of them are for a cluster.

        False while the cluster does not answer; OSError once it has not for `executors.ray.unreachable_s`.
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
        child = Child(folder, 0, 0.0, f"{folder.name[:80]}-{number}-{secrets.token_hex(4)}")
        record(child)
        self._new_run(child, number).write(folder)
        command = [self._ray.python or self._config.training_python, "-m", "llama_stack_provider_moe.training.on_ray"]
        self._unsent[child] = {
            "submission_id": child.run,
            # Ray runs it by a shell, whose exit code would hide what signal ended the driver.
            "entrypoint": f"exec {shlex.join([*command, str(folder), str(child.run)])}",
            "runtime_env": {"env_vars": {JOB_VARIABLE: str(folder)}},
            "metadata": {"moe_job": folder.name},
        }
        with suppress(NoAnswer):  # `poll` sends it
            self._send(child)
        return True

    def _new_run(self, child: Child, number: int) -> ClusterRun:
        ours = child_environment(os.environ, self._config, child.folder)
        decided = {name: ours[name] for name in (JOB_VARIABLE, MIRROR_VARIABLE, TRUST_VARIABLE)}
        return ClusterRun(
            run=str(child.run),
            number=number,
            environment={name: value for name, value in ours.items() if name not in _BOUND_TO_A_MACHINE},
            overrides=self._config.child_env | decided,
            cpus_per_process=self._ray.cpus_per_process,
            placement_s=self._ray.placement_s,
        )

    def _send(self, child: Child) -> None:
        """Have the cluster know a run; sent twice, it is known once."""
        self._ask("POST", "/api/jobs/", "submission_id", self._unsent[child], else_=("already exists",))
        del self._unsent[child]

    def poll(self, child: Child) -> Exit | None:
        """See `Executor`. A cluster that does not answer has its jobs running, up to `unreachable_s`."""
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
            return self._ended(child, Exit(None, said=f"{error} (`executors.ray.unreachable_s`)"))
        if known is None:
            said = f"the Ray cluster at {self._ray.address} does not know run {child.run}: its head was restarted"
            return self._ended(child, Exit(None, said=f"{said}, or the run never reached it"))
        if known["status"] in ("PENDING", "RUNNING"):
            (self._pending.add if known["status"] == "PENDING" else self._pending.discard)(child)
            return None
        if known["status"] != "SUCCEEDED":
            self._keep_output(child)
        return self._ended(child, _exit(known))

    def _ended(self, child: Child, end: Exit) -> Exit:
        self._wish(child, "kill")  # of what may be left on nodes that the cluster has lost
        self._look_at.pop(child, None)
        self._stop_at.pop(child, None)
        self._unsent.pop(child, None)
        self._pending.discard(child)
        if end.said is not None:
            log.warning("run %s: %s", child.run, end.said)
        return end

    def stop(self, child: Child, number: int) -> None:
        """See `Executor`. Asked gently, its leaders on the nodes pass it on; else Ray is asked too."""
        kill = number == signal.SIGKILL
        changed = self._wish(child, "kill" if kill else "stop")
        if self._unsent.pop(child, None) is not None or not (kill or child in self._pending):
            return
        if changed or time.monotonic() >= self._stop_at.get(child, 0.0):
            self._stop_at[child] = time.monotonic() + RETRY_S
            with suppress(NoAnswer):
                self._ask("POST", f"/api/jobs/{child.run}/stop", "stopped", else_=("does not exist",))

    def _wish(self, child: Child, wish: Wish) -> bool:
        """Write a wish down; False where it stands already, or another run counts, or the folder is gone."""
        try:
            now = read_run(child.folder)
        except ValueError as error:
            log.warning("%s is damaged: %s", child.folder / RUN_FILE, error)
            return False
        if now is None or now.run != child.run or now.wish in (wish, "kill"):
            return False
        kept: dict[str, Any] = {"environment": {}, "overrides": {}} if wish == "kill" else {}
        with suppress(OSError):  # a full disk: Ray is asked too
            now.model_copy(update={"wish": wish, **kept}).write(child.folder)
        return True

    def _keep_output(self, child: Child) -> None:
        """Put what the driver printed before it wrote into the job's output file itself there too."""
        with suppress(NoAnswer, OSError):
            kept = self._ask("GET", f"/api/jobs/{child.run}/logs", "logs", else_=("does not exist",)) or {}
            logs = str(kept.get("logs") or "")[-_LOG_LIMIT:]
            lines = [line for line in logs.splitlines() if not _OF_RAY.search(line)]
            with JobFolder(child.folder).output.open("a", encoding="utf-8") as output:
                output.writelines(f"{line}\n" for line in lines)

    def _silent_s(self) -> float:
        return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since

    def _ask(
        self, method: str, path: str, key: str, body: dict[str, Any] | None = None, else_: tuple[str, ...] = ()
    ) -> dict[str, Any] | None:
        """What the cluster answers.

        Args:
            method: of the request.
            path: of the request.
            key: that the answer has, or it is not from Ray.
            body: of the request, as JSON.
            else_: words of a refusal that is an answer too, and given as None.

        Raises:
            NoAnswer: there is none, or one of a dashboard that is not at work.
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
                why = "it refuses us: it wants a token (`executors.ray.token_file`)"
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
        return f"the Ray cluster at {self._ray.address} (`executors.ray.address`) can't be asked: {why}"

    def _headers(self) -> dict[str, str]:
        if self._ray.token_file is None:
            return {}
        return {"Authorization": f"Bearer {self._ray.token_file.read_text(encoding='utf-8').strip()}"}


def _starts_before(folder: Path) -> int:
    try:
        before = read_run(folder)
    except ValueError as error:  # its number is for people; names are used once all the same
        log.warning("%s is damaged, and is written anew: %s", folder / RUN_FILE, error)
        return 0
    return 0 if before is None else before.number


def _exit(known: dict[str, Any]) -> Exit:
    """What Ray's JobInfo says of a run that has ended."""
    if known["status"] == "SUCCEEDED":
        return Exit(0)
    if known["status"] == "STOPPED":
        return Exit(-signal.SIGTERM, said="it was stopped on the Ray cluster, not from here")
    code = known.get("driver_exit_code")
    if code is not None:
        return Exit(int(code))
    said = f"Ray: {_line(str(known.get('message') or known.get('error_type') or 'the run failed'))}"
    return Exit(1 if known.get("error_type") in _NEVER_BEGINS else None, said=said)


def _line(text: str) -> str:
    """The last line of what Ray says, which is often a traceback."""
    with suppress(ValueError):
        text = str(json.loads(text).get("msg", text))
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return (lines or [""])[-1][:_SAID_LIMIT]
