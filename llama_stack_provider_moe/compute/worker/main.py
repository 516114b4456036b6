"""The training process: `python -m llama_stack_provider_moe.compute.worker.main FOLDER`.

It reads `spec.json` and `data/` in a job's folder, and writes everything else there. Exit code 0: completed, and
`manifest.json` is there; 1: failed, and a `failed` event says why; 3: stopped on request (SIGTERM), after the current
step and a checkpoint; 5: one of our Triton kernels failed, and the next start computes the experts with torch
(`jobdir.experts_backend`). In a job of several processes (`resources`) this process is their leader, see
`process_group`.
"""

import errno
import importlib
import importlib.metadata
import os
import platform
import signal
import sys
import traceback
from contextlib import closing, suppress
from pathlib import Path
from typing import cast

from llama_stack_provider_moe.compute.data.workers import end_helpers, fork_from_a_server
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.runtime.context import AnySession, HandedOver, NoEvents, Session, Stop, Stopped
from llama_stack_provider_moe.compute.runtime.cores import cores
from llama_stack_provider_moe.compute.runtime.mirroring import Mirroring
from llama_stack_provider_moe.compute.runtime.peers import ALONE, Peers, is_of_a_lost_peer
from llama_stack_provider_moe.compute.runtime.redacted_output import environment_secrets, redact_output
from llama_stack_provider_moe.compute.runtime.reporting import imports_counted, reported_in_lines, reported_to
from llama_stack_provider_moe.compute.worker.preload import preload
from llama_stack_provider_moe.compute.worker.process_group import End, ProcessGroup, Report, Verdict, end_by_signal
from llama_stack_provider_moe.errors import ForkRefused, MoeError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.ground.private import take_umask
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.events import Cancelled, EventLog, Failed, Message, Started, latest
from llama_stack_provider_moe.jobdir.experts_backend import HANDED_OVER, write_override
from llama_stack_provider_moe.jobdir.folder import JobFolder, Manifest, write_atomic
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.recipes import RECIPES

COMPLETED, FAILED, STOPPED = 0, 1, 3

# Set before any library is imported: no telemetry, and no progress bars in the log file.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LIBRARIES = ("llama-stack-provider-moe", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def run(session: Session[JobSpec]) -> Manifest:
    """Run the recipe that the job names. It is imported here, because its libraries take many seconds."""
    with imports_counted():
        recipe = importlib.import_module(RECIPES[session.spec.recipe].module)
    if isinstance(session.spec, TrainingSpec):
        from llama_stack_provider_moe.compute.train.strategy import decided
        from llama_stack_provider_moe.compute.train.trackers import require_trackers

        require_trackers(session.spec.trackers)
        with liveness.stage("planning"):
            session = cast(Session[JobSpec], decided(cast(AnySession, session)))
    return cast(Manifest, recipe.run(session))


def train(folder: JobFolder) -> int:
    """Run a job in this process, and return the exit code."""
    return train_as(folder, ALONE, None)


def train_together(folder: JobFolder, size: int) -> int:
    """Run a job in `size` processes forked from this one, and return the exit code.

    This process itself trains nothing. If a signal killed one of the others, it ends by the same signal.
    """
    try:
        with reported_in_lines(), imports_counted():
            preload()
        with open(1, "wb", buffering=0, closefd=False) as output:
            found = ProcessGroup(size, lambda peers, report: train_as(folder, peers, report), output).run()
    except ForkRefused as refused:
        found = Verdict(not_forked(0, refused))
    return conclude(folder, found)


def not_forked(rank: int, refused: ForkRefused) -> End:
    """The end of processes that could not be forked."""
    return End(rank, "failed", str(refused), type(refused).__name__)


def conclude(folder: JobFolder, found: Verdict) -> int:
    """Record how a job of several processes ended, and return the exit code.

    If a signal killed one of the processes, this process ends by the same signal.
    """
    if found.end is None:
        assert found.signal is not None
        flush()
        end_by_signal(found.signal)
        return FAILED
    end = found.end
    if end.kind == "completed":
        return COMPLETED
    events = EventLog(folder.events, environment_secrets())  # no other process writes there any more
    event: Cancelled | Failed | Message
    if end.kind == "handed_over":
        code, event = HANDED_OVER, handed_over(folder, end.reason)
    elif end.kind == "stopped":
        code, event = STOPPED, Cancelled(step=end.step)
    else:
        code, event = FAILED, Failed(reason=end.reason, error=end.error)
    with suppress(OSError), closing(events):
        events.append(event)
    return code


def handed_over(folder: JobFolder, reason: str) -> Message:
    """Have the next start compute the experts with torch; returns what the job's events say."""
    write_override(folder, "torch", reason)
    return Message(level="warning", text=f"{reason}; the job goes on with moe.experts_backend torch, in a new process")


def train_as(folder: JobFolder, peers: Peers, report: Report | None) -> int:
    """Run one process of a job, and return its exit code.

    Args:
        folder: the job's.
        peers: the job's processes, and which of them this is.
        report: receives this process's end in a job of several processes; None: the end goes into the events.
    """
    require_current()
    redact_output()
    started_before = "started" in latest(folder.events)
    events = EventLog(folder.events, environment_secrets()) if peers.leads else NoEvents()
    stop = Stop()
    fork_from_a_server()

    def record_end(end: End, event: Cancelled | Failed | Message, text: str) -> None:
        _write_end(events if report is None else NoEvents(), event, text)
        if report is not None:
            report(end)

    try:
        session = Session(folder.read_spec(), folder, events, started_before, peers, stop)
        assert session.spec.resources.ranks == peers.size, "`train_together` runs a job of several processes"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop.request)
        with reported_to(events, peers.leads):
            _run_job(session)
        if report is not None:
            report(End(peers.rank, "completed"))
        return COMPLETED
    except Stopped as stopped:
        record_end(End(peers.rank, "stopped", step=stopped.step), Cancelled(step=stopped.step), str(stopped))
        return STOPPED
    except HandedOver as over:
        if report is None:
            message = handed_over(folder, str(over))
            record_end(End(peers.rank, "handed_over", str(over)), message, f"warning: {message.text}")
        else:  # the leader writes the file and the event
            report(End(peers.rank, "handed_over", str(over)))
        return HANDED_OVER
    except Exception as error:  # noqa: BLE001  the entry point: every end is recorded
        reason, name, trace = _reason(error), type(error).__name__, is_of_a_lost_peer(error)
        end = End(peers.rank, "failed", reason, name, trace)
        record_end(end, Failed(reason=reason, error=name), _output(error))
        return FAILED
    finally:
        with suppress(OSError):
            events.close()


def _run_job(session: Session[JobSpec]) -> None:
    """Everything from the imports to the manifest."""
    backend = backend_of(session.spec)
    with imports_counted():
        others = backend.import_first(Path(session.cache))  # before any other library
        versions = {**_versions(session.peers), **others}
    session.events.append(Started(pid=os.getpid(), versions=versions))
    if backend.notice is not None:
        session.say(backend.notice)
    if unknown := session.folder.unknown_settings():
        session.say(f"ignored, because this version does not know these settings: {'; '.join(unknown)}", "warning")
    manifest = run(session)
    if session.peers.leads:
        copies = Mirroring(session)
        for artifact in manifest.artifacts:
            copies.keep(artifact)
        copies.finish()
        write_atomic(session.folder.manifest, manifest)


def _write_end(events: EventLog, event: Cancelled | Failed | Message, text: str) -> None:
    """Write how the process ended. On a full disk only the exit code is left, and the supervisor finds the reason."""
    with suppress(OSError):
        events.append(event)
    with suppress(OSError):
        print(text.rstrip(), file=sys.stderr, flush=True)


def _versions(peers: Peers) -> dict[str, str]:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // peers.local_size))
        if peers.size > 1:  # else accelerate 1.15 counts the machine's cores
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    gpu = torch.cuda.is_available()
    threads = number_of(torch.get_num_threads(), "thread")
    device = torch.cuda.get_device_name(peers.local_rank) if gpu else f"CPU, {threads}"
    if peers.size > 1:
        device = f"{peers.size} x {device}"
    if peers.nodes > 1:
        device = f"{device}, on {peers.nodes} machines"
    return {"python": platform.python_version(), **versions, "device": device}


def _reason(error: Exception) -> str:
    """The reason for the user; of a bug, the traceback is in output.log."""
    if isinstance(error, MoeError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if _out_of_memory(error):
        return (
            f"out of memory ({text.splitlines()[0]}). Try a smaller training.batch_size with more "
            "training.gradient_accumulation_steps, a smaller options.max_length, "
            "efficiency.enable_activation_checkpointing, an adapter, or with adapter.quantize_base also "
            "efficiency.offload_experts"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error})"
    return text


def _output(error: Exception) -> str:
    """What output.log says: the text of an error that we raise on purpose; of all others, or caused by one of them,
    the traceback."""
    cause: BaseException | None = error
    while isinstance(cause, MoeError):
        cause = cause.__cause__
    return f"error: {error}" if cause is None else "".join(traceback.format_exception(error))


def _out_of_memory(error: Exception) -> bool:
    # By name, because torch may not be imported yet. The allocator for CPU tensors raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def be_quiet(folder: JobFolder) -> None:
    """Set up the libraries before they are imported: no progress bars, and the job's folder for what they write."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_DATASETS_CACHE", str(folder.root / "cache"))
    # Read once, when trackio is imported, and TRL's GRPO imports it before the job's trackers are opened.
    os.environ.setdefault("TRACKIO_DIR", str(folder.trackers / "trackio"))


def flush() -> None:
    """Flush stdout and stderr; a full disk is not an error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def main(arguments: list[str]) -> int:
    """Run the job in the folder that the command line names, and return the exit code."""
    if len(arguments) != 1:
        print("usage: python -m llama_stack_provider_moe.compute.worker.main FOLDER", file=sys.stderr)
        return 2
    folder = JobFolder(Path(arguments[0]).resolve())
    be_quiet(folder)
    try:
        size = folder.read_spec().resources.ranks
    except (OSError, ValueError):
        size = 1  # `train` reports what is wrong with it
    return train(folder) if size == 1 else train_together(folder, size)


if __name__ == "__main__":
    take_umask(os.environ)
    code = main(sys.argv[1:])
    # All results are on disk by now. A normal exit tears down torch's and transformers' modules one by one, which is
    # slow, and the supervisor would learn of the job's end only after it.
    flush()
    end_helpers()
    os._exit(code)
