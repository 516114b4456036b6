"""The shares of all experts over a job's last steps, which jobs are compared by."""

from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server import routing_shares
from llama_stack_provider_moe.jobdir.events import EventLog, Resumed, Routing
from llama_stack_provider_moe.jobdir.routing_figures import LayerRouting


def table(step: int, *layers: list[float]) -> Routing:
    """The routing of a step, with these shares of the experts of layers 1, 3, ..."""
    return Routing(step=step, layers=[
        LayerRouting(
            layer=2 * row + 1, share=share, min=min(share), max=max(share), cv=0.1, dead=0, load_entropy=1.0,
            token_entropy=1.0,
        )
        for row, share in enumerate(layers)
    ])  # fmt: skip


def events(tmp_path: Path, *written: Routing | Resumed) -> Path:
    log = EventLog(tmp_path / "events.jsonl")
    for event in written:
        log.append(event)
    log.close()
    return tmp_path / "events.jsonl"


def test_the_mean_of_the_last_steps_by_layer_and_expert(tmp_path: Path) -> None:
    path = events(tmp_path, *(table(step, [step / 100, 1 - step / 100], [0.5, 0.5]) for step in range(1, 21)))
    found = routing_shares.shares("j", path)
    assert found.steps == list(range(5, 21))
    assert found.layers == [1, 3]
    assert found.share[0] == pytest.approx([0.125, 0.875])
    assert found.share[1] == [0.5, 0.5]


def test_steps_that_a_resumption_undid_do_not_count(tmp_path: Path) -> None:
    path = events(
        tmp_path, table(1, [1.0, 0.0]), table(2, [0.0, 1.0]), Resumed(step=1, checkpoint="step-1"), table(2, [0.4, 0.6])
    )
    assert routing_shares.shares("j", path).steps == [1, 2]
    assert routing_shares.shares("j", path).share == [pytest.approx([0.7, 0.3])]
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    assert routing_shares.shares("j", path).share == [[1.0, 0.0]]


def test_tables_of_another_layout_are_left_out(tmp_path: Path) -> None:
    path = events(tmp_path, table(1, [0.2, 0.3, 0.5]), table(2, [0.5, 0.5]), Routing(step=3, layers=[]))
    found = routing_shares.shares("j", path)
    assert (found.steps, found.share) == ([2], [[0.5, 0.5]])


def test_a_missing_a_dense_and_a_cut_file(tmp_path: Path) -> None:
    assert routing_shares.shares("j", tmp_path / "none").share == []
    assert routing_shares.shares("j", events(tmp_path, Routing(step=1, layers=[]))).layers == []
    path = events(tmp_path, table(2, [0.5, 0.5]))
    path.write_text(path.read_text() + path.read_text().splitlines()[-1][:150] + "\n")
    assert routing_shares.shares("j", path).steps == [2]


def test_only_the_last_tables_of_a_long_file_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = events(tmp_path, *(table(step, [0.5, 0.5]) for step in range(1, 101)))
    parsed: list[int] = []
    real = Routing.model_validate_json
    monkeypatch.setattr(Routing, "model_validate_json", lambda text: parsed.append(1) or real(text))
    assert routing_shares.shares("j", path).steps == list(range(85, 101))
    assert len(parsed) == 16


def test_a_table_counts_by_the_steps_that_it_covers(tmp_path: Path) -> None:
    def covering(step: int, steps: int, *layers: list[float]) -> Routing:
        return table(step, *layers).model_copy(update={"steps": steps})

    path = events(
        tmp_path, covering(10, 10, [1.0, 0.0]), covering(20, 10, [0.0, 1.0]), Routing(step=21, layers=[]),
        covering(30, 10, [0.5, 0.5]),
    )  # fmt: skip
    found = routing_shares.shares("j", path)
    assert (found.steps, found.covered, found.share) == ([20, 30], 20, [[0.25, 0.75]]), "two cover 16 steps"
    path = events(tmp_path, covering(32, 2, [1.0, 0.0]))
    found = routing_shares.shares("j", path)
    assert (found.steps, found.covered) == ([20, 30, 32], 22)
    assert found.share == [pytest.approx([(2 + 5) / 22, (10 + 5) / 22])]
