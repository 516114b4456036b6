"""A job's driver on a Ray cluster: `python -m llama_stack_provider_moe.training.on_ray FOLDER RUN`, as a Ray job.

It reserves the nodes (a placement group: all or nothing, each on a machine of its own), has an actor on each start the
node's processes (`ray_node`, `node`), passes their output on, and judges by all nodes' ends what the job's end was.
Exit codes as of `training.main`; nothing is tried again here or by Ray: the supervisor does, from the checkpoint.

Ray Train's TorchTrainer (2.60) is not used. It runs the training function in a thread, where no signal can be heeded,
so that a job that is stopped would save nothing; it says which worker failed first, not which was killed and which
merely lost its peer; its processes import the libraries one by one, where ours are forked from one that has them; and
it keeps checkpoints and results of its own beside the job's.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llama_stack_provider_moe.jobs.cluster_run import FENCE_S, RUN_FILE, ClusterRun, read_run
from llama_stack_provider_moe.jobs.events import EventLog, Message
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.spec.blocks import Resources
from llama_stack_provider_moe.training import main as entry
from llama_stack_provider_moe.training.launch import GRACE_S, End, Ends, Verdict, verdict
from llama_stack_provider_moe.training.ray_node import Look, Node

_LOOK_S = 1.0
# A job that waits for its nodes gives this often a sign of life: the supervisor stops what gives none.
TELL_S = 300.0
# Beyond what a node's leader gives its own processes, for nodes that notice nothing.
NODE_GRACE_S = GRACE_S + 15.0


class Refused(Exception):
    """The job can't be run on this cluster; why is for a person."""


class StoppedEarly(Exception):
    """Asked to stop before any process began."""


class Replaced(Exception):
    """Another run of the job counts, or none: this one has nothing more to say."""


class Driver:
    """One run of one job.

    Args:
        folder: the job's.
        mine: the run.
        resources: what the job needs.
    """

    def __init__(self, folder: JobFolder, mine: ClusterRun, resources: Resources) -> None:
        self._folder = folder
        self._mine = mine
        self._began = time.monotonic()
        self._nodes = resources.nodes
        self._size = resources.ranks_a_node
        self._gpus = resources.gpus
        self._actors: list[Any] = []
        self._addresses: list[str] = []

    def run(self) -> Verdict:
        """From reserving nodes to the end of all processes."""
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
        each = " and ".join(f"{count} {what}(s)" for what, count in bundle.items())
        wanted = f"{self._nodes} node(s) with {each} each"
        group = placement_group([bundle] * self._nodes, strategy="STRICT_SPREAD")
        tell_at = 0.0
        while not group.wait(_LOOK_S):
            self._heed()
            waited_s = time.monotonic() - self._began
            if 0 < self._mine.placement_s <= waited_s:
                raise Refused(
                    f"the Ray cluster had no room for {wanted} within {self._mine.placement_s:g} s "
                    f"(`executors.ray.placement_s`); it has {_has()}"
                )
            if waited_s >= tell_at:
                tell_at = waited_s + TELL_S
                self._say(f"waits for {wanted} of the Ray cluster, which has {_has()}")
        return group

    def _begin(self) -> None:
        root, run = str(self._folder.root), self._mine.run
        problems = [problem for problem in self._all("sees", root, run) if problem]
        if problems:
            raise Refused("; ".join(problems))
        host, port = self._addresses[0], 0
        if self._nodes > 1:
            (port,) = self._get([self._actors[0].listen.remote()])
        # Those of the run before see within a second that they were replaced.
        while (left_s := FENCE_S - (time.monotonic() - self._began)) > 0:
            self._heed()
            time.sleep(min(left_s, _LOOK_S))
        self._heed()
        where = ", ".join(self._addresses)
        print(f"on Ray: {self._nodes} node(s) ({where}), {self._size} process(es) each", flush=True)
        gpus = self._gpus or 0
        self._get([
            actor.begin.remote(root, run, node, self._nodes, self._size, host, port, gpus)
            for node, actor in enumerate(self._actors)
        ])  # fmt: skip

    def _watch(self) -> Verdict:
        """Pass on what the processes print, until those of every node have ended."""
        looks = {actor.look.remote(): node for node, actor in enumerate(self._actors)}
        ended: list[Ends] = []
        deadline: float | None = None
        while looks:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if left_s == 0.0:
                for node in looks.values():
                    print(f"node {self._name(node)} did not end with the others, and is killed", flush=True)
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

    def _look(self, reference: Any, node: int) -> Ends | None:
        """What a look at a node found: None while its processes run."""
        try:
            look: Look = ray.get(reference)
        except ActorUnavailableError as error:  # the network; Ray says later which it was
            print(f"node {self._name(node)} does not answer just now: {_line(error)}", flush=True)
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

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._get([getattr(actor, method).remote(*arguments) for actor in self._actors])

    def _get(self, references: list[Any]) -> list[Any]:
        """Their results, heeding wishes meanwhile."""
        left = references
        while left:
            _, left = ray.wait(left, num_returns=len(left), timeout=_LOOK_S)
            self._heed()
        return list(ray.get(references))

    def _heed(self) -> None:
        with suppress(OSError, ValueError):  # a file server that hiccups
            now = read_run(self._folder.root)
            if now is None or now.run != self._mine.run or now.wish == "kill":
                raise Replaced
            if now.wish == "stop":
                raise StoppedEarly

    def _say(self, text: str) -> None:
        with suppress(OSError), closing(EventLog(self._folder.events)) as events:  # no process writes there yet
            events.append(Message(level="info", text=text))
        print(text, flush=True)


def drive(folder: JobFolder, mine: ClusterRun) -> int:
    """Run the job on the cluster that this process belongs to; its exit code, unless a process was killed."""
    found: Verdict
    try:
        resources = folder.read_spec().resources
        with cluster():
            found = Driver(folder, mine, resources).run()
    except Replaced:
        print(f"run {mine.run} was replaced, or is to be killed", file=sys.stderr)
        return entry.FAILED
    except StoppedEarly:
        found = Verdict(End(0, "stopped"))
    except (OSError, ValueError, Refused) as error:
        found = Verdict(End(0, "failed", str(error), type(error).__name__))
    except RayActorError as error:  # before anything began
        print(f"a node was lost: {error}", flush=True)
        found = Verdict(None, signal.SIGKILL)
        if error.actor_init_failed:  # so would the next one
            reason = f"a node can't be used: is this package with its extra `ray` there? {_line(error)}"
            found = Verdict(End(0, "failed", reason, type(error).__name__))
    except RayError as error:
        found = Verdict(End(0, "failed", f"Ray: {_line(error)}", type(error).__name__))
    return entry.conclude(folder, found)


@contextmanager
def cluster() -> Iterator[None]:
    """Connected with the cluster that runs this process as a job (RAY_ADDRESS)."""
    ray.init(log_to_driver=False, logging_level="warning")
    # Ray's own handler ends the process with an exit code of its own; what signal ended it is to be seen outside.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        ray.shutdown()


def _has() -> str:
    total = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return f"{nodes} node(s), {total.get('CPU', 0):g} CPU(s) and {total.get('GPU', 0):g} GPU(s) in all"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def main(arguments: list[str]) -> int:
    """Command line: the job's folder, and the name of the run."""
    if len(arguments) != 2:
        print("usage: python -m llama_stack_provider_moe.training.on_ray FOLDER RUN", file=sys.stderr)
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
    output = os.open(folder.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for target in (1, 2):
        os.dup2(output, target)
    os.close(output)
    return drive(folder, mine)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    entry.flush()
    os._exit(code)
