"""Limits and order of all tests, and fixtures of the jobs room; a file with other needs has its own of that name."""

import gc
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import job_folders, small_disk, tiny_config
from tests.support.postgres_server import new_store_urls

SLOW_LIMIT_S = 7200
SYSTEM = Path(__file__).parent / "system"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get more time than `timeout` in pyproject.toml, which is for those of `make test`.

    Those of whole systems come first: their files take minutes, and at the end of a run one process would still be busy
    with the last of them while the others have nothing left.
    """
    items.sort(key=lambda item: not item.path.is_relative_to(SYSTEM))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT_S))


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
