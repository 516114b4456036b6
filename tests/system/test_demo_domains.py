"""The parts of the domains' demo that need no server: its rows, and what it prints."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_domains")


def test_no_held_out_row_is_trained_on(demo: ModuleType) -> None:
    count = demo.BRANCH_STEPS * demo.BATCH
    for name in demo.DOMAINS:
        trained, held_out = demo.rows(name, count), demo.held_out(name)
        assert (len(trained), len(held_out)) == (count, 16)
        asked = [row["prompt"] for row in [*trained, *held_out]]
        assert len(set(asked)) == len(asked)
        assert demo.rows(name, count) == trained, "the same rows in every run"
    assert demo.rows("sums", 1)[0]["completion"].count("=") == 1


def test_every_model_trains_on_the_same_number_of_rows(demo: ModuleType) -> None:
    """36 steps in two epochs of 18, of the 24 that all rows would give."""
    assert len(demo.DOMAINS) * demo.BRANCH_STEPS + demo.ROUTER_STEPS == demo.ALL_STEPS
    assert demo.ALL_STEPS % 2 == 0
    assert demo.ALL_STEPS // 2 <= len(demo.DOMAINS) * demo.BRANCH_STEPS < demo.ALL_STEPS


def test_it_says_which_model_is_best_whichever_it_is(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("dense, trained on all", "upcycled, trained on all", "mixed, routers trained")
    layers = [{"layer": 0, "found": 0.3, "random_router": 0.2, "chance_high": 0.1},
              {"layer": 5, "found": 0.1, "random_router": 0.2, "chance_high": 0.1}]  # fmt: skip
    for best in names:
        losses = {name: dict.fromkeys((*demo.DOMAINS, "mean"), 1.0 + (name != best)) for name in names}
        demo.tell(losses, {"mixed, routers trained": layers})
        told = capsys.readouterr().out
        assert f"The lowest mean loss is that of: {best}." in told
        assert "more than a random router in 1 of 2 layers" in told
