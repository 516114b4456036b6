"""A job's driver on a Ray cluster: a Ray job.

    python -m llama_stack_provider_moe.compute.worker.ray.group FOLDER RUN

It reserves the nodes (a placement group: all or none, each on a separate machine). An actor on each node starts the
node's processes (`actor`, `node`). The driver copies their output, and decides by the ends on all nodes how the job
ended. Exit codes are those of `compute.worker.main`. Neither this process nor Ray tries anything again; the supervisor
does, from the checkpoint.

We don't use Ray Train's TorchTrainer (2.60):

- It runs the training function in a thread, where no signal handler runs, so a job that is stopped would save nothing.
- It says which worker failed first, but not which was killed and which only lost its peer.
- Its processes import the libraries one by one; ours are forked from a process that has imported them.
- It keeps its own checkpoints and results beside the job's.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llama_stack_provider_moe.compute.worker import main as entry
from llama_stack_provider_moe.compute.worker.process_group import GRACE_S, End, Ends, Verdict, verdict
from llama_stack_provider_moe.compute.worker.ray.actor import Node, NodeReport
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.ground.private import take_umask
from llama_stack_provider_moe.jobdir.cluster_run import FENCE_S, RUN_FILE, ClusterRun, read_run
from llama_stack_provider_moe.jobdir.events import EventLog, Message, Progress
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.blocks import Resources

_LOOK_S = 1.0
# How often a job that waits for its nodes gives a sign of life. The supervisor stops jobs that give none.
TELL_S = 60.0
# Longer than the grace period that a node's leader gives its processes.
NODE_GRACE_S = GRACE_S + 15.0


class Refused(Exception):
    """The job can't run on this cluster; the text tells the user why."""


class StoppedEarly(Exception):
    """The job was asked to stop before any process started."""


class Replaced(Exception):
    """This run is no longer the job's current one, so it must not write anything."""


class Driver:
    """One run of one job.

    Args:
        folder: the job's.
        mine: this run.
        resources: the job's, from its spec.
    """

    def __init__(self, folder: JobFolder, mine: ClusterRun, resources: Resources) -> None:
        self._folder = folder
        self._mine = mine
        self._began = time.monotonic()
        self._nodes = resources.nodes
        self._size = resources.ranks_a_node
        self._gpus = resources.gpus
        self._actors: list[ActorHandle] = []
        self._addresses: list[str] = []

    def run(self) -> Verdict:
        """Reserve the nodes, start the processes, and wait until all have ended."""
        if self._gpus is None:
            self._gpus = int(ray.cluster_resources().get("GPU", 0) >= 1)
        group = self._reserve()
        strategy = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in range(self._nodes)
        ]
        actor = ray.remote(Node)
        self._actors = [
            actor.options(num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy=each).remote()
            for each in strategy
        ]
        self._addresses = self._all("address")
        self._begin()
        return self._watch()

    @property
    def _cpus(self) -> int:
        return self._size * self._mine.cpus_per_process

    def _reserve(self) -> PlacementGroup:
        bundle: dict[str, float] = {"CPU": self._cpus, **({"GPU": self._gpus} if self._gpus else {})}
        each = " and ".join(number_of(int(count), what) for what, count in bundle.items())
        wanted = f"{number_of(self._nodes, 'node')} with {each} each"
        group = placement_group([bundle] * self._nodes, strategy="STRICT_SPREAD")
        tell_at = 0.0
        while not group.wait(_LOOK_S):
            self._check_run()
            waited_s = time.monotonic() - self._began
            if 0 < self._mine.placement_s <= waited_s:
                raise Refused(
                    f"the Ray cluster had no room for {wanted} within {self._mine.placement_s:g} s "
                    f"(`executors.ray.placement_s`); it has {_has()}"
                )
            if waited_s >= tell_at:
                tell_at = waited_s + TELL_S
                self._say(f"waiting for the Ray cluster to have {wanted} free; it has {_has()}")
        return group

    def _begin(self) -> None:
        root, run = str(self._folder.root), self._mine.run
        problems = [problem for problem in self._all("sees", root, run) if problem]
        if problems:
            raise Refused("; ".join(problems))
        host, port = self._addresses[0], 0
        if self._nodes > 1:
            (port,) = self._get([self._actors[0].listen.remote()])
        # The processes of an earlier run notice within a second that they were replaced.
        while (left_s := FENCE_S - (time.monotonic() - self._began)) > 0:
            self._check_run()
            time.sleep(min(left_s, _LOOK_S))
        self._check_run()
        where = ", ".join(self._addresses)
        processes = number_of(self._size, "process", "processes")
        print(f"on Ray: {number_of(self._nodes, 'node')} ({where}), {processes} each", flush=True)
        gpus = self._gpus or 0
        self._get([
            actor.begin.remote(root, run, node, self._nodes, self._size, host, port, gpus)
            for node, actor in enumerate(self._actors)
        ])  # fmt: skip

    def _watch(self) -> Verdict:
        """Copy the output of all processes until they have ended, and decide how the job ended."""
        looks = {actor.look.remote(): node for node, actor in enumerate(self._actors)}
        ended: list[Ends] = []
        deadline: float | None = None
        while looks:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if left_s == 0.0:
                for node in looks.values():
                    print(f"node {self._name(node)} did not end with the others, and was killed", flush=True)
                    ray.kill(self._actors[node])
                break
            done, _ = ray.wait(list(looks), num_returns=1, timeout=left_s)
            for reference in done:
                node = looks.pop(reference)
                ends = self._look(reference, node)
                if ends is None:
                    looks[self._actors[node].look.remote()] = node
                    continue
                ended.append(ends)
                bad = ends.killed or any(end.kind != "completed" for end in ends.said)
                if deadline is None and (bad or node == 0):
                    deadline = time.monotonic() + NODE_GRACE_S
        said = tuple(end for ends in ended for end in ends.said)
        killed = {rank: number for ends in ended for rank, number in ends.killed.items()}
        return verdict(said, killed, any(ends.asked_to_stop for ends in ended), self._size * self._nodes)

    def _look(self, reference: ray.ObjectRef, node: int) -> Ends | None:
        """How a node's processes ended; None while they run."""
        try:
            look: NodeReport = ray.get(reference)
        except ActorUnavailableError as error:  # a network problem, or a lost node: later calls tell which
            print(f"node {self._name(node)} does not answer at the moment: {_line(error)}", flush=True)
            time.sleep(_LOOK_S)
            return None
        except RayActorError as error:
            print(f"node {self._name(node)} was lost: {_line(error)}", flush=True)
            return Ends((), {node * self._size: signal.SIGKILL}, False)
        with suppress(OSError):  # a full disk
            os.write(1, look.output)
        return look.ends

    def _name(self, node: int) -> str:
        return f"{node} of {self._nodes} ({self._addresses[node]})"

    def _all(self, method: str, *arguments: str) -> list[Any]:  # whatever the method returns
        references = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        with liveness.stage("waiting for the Ray cluster's nodes", len(references), "nodes") as counter:

            def count(answered: int) -> None:
                if answered != counter.work.done:  # a node that hangs gives no sign of life
                    counter.at(answered)

            return self._get(references, count)

    def _get(self, references: list[ray.ObjectRef], count: Callable[[int], None] = lambda _: None) -> list[Any]:
        """Wait for results and return them.

        Args:
            references: one for each result.
            count: called at least once a second with the number of results that have arrived.

        Raises:
            Replaced, StoppedEarly: the supervisor's wish, see `_check_run`.
        """
        left = references
        while left:
            _, left = ray.wait(left, num_returns=len(left), timeout=_LOOK_S)
            count(len(references) - len(left))
            self._check_run()
        return list(ray.get(references))

    def _check_run(self) -> None:
        with suppress(OSError, ValueError):  # the file server has a problem
            now = read_run(self._folder.root)
            if now is None or now.run != self._mine.run or now.wish == "kill":
                raise Replaced
            if now.wish == "stop":
                raise StoppedEarly

    def _say(self, text: str) -> None:
        # The job's processes don't write to its events yet.
        with (
            suppress(OSError),
            closing(EventLog(self._folder.events)) as events,
        ):
            events.append(Message(level="info", text=text))
        print(text, flush=True)


def drive(folder: JobFolder, mine: ClusterRun) -> int:
    """Run the job on the cluster that this process belongs to, and return the exit code.

    If a signal killed one of the job's processes, this process ends by the same signal.
    """
    found: Verdict
    try:
        resources = folder.read_spec().resources
        with cluster(), reported(folder):
            found = Driver(folder, mine, resources).run()
    except Replaced:
        print(f"run {mine.run} was replaced or killed", file=sys.stderr)
        return entry.FAILED
    except StoppedEarly:
        found = Verdict(End(0, "stopped"))
    except (OSError, ValueError, Refused) as error:
        found = Verdict(End(0, "failed", str(error), type(error).__name__))
    except RayActorError as error:  # before any process started
        print(f"a node was lost: {error}", flush=True)
        found = Verdict(None, signal.SIGKILL)
        if error.actor_init_failed:  # it would fail on every node
            reason = f"a node can't be used; is this package installed there with its extra `ray`? {_line(error)}"
            found = Verdict(End(0, "failed", reason, type(error).__name__))
    except RayError as error:
        found = Verdict(End(0, "failed", f"Ray: {_line(error)}", type(error).__name__))
    return entry.conclude(folder, found)


@contextmanager
def reported(folder: JobFolder) -> Iterator[None]:
    """Write what the driver waits for to the job's events. The job's processes don't write there yet."""

    def write(work: liveness.Work) -> None:
        with suppress(OSError), closing(EventLog(folder.events)) as events:
            events.append(Progress(stage=work.stage, done=work.done, total=work.total, unit=work.unit))

    with liveness.reports_to(write):
        yield


@contextmanager
def cluster() -> Iterator[None]:
    """Connect to the cluster that runs this process as a job (RAY_ADDRESS)."""
    ray.init(log_to_driver=False, logging_level="warning")
    # Ray's handler would hide the signal behind an exit code.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        ray.shutdown()


def _has() -> str:
    total = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    cpus, gpus = (number_of(int(total.get(what, 0)), what) for what in ("CPU", "GPU"))
    return f"{number_of(nodes, 'node')}, {cpus} and {gpus} in all"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def main(arguments: list[str]) -> int:
    """Run the job in the folder that the command line names, with the name of the run; its exit code."""
    if len(arguments) != 2:
        print("usage: python -m llama_stack_provider_moe.compute.worker.ray.group FOLDER RUN", file=sys.stderr)
        return 2
    root, run = Path(arguments[0]), arguments[1]
    mine = read_run(root)
    if mine is None:
        print(f"the Ray cluster's driver does not see {root / RUN_FILE}: `state_dir` has to be a path that "
              "every node of the cluster shares with the server", file=sys.stderr)  # fmt: skip
        return entry.FAILED
    if mine.run != run:
        print(f"run {run} of {root} was replaced by {mine.run}", file=sys.stderr)
        return entry.FAILED
    folder = JobFolder(root)
    output = os.open(folder.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for target in (1, 2):
        os.dup2(output, target)
    os.close(output)
    return drive(folder, mine)


if __name__ == "__main__":
    take_umask(os.environ)
    code = main(sys.argv[1:])
    entry.flush()
    os._exit(code)
