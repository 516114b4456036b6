"""Make shards in several processes, and reuse those that an earlier start of the job has finished.

The helper processes come from Python's forkserver, as those that prepare batches do (`workers`). Each has a pipe to the
job's process and ends when that is closed, so none outlives its job. A helper reports each chunk of rows; nothing
reports on its behalf. The result does not depend on the number of processes.
"""

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from llama_stack_provider_moe.compute.data.row_parts import RowParts
from llama_stack_provider_moe.compute.data.shards import (
    MadeOtherwise,
    Misfit,
    Recipe,
    Shard,
    Stretch,
    Task,
    found,
    keep,
    key_of,
    make_shard,
    remove_others,
)
from llama_stack_provider_moe.ground import liveness

# Rows from which helper processes are worth their start: they import torch and the tokenizer, which takes seconds.
PARALLEL_ROWS = 16_384

Say = Callable[[str, Literal["info", "warning"]], None]
Busy = dict[Connection, tuple[BaseProcess, Task]]  # by its pipe: a helper, and the shard that it makes


@dataclass(frozen=True)
class Source:
    """One file of rows, and where its shards go.

    Attributes:
        path: the JSONL file.
        part: its name, and that of the part with all rows that are not held out.
        stretches: of the file.
        held: index of a row -> its part, for the rows of other parts.
    """

    path: Path
    part: str
    stretches: Sequence[Stretch]
    held: Mapping[int, str]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(each.count for each in self.stretches)


def make_shards(recipe: Recipe, source: Source, folder: Path, helpers: int, say: Say) -> list[tuple[Task, Shard]]:
    """The shards of a file, in its order; those that an earlier start finished are reused.

    Args:
        recipe: how rows are encoded.
        source: the rows.
        folder: for the shards.
        helpers: processes that may be used; none is started for few rows.
        say: called with lines for a person, and their level.

    Raises:
        RuntimeError: a helper process was killed, or failed.
    """
    tasks = [_task(recipe, source, stretch, folder) for stretch in source.stretches]
    remove_others(folder, source.part, tasks)
    with liveness.stage("tokenising", source.rows, "rows") as counter:
        made = _reused(tasks, counter, say)
        left = [task for task in tasks if task.name not in made]
        rows = sum(task.stretch.count for task in left)
        helpers = min(helpers, len(left)) if rows >= PARALLEL_ROWS else 1
        work = _alone(recipe, left, counter) if helpers < 2 else _together(recipe, left, counter, helpers)
        with closing(work):  # helpers end here, whatever happens to a shard
            for task, shard in work:
                keep(task, shard)
                made[task.name] = shard
    return [(task, made[task.name]) for task in tasks if task.name in made]


def first_misfit(shards: Sequence[tuple[Task, Shard]]) -> Misfit | None:
    """The first token id that the model does not have."""
    return min((shard.misfit for _, shard in shards if shard.misfit), key=lambda each: each.row, default=None)


def _task(recipe: Recipe, source: Source, stretch: Stretch, folder: Path) -> Task:
    indices = range(stretch.first, stretch.first + stretch.count)
    held: Mapping[int, str] = {index: source.held[index] for index in indices if index in source.held}
    if isinstance(source.held, RowParts):  # of all rows: a byte each instead of an entry
        held = source.held.within(indices)
    name = f"{source.part}.{stretch.number:06d}"
    return Task(source.path, stretch, folder, name, source.part, held, key_of(recipe, stretch, source.part, held))


def _reused(tasks: Sequence[Task], counter: liveness.Counter, say: Say) -> dict[str, Shard]:
    made: dict[str, Shard] = {}
    unfit: dict[tuple[type[ValueError], str], int] = {}
    for task in tasks:
        try:
            shard = found(task)
        except ValueError as error:
            reason = type(error), str(error)
            unfit[reason] = unfit.get(reason, 0) + 1
            continue
        if shard is not None:
            made[task.name] = shard
            counter.advance(task.stretch.count)
    if made:
        rows = sum(task.stretch.count for task in tasks if task.name in made)
        say(
            f"{rows:,} rows of {tasks[0].rest!r} were tokenised by an earlier start of this job; they are reused",
            "info",
        )
    for (kind, why), count in unfit.items():
        text = f"{count} of {len(tasks)} parts that an earlier start made of {tasks[0].rest!r} are {why}: made again"
        if kind is MadeOtherwise:
            say(f"{text}; a checkpoint of this job has learnt from what was there before", "warning")
        else:
            say(text, "info")
    return made


def _alone(recipe: Recipe, tasks: Sequence[Task], counter: liveness.Counter) -> Generator[tuple[Task, Shard]]:
    for task in tasks:
        shard = make_shard(recipe, task, counter.advance)
        yield task, shard
        if shard.misfit is not None:
            return


def _together(
    recipe: Recipe, tasks: Sequence[Task], counter: liveness.Counter, helpers: int
) -> Generator[tuple[Task, Shard]]:
    """Yield each shard as a helper finishes it."""
    waiting = iter(tasks)
    with _started(recipe, helpers) as started:
        busy: Busy = {}
        for connection, process in started.items():
            _hand_out(connection, process, waiting, busy)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, task = busy[ready]
                told = _told(ready, process, task)
                if isinstance(told, int):
                    counter.advance(told)
                    continue
                del busy[ready]
                if told.misfit is not None:  # earlier shards are finished, so that the first row is named
                    waiting = iter(())
                _hand_out(ready, process, waiting, busy)
                yield task, told


def _hand_out(
    connection: Connection,
    process: BaseProcess,
    waiting: Iterator[Task],
    busy: dict[Connection, tuple[BaseProcess, Task]],
) -> None:
    task = next(waiting, None)
    if task is not None:
        busy[connection] = (process, task)
        with suppress(BrokenPipeError):  # its end is read next
            connection.send(task)


def _told(connection: Connection, process: BaseProcess, task: Task) -> int | Shard:
    """What a helper says: a number of rows, or a finished shard."""
    try:
        told = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        why = "; the machine may have too little memory" if code == -signal.SIGKILL else ""
        raise RuntimeError(f"a process that tokenises rows {how}, at {task.name}{why}") from None
    if isinstance(told, OSError):
        raise told
    if isinstance(told, str):
        raise RuntimeError(f"a process that tokenises rows failed at {task.name}:\n{told}")
    assert isinstance(told, int | Shard)
    return told


@contextmanager
def _started(recipe: Recipe, count: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Helper processes by their pipes; they are killed at the end of the block."""
    context = multiprocessing.get_context("forkserver")
    packed = pickle.dumps(recipe)
    started: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_help, args=(theirs, packed), daemon=True, name="tokenising")
            process.start()
            theirs.close()
            started[ours] = process
            liveness.alive()
        yield started
    finally:
        for helper in started.values():
            helper.kill()
        for connection, helper in started.items():
            helper.join()
            connection.close()


def _help(connection: Connection, packed: bytes) -> None:
    """Make shards until the job's process closes the pipe. A request to stop is that process's to answer."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            recipe = _unpacked(packed)
            while True:
                task = connection.recv()
                connection.send(make_shard(recipe, task, connection.send))
        except (EOFError, ConnectionError):
            raise
        except OSError as error:  # a full disk
            connection.send(error)
        except Exception:  # noqa: BLE001  the job's process raises it
            connection.send(traceback.format_exc())


def _unpacked(packed: bytes) -> Recipe:
    # The class of a tokenizer with its own code is in a folder that only this call puts on Python's path.
    from transformers.dynamic_module_utils import init_hf_modules

    init_hf_modules()
    recipe = pickle.loads(packed)  # noqa: S301  from the job's own process
    assert isinstance(recipe, Recipe)
    return recipe
