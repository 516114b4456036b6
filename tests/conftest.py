"""Limits and order of all tests, and fixtures of the jobs room; a file with other needs has its own of that name."""

import gc
import random
import signal
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import job_folders, small_disk, tiny_config
from tests.support.postgres_server import new_store_urls

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As below a shell that runs this in the background; programs that tests start and interrupt would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
ANSWERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

SLOW_LIMIT_S = 7200
MODELS = ("family", "model_type")  # names of parameters that are a kind of model
FEW = 3  # of them are enough for one test in `make test`
SYSTEM = Path(__file__).parent / "system"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get more time than `timeout` in pyproject.toml, which is for those of `make test`.

    Those of whole systems come first: their files take minutes, and at the end of a run one process would still be busy
    with the last of them while the others have nothing left.
    """
    items.sort(key=lambda item: not item.path.is_relative_to(SYSTEM))
    widen(items)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT_S))


def widen(items: list[pytest.Item]) -> None:
    """Mark as `wide` a test of many kinds of models for all but a few of them; which, differs from test to test.

    A fault of a law shows with most models, and a fault with one model in most laws: so each is tested, but not each
    with each. The choice is always the same.
    """
    cases: dict[str, dict[str, list[pytest.Function]]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not item.path.is_relative_to(SYSTEM):
            test = f"{item.path.name}::{item.originalname}"
            for name in item.callspec.params.keys() & set(MODELS):
                cases.setdefault(test, {}).setdefault(str(item.callspec.params[name]), []).append(item)
    for test, models in cases.items():
        left_out = sorted(models, key=lambda model: sha256(f"{test} {model}".encode()).digest())[
            max(FEW, len(models) // 10) :
        ]
        for item in (item for model in left_out for item in models[model]):
            item.add_marker(pytest.mark.wide)


def pytest_configure(config: pytest.Config) -> None:
    """Only where the results of all processes come together, and are written."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(NamedFailures(config))


class NamedFailures:
    """Names each failed test when it fails: a run that is stopped never comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """With the last line of what was raised."""
        if report.failed and (terminal := self.config.pluginmanager.get_plugin("terminalreporter")):
            reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") or ""
            terminal.write("\n")  # progress is written past its own count of the line
            terminal.write_line(f"FAILED {report.nodeid} in its {report.when}: {reason[:500]}")


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """What is there before a file's tests stays: the libraries' objects, a million with torch and TRL.

    A full collection would look at each of them, and one training run asks for several.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries report as leaked what is still there when the process ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Each test begins with the same random numbers, whatever ran before it; those without torch need not load it."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals_as_at_first() -> Iterator[None]:
    """A test or fixture that leaves its own answer to a signal fails; a later test that sends it would wait forever."""
    yield
    left = {number: signal.getsignal(number) for number in ANSWERS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & ANSWERS.keys()
    if left != ANSWERS or blocked:
        for number, answer in ANSWERS.items():
            signal.signal(number, answer)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        pytest.fail(f"left behind: {left}, blocked: {blocked}; at first: {ANSWERS}")


@pytest.fixture
def root() -> Iterator[Path]:
    with job_folders() as folder:
        yield folder


@pytest.fixture
def config(root: Path) -> ProviderConfig:
    """A provider whose training processes are tiny children."""
    return tiny_config(root)


@pytest.fixture
def store(config: ProviderConfig) -> Iterator[JobStore]:
    store = JobStore(config.url)
    yield store
    store.close()


@pytest.fixture
def supervisor(store: JobStore, config: ProviderConfig) -> Supervisor:
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    return supervisor


@pytest.fixture(scope="module")
def new_postgres_url() -> Iterator[Callable[[], str]]:
    with new_store_urls() as new_url:
        yield new_url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """Of a new store; every law of the store holds on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{request.getfixturevalue('root')}/jobs.db"
    return str(request.getfixturevalue("new_postgres_url")())


@pytest.fixture
def small(root: Path) -> Iterator[Path]:
    """A folder on a small disk of its own, which is soon full."""
    folder = root / "small"
    folder.mkdir()
    with small_disk(folder):
        yield folder
