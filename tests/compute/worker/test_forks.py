"""Laws of forks: a process that forks has one thread, whatever its libraries would start, and no child hangs."""

import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.supervisor.executors.forkserver import Forkserver, Readiness
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import wait_for

ROOT = Path(__file__).parents[3]
HANGS_S = 600.0  # a child's work takes a second; the machine may be busy
AT_A_TIME = 4


def environment(threads: int, **more: str) -> dict[str, str]:
    """The environment of a forkserver on a machine with `threads` cores for each process."""
    kept = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    return kept | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(ROOT)} | more


def python(code: str, **variables: str) -> str:
    """The output of `code`."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment(4, **variables), cwd=ROOT, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_native_threads_are_seen_and_forks_refused_beside_them() -> None:
    """pyarrow's jemalloc starts a thread that `threading` does not know; then a thread of Python's."""
    code = (
        "import threading, time, os\n"
        "from llama_stack_provider_moe.errors import ForkRefused\n"
        "from llama_stack_provider_moe.compute.runtime import threads\n"
        "threads.check_alone()\n"
        "{start}\n"
        "try:\n"
        "    pid = threads.fork()\n"
        "except ForkRefused as refused:\n"
        "    print(refused)\n"
        "else:\n"
        "    os._exit(0) if pid == 0 else print('forked')\n"
    )
    assert python(code.format(start="")) == "forked"
    assert "(jemalloc_bg_thd" in python(code.format(start="import pyarrow"))
    named = "threading.Thread(target=time.sleep, args=(60,), name='a monitor', daemon=True).start()"
    assert "(a monitor)" in python(code.format(start=named))


def test_no_library_starts_a_thread_when_it_is_imported() -> None:
    """The libraries of every recipe, with four cores, even if the operator's `child_env` asks for more threads."""
    code = (
        "import os, warnings\n"
        "warnings.simplefilter('default')\n"
        "from llama_stack_provider_moe.compute.worker.preload import preload\n"
        "preload()\n"
        "print(len(os.listdir('/proc/self/task')), os.environ['JE_ARROW_MALLOC_CONF'], flush=True)\n"
        "os._exit(0)\n"
    )
    asked = {"OPENBLAS_NUM_THREADS": "4", "JE_ARROW_MALLOC_CONF": "dirty_decay_ms:5,background_thread:true"}
    assert python(code, **asked) == "1 dirty_decay_ms:5,background_thread:false"


def test_a_job_of_several_processes_is_not_forked_beside_a_thread(tmp_path: Path) -> None:
    """It fails, its reason names the thread, and no forked process is left.

    It runs in a separate process, because other tests may have left threads in this one.
    """
    code = (
        "import signal, threading, time\n"
        "from pathlib import Path\n"
        "from llama_stack_provider_moe.jobdir.folder import JobFolder\n"
        "from llama_stack_provider_moe.compute.worker import main\n"
        "main.preload = lambda: None  # no imports; the thread starts first\n"
        "threading.Thread(target=time.sleep, args=(600,), name='a monitor', daemon=True).start()\n"
        f"assert main.train_together(JobFolder(Path({str(tmp_path)!r})), 2) == main.FAILED\n"
        "assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
    )
    python(code)
    (failed,) = read(JobFolder(tmp_path).events).events
    assert (failed.type, failed.error) == ("failed", "ForkRefused")
    assert "a monitor" in failed.reason


def test_a_group_that_can_be_forked_in_part_alone_is_ended(tmp_path: Path) -> None:
    """The second fork is refused: the first child is killed, and the signal mask is as before."""
    code = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from llama_stack_provider_moe.errors import ForkRefused\n"
        "from llama_stack_provider_moe.control.supervisor.processes import birth\n"
        "from llama_stack_provider_moe.compute.runtime import threads\n"
        "from llama_stack_provider_moe.compute.worker import process_group\n"
        "begun = []\n"
        "def fork():\n"
        "    if begun:\n"
        "        raise ForkRefused('a thread has come')\n"
        "    begun.append(threads.fork())\n"
        "    return begun[-1]\n"
        "process_group.fork = fork\n"
        "def stays(peers, report):\n"
        "    time.sleep(3600)\n"
        "    return 0\n"
        f"output = Path({str(tmp_path / 'output')!r}).open('wb', buffering=0)\n"
        "try:\n"
        "    process_group.ProcessGroup(2, stays, output).run()\n"
        "except ForkRefused as refused:\n"
        "    print(refused, len(begun), birth(begun[0]))\n"
        "output.close()\n"
        "assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
    )
    assert python(code) == "a thread has come 1 None"


def forks(folder: Path, cores: int, count: int) -> None:
    """Fork `count` children from one forkserver; every tenth forks two more; all of them complete."""
    config = ProviderConfig.model_validate({"state_dir": folder, "training_python": sys.executable})
    forkserver = Forkserver(config, environment(cores), "tests.support.busy_forkserver")
    try:
        wait_for(lambda: forkserver.readiness() is not Readiness.IMPORTING, timeout_s=600)
        assert forkserver.readiness() is Readiness.READY, (folder / "forkserver.log").read_text()
        running: dict[int, tuple[Path, float]] = {}
        begun = 0
        while begun < count or running:
            while begun < count and len(running) < AT_A_TIME:
                begun += 1
                child = folder / f"{'group' if begun % 10 == 0 else 'child'}-{begun}"
                child.mkdir()
                with (child / "output.log").open("wb") as output:
                    pid, gate = forkserver.fork(child, environment(cores), output.fileno())
                os.write(gate, b"go\n")
                os.close(gate)
                running[pid] = (child, time.monotonic())
            for pid, (child, since) in list(running.items()):
                code = forkserver.end_of(pid)
                assert code is not None or time.monotonic() - since < HANGS_S, f"{child.name} hangs"
                if code is not None:
                    del running[pid]
                    output_of = "".join(path.read_text() for path in child.glob("*.log"))
                    assert code == 0, f"{child.name}: exit code {code}: {output_of}"
            time.sleep(0.01)
    finally:
        forkserver.close("the test is over")
    found = [json.loads(path.read_text()) for path in folder.glob("child-*/found.json")]
    assert len(found) == count - count // 10
    assert all(each["parallel"] == cores for each in found)
    assert all(each["threads"] >= cores - 1 for each in found), "training ran in parallel"
    assert "multi-threaded" not in (folder / "forkserver.log").read_text()


def test_a_forkserver_ends_in_silence_when_its_supervisor_died_with_a_message_unread() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.tiny_forkserver", str(theirs.fileno())],
        env=environment(1), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(theirs.fileno(),),
    )  # fmt: skip
    with theirs, ours:
        select.select([ours], [], [], 60)  # it is ready; what it said so with is never read
    output, _ = process.communicate(timeout=60)
    assert output == b""


def test_no_fork_hangs(tmp_path: Path) -> None:
    forks(tmp_path, 2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_none_of_two_hundred_forks_hangs(tmp_path: Path, threads: int) -> None:
    forks(tmp_path, threads, 200)
