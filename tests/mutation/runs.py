"""Run pytest in forks of a process that has already imported torch and other libraries, so mutants start fast.

The parent process never imports the code under test, so each fork imports it again, changed by its mutant.
"""

import importlib
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

OURS = ("llama_stack_provider_moe", "tests")
PYTEST = (
    "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "--timeout=0",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # plugins are imported before pytest starts
)  # fmt: skip
PASSED, FAILED = 0, 1
WRONG_SOURCE = 90  # exit code of a fork whose tests never imported the mutant
TOOL = 3
_EVENTS = sys.monitoring.events


@dataclass
class Baseline:
    """The results of a run on the unchanged code.

    Attributes:
        passed: whether all tests passed.
        seconds: node id -> duration of the test without its fixtures.
        lines: node id -> lines of the file that the test and its fixtures run.
        at_import: lines that run on import; they concern all tests.
        modules: imported third-party modules.
    """

    passed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, set[int]] = field(default_factory=dict)
    at_import: set[int] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)

    def tests_of(self, first: int, last: int) -> list[str]:
        """Tests that run any of these lines, the fastest first."""
        wanted = set(range(first, last + 1))
        found = [test for test, lines in self.lines.items() if wanted & lines]
        if not found and wanted & self.at_import:
            found = list(self.lines)
        return sorted(found, key=lambda test: self.seconds[test])


class _Watcher:
    """A pytest plugin that records which lines of a file each test and each fixture runs."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._stack: list[set[int]] = [set()]
        self.baseline = Baseline(at_import=self._stack[0])
        self._by_fixture: dict[tuple[str, str], set[int]] = defaultdict(set)

    def start(self) -> None:
        sys.monitoring.use_tool_id(TOOL, "mutation")
        sys.monitoring.register_callback(TOOL, _EVENTS.LINE, self._line)
        sys.monitoring.set_events(TOOL, _EVENTS.LINE)

    def _line(self, code: CodeType, line: int) -> Any:
        if code.co_filename == self._path:
            self._stack[-1].add(line)
        return sys.monitoring.DISABLE

    @contextmanager
    def _into(self, lines: set[int]) -> Iterator[None]:
        self._stack.append(lines)
        sys.monitoring.restart_events()
        try:
            yield
        finally:
            self._stack.pop()
            sys.monitoring.restart_events()

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        with self._into(self._by_fixture[fixturedef.baseid, fixturedef.argname]):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        lines: set[int] = set()
        began = time.perf_counter()
        with self._into(lines):
            result = yield
        self.baseline.seconds[item.nodeid] = time.perf_counter() - began
        for name in item.fixturenames:
            for (baseid, fixture), its in self._by_fixture.items():
                if fixture == name and item.nodeid.startswith(baseid):
                    lines |= its
        self.baseline.lines[item.nodeid] = lines
        return result


class _Loader(SourceFileLoader):
    source: str

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Loads one module from a text instead of its file."""

    def __init__(self, module: str, source: str) -> None:
        self._module, self._source = module, source

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None, fullname
        assert spec.origin is not None
        loader = _Loader(fullname, spec.origin)
        loader.source = self._source
        spec.loader = loader
        return spec


def measure(path: Path, tests: Sequence[str], limit_s: float) -> Baseline:
    """Run the tests on the unchanged file and record its lines."""

    def run() -> Baseline:
        watcher = _Watcher(path)
        watcher.start()
        code = pytest.main([*PYTEST, *tests], plugins=[watcher])
        sys.monitoring.free_tool_id(TOOL)
        baseline = watcher.baseline
        baseline.passed = code == PASSED and bool(baseline.lines)
        baseline.modules = [
            name for name, module in sys.modules.items() if name.partition(".")[0] not in OURS and _can_be_named(module)
        ]
        return baseline

    _, found = in_a_fork(run, limit_s)
    return found if isinstance(found, Baseline) else Baseline()


def _can_be_named(module: Any) -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.origin not in (None, "built-in", "frozen")


def preload(modules: Sequence[str]) -> None:
    """Import the third-party modules of a run, so that forks don't have to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            if name not in sys.modules:
                with suppress(ImportError):
                    importlib.import_module(name)
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert not threads, f"a process with threads can't be forked: {threads}"


def try_mutant(module: str, source: str, tests: Sequence[str], limit_s: float) -> int | None:
    """Run the tests with `module` loaded from `source`.

    Args:
        module: dotted name of the module.
        source: the mutant's text.
        tests: node ids.
        limit_s: time limit.

    Returns:
        pytest's exit code, or `WRONG_SOURCE`; None after the time limit.
    """

    def run() -> int:
        sys.meta_path.insert(0, _Finder(module, source))
        code = int(pytest.main([*PYTEST, *tests]))
        loaded = sys.modules.get(module)
        if code == PASSED and not (loaded is not None and isinstance(loaded.__loader__, _Loader)):
            return WRONG_SOURCE
        return code

    in_time, code = in_a_fork(run, limit_s)
    if not in_time:
        return None
    return code if isinstance(code, int) else FAILED  # a mutant may also end its process


def in_a_fork(run: Callable[[], Any], limit_s: float) -> tuple[bool, Any]:
    """Call `run` in a silent forked process with its own group; return whether it ended in time, and its result."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        nowhere = os.open(os.environ.get("MUTATION_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        outcome: Any = None
        try:
            outcome = run()
        except BaseException:  # noqa: BLE001  this process must end here, whatever the mutant does
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(outcome, pipe)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = _read(pipe.fileno(), time.monotonic() + limit_s)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if found is None:
        return False, None
    return True, pickle.loads(found) if found else None  # noqa: S301  our own fork wrote it


def _read(pipe: int, until: float) -> bytes | None:
    """Read until the pipe is closed; None if that takes too long."""
    parts = []
    while (left := until - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            part = os.read(pipe, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None
