"""The training process: `python -m llama_stack_provider_moe.training.main FOLDER`.

Reads `spec.json` and `data/` of a job's folder, and writes everything else in it. Exit code 0: done, and
`manifest.json` stands; 1: failed, and a `failed` event says why; 3: stopped on request (SIGTERM), after the step at
hand and a checkpoint. A job of several processes (`resources`) is led by this one, see `launch`.
"""

import errno
import importlib.metadata
import os
import platform
import signal
import sys
import traceback
from contextlib import closing, suppress
from pathlib import Path
from typing import cast

from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.jobs.events import Cancelled, EventLog, Failed, Started, latest
from llama_stack_provider_moe.jobs.folder import JobFolder, Manifest, write_atomic
from llama_stack_provider_moe.spec import (
    BreakerSpec,
    DPOSpec,
    ExportSpec,
    JobSpec,
    RoutingAnalysisSpec,
    SFTSpec,
    TrainingSpec,
)
from llama_stack_provider_moe.training.launch import End, Group, Report, Verdict, die_of
from llama_stack_provider_moe.training.mirroring import Mirroring
from llama_stack_provider_moe.training.peers import ALONE, Peers, is_of_a_lost_peer
from llama_stack_provider_moe.training.session import AnySession, NoEvents, Session, Stop, Stopped
from llama_stack_provider_moe.training.unsloth_entry import NOTICE, import_unsloth
from llama_stack_provider_moe.training.warmth import warm_up

COMPLETED, FAILED, STOPPED = 0, 1, 3

# Before any library is imported. Nothing is sent anywhere, and no bar is drawn into a file.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LIBRARIES = ("llama-stack-provider-moe", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def run(session: Session[JobSpec]) -> Manifest:
    """The recipe that the job names; imported here, for its libraries take many seconds."""
    if isinstance(session.spec, TrainingSpec):
        from llama_stack_provider_moe.training.strategy import decided

        session = cast(Session[JobSpec], decided(cast(AnySession, session)))
    if session.spec.recipe == "sft":
        from llama_stack_provider_moe.training.recipes import sft

        return sft.run(cast(Session[SFTSpec], session))
    if session.spec.recipe == "routing_analysis":
        from llama_stack_provider_moe.training.recipes import routing_analysis

        return routing_analysis.run(cast(Session[RoutingAnalysisSpec], session))
    if session.spec.recipe == "export":
        from llama_stack_provider_moe.training.recipes import export

        return export.run(cast(Session[ExportSpec], session))
    if session.spec.recipe == "dpo":
        from llama_stack_provider_moe.training.recipes import dpo

        return dpo.run(cast(Session[DPOSpec], session))
    from llama_stack_provider_moe.training.recipes import circuit_breaker

    return circuit_breaker.run(cast(Session[BreakerSpec], session))


def train(folder: JobFolder) -> int:
    """One job in one process, from its folder to an exit code."""
    return train_as(folder, ALONE, None)


def train_together(folder: JobFolder, size: int) -> int:
    """One job in `size` processes forked from this one, which trains nothing itself; does not return for a lost one."""
    warm_up()
    with open(1, "wb", buffering=0, closefd=False) as output:
        found = Group(size, lambda peers, report: train_as(folder, peers, report), output).run()
    return conclude(folder, found)


def conclude(folder: JobFolder, found: Verdict) -> int:
    """Write down how a job of several processes ended, and its exit code; one that was killed ends this process too."""
    if found.end is None:
        assert found.signal is not None
        flush()
        die_of(found.signal)
        return FAILED
    end = found.end
    if end.kind == "completed":
        return COMPLETED
    events = EventLog(folder.events)  # no process is left that would write there
    stopped = end.kind == "stopped"
    event = Cancelled(step=end.step) if stopped else Failed(reason=end.reason, error=end.error)
    with suppress(OSError), closing(events):
        events.append(event)
    return STOPPED if stopped else FAILED


def train_as(folder: JobFolder, peers: Peers, report: Report | None) -> int:
    """What one process does of a job. Its end goes to `report` where others hang on it, else into the events."""
    started_before = "started" in latest(folder.events)
    events = EventLog(folder.events) if peers.leads else NoEvents()
    stop = Stop()

    def tell(end: End, event: Cancelled | Failed, text: str) -> None:
        _last_words(events if report is None else NoEvents(), event, text)
        if report is not None:
            report(end)

    try:
        session = Session(folder.read_spec(), folder, events, started_before, peers, stop)
        assert session.spec.resources.ranks == peers.size, "a job of several processes is led by `train_together`"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop.request)
        with_unsloth = isinstance(session.spec, TrainingSpec) and session.spec.loader == "unsloth"
        others = import_unsloth(Path(session.cache)) if with_unsloth else {}  # before any other library
        events.append(Started(pid=os.getpid(), versions={**_versions(peers), **others}))
        if with_unsloth:
            session.say(NOTICE)
        manifest = run(session)
        if peers.leads:
            copies = Mirroring(session)
            for artifact in manifest.artifacts:
                copies.keep(artifact)
            copies.finish()
            write_atomic(folder.manifest, manifest)
        if report is not None:
            report(End(peers.rank, "completed"))
        return COMPLETED
    except Stopped as stopped:
        tell(End(peers.rank, "stopped", step=stopped.step), Cancelled(step=stopped.step), str(stopped))
        return STOPPED
    except Exception as error:  # noqa: BLE001  the entry: every end is told to the outside
        reason, name, trace = _reason(error), type(error).__name__, is_of_a_lost_peer(error)
        end = End(peers.rank, "failed", reason, name, trace)
        tell(end, Failed(reason=reason, error=name), traceback.format_exc())
        return FAILED
    finally:
        with suppress(OSError):
            events.close()


def _last_words(events: EventLog, event: Cancelled | Failed, text: str) -> None:
    """How it ended, as far as there is room: on a full disk the exit code alone tells, and the supervisor finds why."""
    with suppress(OSError):
        events.append(event)
    with suppress(OSError):
        print(text.rstrip(), file=sys.stderr, flush=True)


def _versions(peers: Peers) -> dict[str, str]:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // peers.local_size))
        if peers.size > 1:  # accelerate 1.15 would count the machine's cores instead
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name(peers.local_rank) if gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    if peers.size > 1:
        device = f"{peers.size} x {device}"
    if peers.nodes > 1:
        device = f"{device}, on {peers.nodes} machines"
    return {"python": platform.python_version(), **versions, "device": device}


def _cores() -> int:
    """Cores this process may use: its affinity, and its control group's share of time (cgroup v2)."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def _reason(error: Exception) -> str:
    """What a person is told; the traceback stands in output.log."""
    if isinstance(error, MoeError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if _out_of_memory(error):
        return (
            f"out of memory ({text.splitlines()[0]}). Try a smaller training.batch_size with more "
            "training.gradient_accumulation_steps, a smaller options.max_length, "
            "efficiency.enable_activation_checkpointing, or an adapter"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error}); what was saved before is whole"
    return text


def _out_of_memory(error: Exception) -> bool:
    # By name: torch may not have been imported when something failed. A CPU's allocator raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def be_quiet(folder: JobFolder) -> None:
    """Tell the libraries, before they are imported, to draw nothing and where the job's tokenised rows go."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_DATASETS_CACHE", str(folder.root / "cache"))


def flush() -> None:
    """Write out what was printed, as far as the disk has room."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def main(arguments: list[str]) -> int:
    """Command line: the job's folder."""
    if len(arguments) != 1:
        print("usage: python -m llama_stack_provider_moe.training.main FOLDER", file=sys.stderr)
        return 2
    folder = JobFolder(Path(arguments[0]).resolve())
    be_quiet(folder)
    try:
        size = folder.read_spec().resources.ranks
    except (OSError, ValueError):
        size = 1  # which says what is wrong with it
    return train(folder) if size == 1 else train_together(folder, size)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # All that is to last is on disk by now. Taking torch's and transformers' modules down one by one takes long, and
    # the job's end would only be known after that.
    flush()
    os._exit(code)
