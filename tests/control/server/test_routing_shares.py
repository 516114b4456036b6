"""The shares of all experts over a job's last steps, which jobs are compared by."""

from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server import routing_shares
from llama_stack_provider_moe.jobdir.events import EventLog, LayerRouting, Resumed, Routing


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


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = events(tmp_path, *(table(step, [0.5, 0.5]) for step in range(1, 11)))
    monkeypatch.setattr(routing_shares, "WINDOW_BYTES", 3 * len(path.read_bytes()) // 10)
    assert routing_shares.shares("j", path).steps[-1] == 10
    assert len(routing_shares.shares("j", path).steps) in (2, 3)
