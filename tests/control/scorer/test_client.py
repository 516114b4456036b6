"""The server's side of a scorer: each way to fail, within the deadline, and back to work."""

import asyncio
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.scorer.client import ScorerClient
from llama_stack_provider_moe.control.supervisor.processes import birth
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.shields.scorer_settings import ScorerSettings
from llama_stack_provider_moe.shields.scorer_wire import MOST_BYTES, SOCKET_NAME
from llama_stack_provider_moe.shields.scores import Score, ScorerFailed
from tests.support.jobs_support import wait_for
from tests.support.probe_cards import write_card

NAMES = ("fine", "stuck", "silent", "dies", "wrong", "short")
CALM, LOUD = [{"role": "user", "content": "all is calm"}], [{"role": "user", "content": "LOUD AND CLEAR"}]
Made = Callable[..., ScorerClient]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """Makes clients, each with a tiny scorer, in one folder with a name longer than a socket's may be."""
    write_card(tmp_path / "probe")
    folder = tmp_path / ("a" * 120)
    clients: list[ScorerClient] = []

    def make(environment: dict[str, str] | None = None, **settings: Any) -> ScorerClient:
        probes = dict.fromkeys(NAMES, str(tmp_path / "probe"))
        asked = {"probes": probes, "ping_s": 0.05, "hung_after_s": 3, "queue": 4} | settings
        client = ScorerClient(
            ScorerSettings.model_validate(asked), folder, {**os.environ, **(environment or {})},
            module="tests.support.tiny_scorer",
        )  # fmt: skip
        clients.append(client)
        client.start()
        return client

    yield make
    for client in clients:
        client.close()


def ready(client: ScorerClient) -> None:
    wait_for(lambda: client.keeper.health().status == "ready")


def failure(client: ScorerClient, probe: str, deadline_s: float = 20, conversations: Any = (CALM,)) -> ScorerFailed:
    with pytest.raises(ScorerFailed) as caught:
        asyncio.run(client.score(probe, conversations, deadline_s))
    return caught.value


def test_scores_health_and_the_socket(made: Made) -> None:
    client = made()
    ready(client)
    assert asyncio.run(client.score("fine", [CALM, LOUD], 20)) == [Score(0.0, 0.5, 3), Score(12 / 14, 0.5, 3)]
    assert asyncio.run(client.score("fine", [], 20)) == []
    found = asyncio.run(client.health())
    assert (found.status, found.probes, found.waiting, found.restarts) == ("ready", ("fine",), 0, 0)
    assert found.detail == "probe 'bad' is refused: it is bad"
    (folder,) = (path for path in Path(client.keeper._folder).parent.iterdir() if path.name.startswith("aaa"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / SOCKET_NAME).is_socket()


def test_a_second_server_uses_the_same_process_and_takes_over(made: Made) -> None:
    first = made()
    ready(first)
    second = made()
    ready(second)
    assert first.keeper.process is not None
    assert second.keeper.process is None
    pid = first.keeper.process.pid
    assert asyncio.run(second.score("fine", [LOUD], 20))[0].is_flagged
    first.close()
    assert birth(pid) is None
    wait_for(lambda: second.keeper.process is not None)
    ready(second)
    assert asyncio.run(second.score("fine", [CALM], 20)) == [Score(0.0, 0.5, 3)]


def test_killed_is_down_at_once_and_back_later(made: Made) -> None:
    client = made()
    ready(client)
    assert client.keeper.process is not None
    os.kill(client.keeper.process.pid, signal.SIGKILL)
    assert failure(client, "fine").reason == "down"
    wait_for(lambda: client.keeper.health().status == "down")
    assert "killed by SIGKILL" in client.keeper.health().detail
    ready(client)
    assert client.keeper.health().restarts == 1
    assert failure(client, "dies").reason == "down"


def test_hung_is_a_deadline_and_then_replaced(made: Made) -> None:
    client = made(hung_after_s=1)
    ready(client)
    assert client.keeper.process is not None
    pid = client.keeper.process.pid
    began_s = time.monotonic()
    assert failure(client, "silent", 0.3).reason == "deadline"
    assert time.monotonic() - began_s < 5, "a limit for what never happens"
    wait_for(lambda: client.keeper.health().restarts == 1)
    assert "it hangs: it did not answer for 1 s" in client.keeper.health().detail
    assert birth(pid) is None
    ready(client)
    os.kill(client.keeper.process.pid, signal.SIGSTOP)
    assert failure(client, "fine", 0.3).reason == "deadline"
    wait_for(lambda: client.keeper.health().restarts == 2)


def test_more_than_the_queue_holds_is_overloaded_at_once_and_the_loop_goes_on(made: Made) -> None:
    client = made(queue=4)
    ready(client)

    async def crowd() -> tuple[list[str], int]:
        waiting = [asyncio.create_task(client.score("stuck", [CALM, CALM], 2)) for _ in range(2)]
        await asyncio.sleep(0)
        turns = 0
        with pytest.raises(ScorerFailed) as caught:
            await client.score("fine", [CALM], 2)
        assert (await client.health()).waiting == 4
        while not all(task.done() for task in waiting):
            await asyncio.sleep(0.01)
            turns += 1
        reasons: list[str] = [caught.value.reason]
        for task in waiting:
            error = task.exception()
            assert isinstance(error, ScorerFailed)
            reasons.append(error.reason)
        return reasons, turns

    reasons, turns = asyncio.run(crowd())
    assert reasons == ["overloaded", "deadline", "deadline"]
    assert turns > 20, "the event loop was held"
    assert asyncio.run(client.score("fine", [CALM] * 4, 20)) == [Score(0.0, 0.5, 3)] * 4, "they no longer count"


def test_nobody_fills_the_queue_alone(made: Made) -> None:
    client = made(queue=8)
    ready(client)

    async def crowd() -> str:
        waiting = [asyncio.create_task(client.score("stuck", [CALM, CALM], 1, "ann")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(
            ScorerFailed, match="4 conversations of this caller wait already, and at most 4 may"
        ) as caught:
            await client.score("fine", [CALM], 1, "ann")
        others = [asyncio.create_task(client.score("stuck", [CALM], 1, owner)) for owner in ("bob", None, None)]
        await asyncio.sleep(0)
        assert (await client.health()).waiting == 7
        await asyncio.wait([*waiting, *others])
        for task in (*waiting, *others):
            error = task.exception()
            assert isinstance(error, ScorerFailed)
            assert error.reason == "deadline"
        return caught.value.reason

    assert asyncio.run(crowd()) == "overloaded"
    assert not client._of_owner, "what no longer waits no longer counts"
    assert len(asyncio.run(client.score("fine", [CALM] * 8, 20, "ann"))) == 8, "a first request may take more"


@pytest.mark.parametrize(("settings", "expected"), [({"queue": 1}, 1), ({"queue": 9}, 4), ({"queue_of_owner": 3}, 3)])
def test_the_part_of_the_queue_that_one_caller_may_fill(made: Made, settings: dict[str, int], expected: int) -> None:
    assert made(**settings)._most_of_owner == expected


def test_one_that_never_starts_is_down_and_tried_again_later_and_later(made: Made) -> None:
    client = made({"TINY_SCORER_ENDS": "1"})
    wait_for(lambda: client.keeper.health().restarts == 2)
    found = client.keeper.health()
    assert (found.status, "exit code 1" in found.detail, "in 2 s" in found.detail) == ("down", True, True)
    assert failure(client, "fine").reason == "down"
    assert "it ends at once" in (client.keeper._folder / "scorer.log").read_text()


def test_no_such_interpreter_is_down(made: Made) -> None:
    client = made(python="/nowhere/python")
    wait_for(lambda: client.keeper.health().status == "down")
    assert "could not be started" in client.keeper.health().detail


def test_what_is_refused_and_what_can_not_be_read(made: Made) -> None:
    client = made()
    ready(client)
    assert failure(client, "other").reason == "refused"
    assert failure(client, "fine", conversations=[CALM] * 257).reason == "refused"
    huge = [{"role": "user", "content": "a" * (MOST_BYTES + 1)}]
    assert failure(client, "fine", conversations=[huge]).reason == "refused"
    assert failure(client, "fine", conversations=[[{"role": "user", "content": None}]]).reason == "refused"
    assert failure(client, "fine", conversations=[[{"role": "user", "content": "\ud800"}]]).reason == "refused"
    assert failure(client, "fine", deadline_s=0).reason == "deadline"
    assert failure(client, "wrong").reason == "down"
    assert failure(client, "short").reason == "down"
    assert asyncio.run(client.score("fine", [CALM], 20)) == [Score(0.0, 0.5, 3)]


def test_a_probe_that_can_not_be_used_is_refused_at_the_door(tmp_path: Path) -> None:
    write_card(tmp_path / "few", negatives=7)
    settings = ScorerSettings(probes={"few": str(tmp_path / "few")})
    with pytest.raises(InvalidInput, match=r"probes\.few: 7 is not valid; expected a probe with at least 100"):
        ScorerClient(settings, tmp_path / "scorer", {})


@pytest.mark.parametrize("probes", [{}, {"a b": "x"}, {"a": ""}, {f"p{number}": "x" for number in range(17)}])
def test_settings_that_are_not_valid(probes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"expected (a folder of )?1 to"):
        ScorerSettings(probes=probes)
