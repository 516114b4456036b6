"""Balance of experts over the steps: thinned, without undone steps, and read from where each table is."""

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.progress import balance
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.events import EventLog, Message, Resumed, Routing
from llama_stack_provider_moe.jobdir.routing_figures import figures_of
from tests.support.dashboard_jobs import EXPERTS, LAYERS, routing
from tests.support.host_support import ask, folder_of, serving_in_process, submit


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("routing")) as made:
        submit(made, job_uuid="j")
        yield made


@pytest.fixture
def events(service: PostTrainingService) -> Path:
    path = folder_of(service, "j").events
    path.unlink(missing_ok=True)
    return path


def write(path: Path, *found: Any) -> list[Routing]:
    """Append events; a number is the routing of that step, and a negative number a resumption from that step."""
    rng = random.Random(0)
    made = []
    log = EventLog(path)
    for each in found:
        event = Resumed(step=-each, checkpoint="c") if isinstance(each, int) and each <= 0 else each
        if isinstance(event, int):
            event = routing(event, rng, {1: {4}})
            made.append(event)
        log.append(event)
    log.close()
    return made


def series(service: PostTrainingService, **query: Any) -> dict[str, Any]:
    answer = ask(service, "GET", "/jobs/j/routing", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_tables_of_layers_and_of_one_layers_experts(service: PostTrainingService, events: Path) -> None:
    made = write(events, 1, 2, 3)
    found = series(service, layer=1)
    assert found["steps"] == found["share_steps"] == [1, 2, 3]
    assert (found["layers"], found["experts"], found["layer"]) == (list(range(LAYERS)), EXPERTS, 1)
    for column, event in enumerate(made):
        for row, layer in enumerate(event.layers):
            assert found["cv"][row][column] == layer.cv
            assert found["largest"][row][column] == layer.max
            assert found["dead"][row][column] == layer.dead
        assert [expert[column] for expert in found["share"]] == event.layers[1].share
    assert found["share"][4] == [0, 0, 0]
    assert series(service)["layer"] == 0


def test_undone_steps_are_hidden(service: PostTrainingService, events: Path) -> None:
    made = write(events, 1, 2, 3, 4, -2, 3)
    found = series(service)
    assert found["steps"] == [1, 2, 3]
    assert found["cv"][0][2] == made[-1].layers[0].cv
    write(events, 0, 1)
    assert series(service)["steps"] == [1]


@pytest.mark.parametrize("limit", [1, 2, 7, 50])
def test_long_series_are_thinned_evenly_to_the_last_step(
    service: PostTrainingService, events: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(events, *range(1, 41))
    parsed: list[int] = []
    real = Routing.model_validate_json
    monkeypatch.setattr(Routing, "model_validate_json", lambda text: parsed.append(1) or real(text))
    steps = series(service, limit=limit)["steps"]
    assert len(steps) == min(limit, 40)
    assert steps[-1] == 40
    assert len(parsed) == len(steps), "no other table is parsed"
    if limit == 7:
        gaps = [after - before for before, after in pairwise(steps)]
        assert max(gaps) - min(gaps) <= 1


def without_tables(step: int, steps: int = 1, has_tables: bool = False) -> Routing:
    """The event of a step with figures of each layer; `steps` that its tables cover, if it has any."""
    whole = routing(step, random.Random(step), {1: {4}})
    return whole.model_copy(update={
        "layers": whole.layers if has_tables else [], "steps": steps, "by_layer": figures_of(whole.layers)
    })  # fmt: skip


def test_every_step_has_figures_and_some_have_tables(service: PostTrainingService, events: Path) -> None:
    written = [without_tables(step, 3, has_tables=step % 3 == 0) for step in range(1, 9)]
    write(events, *written)
    found = series(service, layer=1)
    assert (found["steps"], found["share_steps"]) == (list(range(1, 9)), [3, 6])
    assert [len(row) for row in (*found["cv"], *found["dead"], *found["largest"])] == [8] * 3 * LAYERS
    assert found["dead"][1] == [1] * 8, "also where there is no table"
    assert [row[1] for row in found["share"]] == written[5].layers[1].share
    write(events, -4)
    found = series(service)
    assert (found["steps"], found["share_steps"]) == ([1, 2, 3, 4], [3]), "undone"
    write(events, without_tables(3))
    assert (series(service)["share_steps"], len(series(service)["share"])) == ([], EXPERTS), "repeated without a table"


def test_the_status_of_a_step_without_tables_has_the_same_figures(service: PostTrainingService, events: Path) -> None:
    write(events, without_tables(1), without_tables(2))
    found = balance(without_tables(2))
    assert found == {"step": 2, **(balance(routing(2, random.Random(2), {1: {4}})) or {})}
    assert found["dead_experts"] == 1
    assert (found["layers"], found["experts"]) == (LAYERS, EXPERTS)


def test_texts_that_quote_a_table_and_cut_lines_are_skipped(service: PostTrainingService, events: Path) -> None:
    write(events, 1, Message(text='"type":"routing","step":99'), 2)
    with events.open("ab") as file:
        file.write(b'{"time":"2026-01-01T00:00:00Z","type":"routing","step":3,"layers":[{"la\n')
    write(events, 4)
    assert series(service)["steps"] == [1, 2, 4]


def test_a_dense_model_and_a_job_without_events_have_none(service: PostTrainingService, events: Path) -> None:
    nothing = {"steps": [], "layers": [], "experts": 0, "layer": None, "share_steps": [], "share": [], "cv": [],
               "dead": [], "largest": []}  # fmt: skip
    assert series(service) == {"job_uuid": "j", **nothing}
    write(events, Routing(step=1, layers=[]))
    assert series(service) == {"job_uuid": "j", **nothing}


def test_a_layer_without_experts_is_refused(service: PostTrainingService, events: Path) -> None:
    write(events, 1)
    answer = ask(service, "GET", "/jobs/j/routing", params={"layer": 99})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("layer: 99 is not valid; expected a layer with experts: 0, 1")
