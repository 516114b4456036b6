"""`LocalExecutor`: training processes on this machine, each the leader of a session of its own.

Output goes to a file, never through a pipe of ours: nobody has to be alive to drain it, so a training process
outlives supervisor and server.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from llama_stack_provider_moe.config import MIRROR_VARIABLE, TRUST_VARIABLE, ProviderConfig
from llama_stack_provider_moe.jobs.executors import Child, Exit
from llama_stack_provider_moe.jobs.executors.interpreter import interpreter
from llama_stack_provider_moe.jobs.executors.nursery import Nursery, Warmth
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.jobs.memory import MemoryKills
from llama_stack_provider_moe.jobs.processes import birth, in_session, is_alive, is_reaped, with_environment

# What a training process gets of the environment, and why. All else (API keys of the server's other providers,
# database passwords, ...) stays behind; `child_env` in the provider's config adds to it.
PASSED_ON = frozenset({
    "PATH", "HOME", "TMPDIR", "TZ",                       # find programs, caches and room for temporary files
    "LANG", "LANGUAGE",                                   # text encoding
    "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH",       # the same libraries as the server's own
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",          # which devices, where the supervisor gives out none
    "CUDA_HOME", "CUDA_PATH",                             # Triton's compiler looks for CUDA
    "CC", "CXX",                                          # Triton compiles a launcher in C
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM",  # threads on a shared machine
    "http_proxy", "https_proxy", "no_proxy", "all_proxy",            # the way to a model hub
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "XDG_CACHE_HOME",                                     # where caches live
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
JOB_VARIABLE = "MOE_JOB_FOLDER"

# Waits for a line on standard input, which comes once the store knows the process, then becomes the command: pid and
# time of birth stay. At the end of input, which is what the death of the supervisor looks like, it ends instead.
_GATE = 'read -r go || exit 125; exec "$@" </dev/null'


def training_command(config: ProviderConfig, folder: Path) -> list[str]:
    """The command line of a training process."""
    return [interpreter(config, folder), "-m", "llama_stack_provider_moe.training.main", str(folder)]


def training_environment(environment: Mapping[str, str], config: ProviderConfig) -> dict[str, str]:
    """What a training process needs of `environment`, then `config.child_env`."""
    kept = {
        name: value for name, value in environment.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    if "PYTHONPATH" in kept:  # it starts in another folder than the server did
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in kept["PYTHONPATH"].split(os.pathsep))
    if (config.mirror.url or "").startswith("s3:"):  # credentials, for nothing else that a child does
        kept |= {name: value for name, value in environment.items() if name.startswith("AWS_")}
    return kept | config.child_env


def child_environment(
    environment: Mapping[str, str], config: ProviderConfig, folder: Path, devices: str | None = None
) -> dict[str, str]:
    """The environment of the training process of one job.

    Which devices it sees was decided for it, unless `devices` is None, and whose code it may run; nothing else has a
    say in that.
    """
    given = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    told = {
        TRUST_VARIABLE: json.dumps(config.models.trust_remote_code),
        MIRROR_VARIABLE: config.mirror.url or "",
        JOB_VARIABLE: str(folder),
    }
    return training_environment(environment, config) | given | told


class LocalExecutor:
    """Runs training processes on this machine.

    Args:
        config: whose `training_python` (or `unsloth_python`) and `child_env` they get.
        command: what to run in a job's folder, cold; tests run something smaller than torch.
        system: where /proc and /sys are found.
        nursery: starts the process that children are forked from; left out, where `supervisor.warm` says so.
    """

    def __init__(
        self,
        config: ProviderConfig,
        command: Callable[[ProviderConfig, Path], list[str]] = training_command,
        system: Path = Path("/"),
        nursery: Callable[[], Nursery] | None = None,
    ) -> None:
        self._config = config
        self._command = command
        self._system = system
        self._own: dict[int, subprocess.Popen[bytes]] = {}
        self._start_nursery = nursery
        if nursery is None and config.supervisor.warm and command is training_command:
            self._start_nursery = lambda: Nursery(config, training_environment(os.environ, config))
        self._nursery: Nursery | None = None
        self._nursed: set[Child] = set()
        self._kills: dict[Child, MemoryKills] = {}

    def submit(self, folder: Path, record: Callable[[Child], None], devices: str | None = None) -> bool:
        """See `Executor`. False while the nursery imports: a start without it would not be quicker."""
        # The nursery has imported what one interpreter has; a job of another begins cold.
        warmth = self._warmth() if interpreter(self._config, folder) == self._config.training_python else Warmth.GONE
        if warmth is Warmth.IMPORTING:
            return False
        environment = child_environment(os.environ, self._config, folder, devices)
        with JobFolder(folder).output.open("ab", buffering=0) as output:
            if warmth is Warmth.READY and self._nursery is not None:
                with suppress(ChildProcessError):  # it has died just now: a cold start does as well
                    pid, gate = self._nursery.fork(folder, environment, output.fileno())
                    self._nursed.add(self._let_go(folder, pid, gate, record))
                    return True
            process = self._popen(folder, environment, output)
        assert process.stdin is not None
        gate = os.dup(process.stdin.fileno())
        process.stdin.close()
        try:
            self._let_go(folder, process.pid, gate, record)
        except BaseException:
            process.wait()
            raise
        self._own[process.pid] = process
        return True

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

    def _let_go(self, folder: Path, pid: int, gate: int, record: Callable[[Child], None]) -> Child:
        """Have the process at the gate recorded, then open the gate; closed, it never begins."""
        try:
            born = birth(pid)
            if born is None:
                raise ChildProcessError(f"process {pid} was killed before it began")
            child = Child(folder, pid, born)
            self._kills[child] = MemoryKills(pid, self._system)
            record(child)
            with suppress(BrokenPipeError):  # killed at the gate: `poll` finds out how
                os.write(gate, b"go\n")
        finally:
            os.close(gate)
        return child

    def _warmth(self) -> Warmth:
        if self._nursery is None:
            if self._start_nursery is None:
                return Warmth.GONE
            self._nursery, self._start_nursery = self._start_nursery(), None
        return self._nursery.warmth()

    def poll(self, child: Child) -> Exit | None:
        """See `Executor`. An own child that has ended is reaped here."""
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
            # Until it is reaped its pid, and so its group, can't be anybody else's.
            _signal_group(child.pid, signal.SIGKILL)
            del self._own[child.pid]
            return Exit(process.wait())
        if child in self._nursed and self._nursery is not None and self._nursery.warmth() is not Warmth.GONE:
            if not is_reaped(child.pid, child.birth):
                return None
            self._nursed.discard(child)
            end = Exit(self._nursery.end_of(child.pid))  # was told before it was reaped
        elif is_alive(child.pid, child.birth):
            return None
        else:
            end = Exit(None)
        # What it started is known by its session, and by its environment where it has left that.
        for pid in {*in_session(child.pid), *with_environment(JOB_VARIABLE, str(child.folder))}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return end

    def stop(self, child: Child, number: int) -> None:
        """See `Executor`."""
        if is_alive(child.pid, child.birth):
            _signal_group(child.pid, number)


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):  # all of them ended since we looked
        os.killpg(group, number)
