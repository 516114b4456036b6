"""A real server with a real PostgreSQL keeps answering `/health`, whatever its other requests do.

The limit is wide because other tests may run at the same time; `python -m benchmarks.overload` prints the figures.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.support import overload
from tests.support.bad_inputs import DATASETS
from tests.support.host_harness import QUICKSTART, Server, run_config, serving
from tests.support.jobs_support import wait_for
from tests.support.postgres_server import new_store_urls

pytestmark = pytest.mark.e2e

LIMIT_S = 20.0  # it took 45 s and more before the fix; alone on a machine it takes less than 1 s


@pytest.fixture(scope="module")
def new_url() -> Iterator[Callable[[], str]]:
    with new_store_urls() as made:
        yield made


@pytest.fixture(scope="module")
def store_url(new_url: Callable[[], str]) -> str:
    return new_url()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, store_url: str) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("overload")
    (folder / "models").mkdir()
    provider = {"store_url": store_url, "supervisor": {"start": False}, "allowed_roots": [str(folder / "models")]}
    with serving(run_config(QUICKSTART, folder, provider=provider), folder / "state") as running:
        running.register("words", DATASETS["words"])
        yield running


def soon(found: overload.Watched) -> None:
    print(found)
    assert found.seconds
    assert max(found.seconds) < LIMIT_S, str(found)


@pytest.mark.wide
def test_bodies_of_unknown_keys(server: Server) -> None:
    found = overload.unknown_keys(server)
    soon(found)
    assert set(found.answered) == {400}
    assert set(found.statuses) == {200}


def test_folders_of_fifos(server: Server) -> None:
    root = server.state_dir.parent / "models"
    found = overload.fifos(server, root)
    soon(found)
    assert set(found.answered) == {400}


def test_followers(server: Server) -> None:
    with server.http() as http:
        assert http.post("/jobs", json=overload.JOB | {"job_uuid": "waits"}).status_code == 200
    found = overload.followers(server, "waits")
    soon(found)
    assert found.answered == {200: 200}


def test_failing_requests(server: Server, store_url: str) -> None:
    found = overload.failing(server, store_url)
    soon(found)
    assert found.answered == {500: 100}
    text = server.log.read_text(errors="replace")
    assert "UndefinedColumn" in text
    assert "╭" not in text, "the log must not have a traceback in the host's style"


def test_a_stopped_database(server: Server, store_url: str) -> None:
    found = overload.stopped_database(server, store_url)
    soon(found)
    assert found.answered == {503: 60}
    assert found.statuses[503] > 0
    with server.http() as http:
        wait_for(lambda: http.get("/jobs").status_code == 200)


def test_a_database_that_was_shut_down(server: Server, store_url: str) -> None:
    found = overload.ended_database(server, store_url)
    soon(found)
    assert found.answered == {503: 60}
    with server.http() as http:
        answer = http.get("/health")
    assert (answer.status_code, answer.json()["store"]) == (503, "unreachable")
