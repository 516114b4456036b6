"""`LocalExecutor`: training processes on this machine, each the leader of its own session.

Output goes to a file and never through a pipe, which would need a reader. So a training process outlives the supervisor
and the server.
"""

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from llama_stack_provider_moe.control.supervisor.executors import Child, Exit, Record
from llama_stack_provider_moe.control.supervisor.executors.forkserver import ANSWER_LIMIT_S, Forkserver, Readiness
from llama_stack_provider_moe.control.supervisor.executors.forkserver_keeper import ForkserverKeeper
from llama_stack_provider_moe.control.supervisor.oom import MemoryKills
from llama_stack_provider_moe.control.supervisor.processes import (
    birth,
    in_session,
    is_alive,
    is_reaped,
    with_environment,
)
from llama_stack_provider_moe.ground.private import UMASK_VARIABLE
from llama_stack_provider_moe.jobdir.attempt import ATTEMPT_VARIABLE, JOB_VARIABLE
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.engines_config import ENGINES, ENGINES_VARIABLE
from llama_stack_provider_moe.spec.graders_config import JUDGES, JUDGES_VARIABLE
from llama_stack_provider_moe.spec.server_config import (
    MIRROR_VARIABLE,
    SECRETS_VARIABLE,
    TRUST_VARIABLE,
    ProviderConfig,
)
from llama_stack_provider_moe.spec.serving_config import SERVING, SERVING_VARIABLE

# The environment variables that a training process gets, and why. All others (API keys of the server's other providers,
# database passwords, ...) are left out; `child_env` and `child_secrets` in the provider's config add more.
PASSED_ON = frozenset({
    "PATH", "HOME", "TMPDIR", "TZ",                       # find programs, caches and space for temporary files
    "LANG", "LANGUAGE",                                   # text encoding
    "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH",       # the same libraries as the server's own
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",          # which devices, if the supervisor assigns none
    "CUDA_HOME", "CUDA_PATH",                             # Triton's compiler looks for CUDA
    "CC", "CXX",                                          # Triton compiles a launcher in C
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM",  # threads on a shared machine
    "http_proxy", "https_proxy", "no_proxy", "all_proxy",            # reach a model hub
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "XDG_CACHE_HOME",                                     # where caches are
    "LLAMA_CPP_DIR", "MOE_TRAIN_CACHE",                   # where llama.cpp is, for GGUF files
})  # fmt: skip
PASSED_ON_PREFIXES = (
    "LC_",
    "HF_",  # caches, offline mode, and HF_TOKEN: gated models need it, and only the training process loads models
    "TRANSFORMERS_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "PYTORCH_",  # allocator settings
    "TRITON_",
    "NCCL_",
)
log = logging.getLogger("llama_stack_provider_moe.supervisor")

# The shell waits for a line on standard input, which comes once the store knows the process. Then it becomes the
# command by `exec`, which keeps pid and time of birth. If the input ends first, because the supervisor died, it exits.
_GATE = 'read -r go || exit 125; exec "$@" </dev/null'


def training_command(config: ProviderConfig, folder: Path) -> list[str]:
    """Return the command line of a training process."""
    return [interpreter(config, folder), "-m", "llama_stack_provider_moe.compute.worker.main", str(folder)]


def interpreter(config: ProviderConfig, folder: Path) -> str:
    """Return the interpreter for the job in `folder`: Unsloth's for its loader, else the training environment's.

    Unsloth needs other package versions. If the job's spec can't be read, the training process reports that.

    Raises:
        FileNotFoundError: The job needs Unsloth, but the server no longer has an environment for it.
    """
    loader = None
    with suppress(OSError, ValueError, AttributeError):
        loader = json.loads(JobFolder(folder).spec.read_bytes()).get("loader")
    if loader != "unsloth":
        return config.training_python
    if config.unsloth_python is None:
        raise FileNotFoundError("loader: 'unsloth' needs `unsloth_python` in the server's config, where it is not set")
    return config.unsloth_python


def training_environment(environment: Mapping[str, str], config: ProviderConfig) -> dict[str, str]:
    """Return the variables that training processes need, then `config.child_env` and `config.child_secrets`."""
    kept = passed_on(environment)
    if (config.mirror.url or "").startswith("s3:"):  # credentials, which a child needs only for the mirror
        kept |= {name: value for name, value in environment.items() if name.startswith("AWS_")}
    return kept | config.child_env | secrets_for_children(environment, config)


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every process with torch inherits: caches, paths, GPUs; no keys of other providers."""
    kept = {
        name: value for name, value in environment.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    if "PYTHONPATH" in kept:  # the process starts in another folder than the server
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in kept["PYTHONPATH"].split(os.pathsep))
    return kept


def secrets_for_children(environment: Mapping[str, str], config: ProviderConfig) -> dict[str, str]:
    """Return the variables of `config.child_secrets`, and with keys of judges and engines, that are set."""
    return {name: environment[name] for name in config.secrets if name in environment}


def child_environment(
    environment: Mapping[str, str],
    config: ProviderConfig,
    folder: Path,
    devices: str | None = None,
    attempt: str | None = None,
) -> dict[str, str]:
    """Return the environment of a job's training process.

    The visible devices (unless `devices` is None) and whose code it may run are decided here, and no other setting can
    override them. The process gets the name of its attempt (`jobdir.attempt`), so that it ends once it is superseded.

    Args:
        environment: Environment variables of the supervisor.
        config: The provider's configuration.
        folder: Folder of the job.
        devices: See `Job.devices`.
        attempt: Name of the attempt.
    """
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    decided = {
        TRUST_VARIABLE: json.dumps(config.models.trust_remote_code),
        MIRROR_VARIABLE: config.mirror.url or "",
        SERVING_VARIABLE: "" if config.serving is None else SERVING.dump_json(config.serving).decode(),
        SECRETS_VARIABLE: json.dumps(config.secrets),
        JUDGES_VARIABLE: JUDGES.dump_json(config.graders.judges).decode(),
        ENGINES_VARIABLE: ENGINES.dump_json(config.engines).decode(),
        JOB_VARIABLE: str(folder),
        **({} if attempt is None else {ATTEMPT_VARIABLE: attempt}),
        UMASK_VARIABLE: f"{config.privacy.umask:03o}",
    }
    return training_environment(environment, config) | visible | decided


class LocalExecutor:
    """Runs training processes on this machine.

    Args:
        config: Configuration with the `training_python` (or `unsloth_python`) and `child_env` to use.
        command: Returns the command for a cold start; tests run something smaller than torch.
        system: Folder that contains `proc` and `sys`.
        start_forkserver: Starts a process that children are forked from; by default according to `supervisor.warm`.
    """

    def __init__(
        self,
        config: ProviderConfig,
        command: Callable[[ProviderConfig, Path], list[str]] = training_command,
        system: Path = Path("/"),
        start_forkserver: Callable[[], Forkserver] | None = None,
    ) -> None:
        self._config = config
        self._command = command
        self._system = system
        self._own: dict[int, subprocess.Popen[bytes]] = {}
        if start_forkserver is None and config.supervisor.warm and command is training_command:
            start_forkserver = partial(Forkserver, config, training_environment(os.environ, config))
        self.forkserver = None if start_forkserver is None else ForkserverKeeper(start_forkserver)
        self._forked: dict[Child, Forkserver] = {}
        self._unreported: dict[Child, float] = {}  # time.monotonic() when it was first seen as a zombie
        self._kills: dict[Child, MemoryKills] = {}

    def submit(self, folder: Path, record: Record, devices: str | None = None, attempt: str | None = None) -> bool:
        """See `Executor`. Return False while the first forkserver imports: a cold start would not be faster."""
        # The forkserver runs in one interpreter; a job that needs another one starts cold.
        same = interpreter(self._config, folder) == self._config.training_python
        forkserver = self.forkserver if same else None
        if forkserver is not None and forkserver.readiness() is Readiness.IMPORTING:
            return False
        environment = child_environment(os.environ, self._config, folder, devices, attempt)
        with JobFolder(folder).output.open("ab", buffering=0) as output:
            if forkserver is not None:
                forked = self._fork(forkserver, folder, environment, output)
                if forked is not None:
                    source, pid, gate = forked
                    self._forked[self._record_and_release(folder, pid, gate, record, attempt)] = source
                    return True
            process = self._popen(folder, environment, output)
        assert process.stdin is not None
        gate = os.dup(process.stdin.fileno())
        process.stdin.close()
        try:
            self._record_and_release(folder, process.pid, gate, record, attempt)
        except BaseException:
            process.wait()
            raise
        self._own[process.pid] = process
        return True

    def _fork(
        self, forkserver: ForkserverKeeper, folder: Path, environment: dict[str, str], output: IO[bytes]
    ) -> tuple[Forkserver, int, int] | None:
        """Return the forkserver, a new child's pid and its gate; None if no child can be forked: start cold instead."""
        source, why = forkserver.current, forkserver.unavailable_reason
        if source is not None and forkserver.readiness() is Readiness.READY:
            try:
                return source, *source.fork(folder, environment, output.fileno())
            except OSError as error:  # also if the request is larger than a message may be
                why = str(error)
        log.warning("job %s: starts cold, which takes longer: %s", folder.name, why)
        return None

    def _popen(self, folder: Path, environment: dict[str, str], output: IO[bytes]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            ["/bin/sh", "-c", _GATE, "moe-train", *self._command(self._config, folder)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )

    def _record_and_release(self, folder: Path, pid: int, gate: int, record: Record, attempt: str | None) -> Child:
        """Record the process that waits at the gate, then open the gate. If recording fails, it never begins."""
        try:
            born = birth(pid)
            if born is None:
                raise ChildProcessError(f"process {pid} was killed before it started")
            child = Child(folder, pid, born, attempt=attempt or "")
            self._kills[child] = MemoryKills(pid, self._system)
            record(child)
            with suppress(BrokenPipeError):  # killed while it waited; `poll` finds out how
                os.write(gate, b"go\n")
        finally:
            os.close(gate)
        return child

    def poll(self, child: Child) -> Exit | None:
        """See `Executor`. It also reaps ended children of this process, and replaces a dead forkserver."""
        if self.forkserver is not None:
            self.forkserver.maintain()
        kills = self._kills.get(child)
        if kills is None:
            kills = self._kills[child] = MemoryKills(child.pid, self._system)
        out_of_memory = kills.recently()
        end = self._poll(child)
        if end is None:
            return None
        del self._kills[child]
        return end._replace(out_of_memory=out_of_memory and end.code in (None, -signal.SIGKILL))

    def _poll(self, child: Child) -> Exit | None:
        process = self._own.get(child.pid)
        if process is not None:
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            # Until the process is reaped, its pid, and so its group's id, can't be reused.
            _signal_group(child.pid, signal.SIGKILL)
            del self._own[child.pid]
            return Exit(process.wait())
        source = self._forked.get(child)
        if is_alive(child.pid, child.birth):
            return None
        if source is not None and source.readiness() is not Readiness.GONE and not is_reaped(child.pid, child.birth):
            if time.monotonic() - self._unreported.setdefault(child, time.monotonic()) > ANSWER_LIMIT_S:
                source.close(f"it did not report the end of its process {child.pid} within {ANSWER_LIMIT_S:g} s")
            return None
        self._forked.pop(child, None)
        self._unreported.pop(child, None)
        end = Exit(None if source is None else source.end_of(child.pid))  # the message comes before the reaping
        # Its descendants are found by their session, or by their environment if they left the session. Another
        # supervisor may have started the job again, so processes of other attempts are left alone.
        left = with_environment(JOB_VARIABLE, str(child.folder), ATTEMPT_VARIABLE, child.attempt)
        for pid in {*in_session(child.pid), *left}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return end

    def stop(self, child: Child, number: int) -> None:
        """See `Executor`."""
        if is_alive(child.pid, child.birth):
            _signal_group(child.pid, number)


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):  # all of them have ended meanwhile
        os.killpg(group, number)
