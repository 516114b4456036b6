"""Events of router health: figures of every step, tables that cover all steps, one transfer, and few bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.routing_sums import ALL, RoutingSums, Tally
from llama_stack_provider_moe.compute.train.routing_events import RoutingEvents, steps_between_tables
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.jobdir.events import EventLog, Routing, Step
from llama_stack_provider_moe.jobdir.routing_figures import LayerRouting, mutual_information
from llama_stack_provider_moe.spec import Moe
from tests.support import tiny_models
from tests.support.training_support import Workshop, workshop

__all__ = ["workshop"]

TOKENS, TOP_K = 4096, 8


def sums(layers: int, experts: int, seed: int, parts: tuple[str, ...] = (), idle: tuple[int, ...] = ()) -> RoutingSums:
    """What routers did in a step, at random; the experts `idle` of layer 0 got nothing."""
    generator = torch.Generator().manual_seed(seed)
    tallies = {}
    for part in (ALL, *parts):
        for layer in range(layers):
            weights_E = torch.rand(experts, generator=generator) + 0.05
            if layer == 0:
                weights_E[list(idle)] = 0
            chosen_T = torch.multinomial(weights_E, TOKENS * TOP_K, replacement=True, generator=generator)
            probs_E = TOKENS * weights_E / weights_E.sum()
            counts_E = chosen_T.bincount(minlength=experts).float()
            tallies[part, layer] = Tally(counts_E, probs_E, torch.tensor(2.1 * TOKENS), torch.tensor(float(TOKENS)))
    return RoutingSums.of(tallies, [*tallies], experts, torch.device("cpu"))


def shares(found: RoutingSums, row: int) -> list[float]:
    counts_E = found.packed_KS[row, : found.experts]
    return [float(each) for each in counts_E / counts_E.sum()]


def written(tmp_path: Path, *events: Routing | Step) -> bytes:
    log = EventLog(tmp_path / "events.jsonl")
    for event in events:
        log.append(event)
    log.close()
    return (tmp_path / "events.jsonl").read_bytes()


def test_tables_come_first_then_every_n_steps_and_with_each_checkpoint() -> None:
    events = RoutingEvents(4)
    found = [events.of_step(sums(2, 4, step), step, is_kept=step == 6) for step in range(1, 10)]
    assert [event.step for event in found if event.layers] == [1, 4, 6, 8]
    assert [event.steps for event in found if event.layers] == [1, 3, 2, 2], "each covers the steps since the last"
    assert all(event.in_step() is not None for event in found), "every step has figures"
    assert [event.by_layer is None for event in found] == [True, *[False] * 8]


def test_figures_are_of_the_step_and_tables_of_all_steps_since() -> None:
    """An expert that gets nothing in steps without tables is counted there, and the tables know all those steps."""
    events, steps = RoutingEvents(3), [sums(2, 4, step, idle=(3,) if step in (2, 4, 5) else ()) for step in range(1, 7)]
    found = [events.of_step(each, step, is_kept=False) for step, each in enumerate(steps, 1)]
    assert [event.figures()["dead_experts"] for event in found] == [0, 1, 0, 1, 1, 0]
    third, sixth = found[2], found[5]
    together = steps[1] + steps[2]
    assert third.layers[0].share == pytest.approx(shares(together, 0), rel=1e-3)
    assert third.layers[0].dead == 0, "it got tokens in step 3"
    assert third.by_layer is not None
    assert third.by_layer.max[0] == pytest.approx(max(shares(steps[2], 0)), rel=1e-3), "of step 3 alone"
    assert sixth.layers[0].share == pytest.approx(shares(steps[3] + steps[4] + steps[5], 0), rel=1e-3)


def test_an_expert_that_is_dead_in_all_steps_is_so_in_the_tables() -> None:
    events = RoutingEvents(3)
    for step in range(1, 4):
        found = events.of_step(sums(2, 4, step, idle=(1,)), step, is_kept=False)
    assert (found.layers[0].share[1], found.layers[0].dead, found.layers[1].dead) == (0.0, 1, 0)


def test_figures_by_set_are_those_of_the_tables() -> None:
    """The device computes what a reader of an older version's tables does."""
    step = sums(3, 8, 5, parts=("code", "law"))
    whole = RoutingEvents(1).of_step(step, 1, is_kept=False)
    events = RoutingEvents(10)
    events.of_step(step, 1, is_kept=False)
    compact = events.of_step(step, 2, is_kept=False)
    assert not compact.layers
    assert compact.figures_by_set().keys() == whole.figures_by_set().keys() == {"code", "law"}
    for name, figures in whole.figures_by_set().items():
        assert compact.figures_by_set()[name] == pytest.approx(figures, rel=1e-3)
    assert compact.figures() == pytest.approx(whole.figures(), rel=1e-3)
    exact = step.read()
    tables = [[LayerRouting(**vars(layer)) for layer in exact.parts[name]] for name in ("code", "law")]
    assert compact.figures()["mutual_information"] == pytest.approx(mutual_information(tables), rel=1e-3)


def test_a_part_without_tokens_is_left_out() -> None:
    step = sums(2, 4, 1, parts=("a", "b"))
    step.packed_KS[-2:] = 0
    found = RoutingEvents(1).of_step(step, 1, is_kept=False)
    assert (found.sets.keys(), found.mutual_information) == ({"a"}, None)


def test_figures_have_four_digits() -> None:
    events = RoutingEvents(3)
    for step in (1, 2):
        text = events.of_step(sums(2, 4, step), step, is_kept=False).model_dump_json()
        figures = json.loads(text, parse_float=str)
        flat = [*figures["layers"], figures["by_layer"] or {}]
        numbers = [each for table in flat for value in table.values() for each in (value if isinstance(value, list)
                   else [value]) if isinstance(each, str)]  # fmt: skip
        assert numbers
        assert all(len(each.replace(".", "").lstrip("0")) <= 4 for each in numbers), numbers


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reads of tensors, each of which would wait for a GPU."""
    found: list[str] = []
    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        real = getattr(Tensor, name)

        def counted(tensor: Tensor, *arguments: Any, real: Any = real, name: str = name) -> Any:
            found.append(name)
            return real(tensor, *arguments)

        monkeypatch.setattr(Tensor, name, counted)
    return found


def test_a_step_reads_the_device_once(reads: list[str]) -> None:
    events = RoutingEvents(50)
    steps = [sums(48, 128, seed, parts=("code", "law")) for seed in range(3)]
    reads.clear()
    for step, each in enumerate(steps, 1):
        events.of_step(each, step, is_kept=False)
    assert reads == ["tolist"] * 3


def test_a_step_takes_5_kb_at_48_layers_of_128_experts(tmp_path: Path) -> None:
    layout = find_layout(tiny_models.model("qwen3_moe", num_hidden_layers=48, num_experts=128, num_experts_per_tok=8))
    assert layout is not None
    every = steps_between_tables(Moe(), layout, 0)
    assert every == 50
    events, made = RoutingEvents(every), [sums(48, 128, seed) for seed in range(3)]
    found: list[Routing | Step] = []
    for step in range(1, 2 * every + 1):
        metrics = {f"figure_{number}": 1.2345678901234567 for number in range(16)}
        found.append(Step(step=step, max_steps=100_000, epoch=step / 7, metrics=metrics, eta_s=1234.5678901234))
        found.append(events.of_step(made[step % 3], step, is_kept=False))
    assert len(written(tmp_path, *found)) / (2 * every) <= 5000


def test_how_often_tables_come_by_default() -> None:
    small = find_layout(tiny_models.model("mixtral"))
    assert small is not None
    assert (steps_between_tables(Moe(), small, 0), steps_between_tables(Moe(), small, 3)) == (1, 1)
    assert steps_between_tables(Moe(routing_every_n_steps=7), small, 0) == 7


def test_a_job_writes_tables_as_often_as_it_was_told(workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    training = {"n_epochs": 1, "batch_size": 2, "gradient_accumulation_steps": 1}
    run = workshop.run("sft", "granitemoe", moe={"routing_every_n_steps": 3}, training=training)
    assert run.exit_code == COMPLETED, run.reason
    events = run.events("routing")
    assert [event.step for event in events] == list(range(1, 9))
    tables = [(event.step, event.steps) for event in events if event.layers]
    assert tables == [(1, 1), (3, 2), (6, 3), (8, 2)], "and the last step"
    assert all(event.figures()["token_entropy"] > 0 for event in events)
    (plan,) = run.events("plan")
    assert plan.plan["routing_every_n_steps"] == 3
    assert "the share of each expert every 3 steps" in capfd.readouterr().out
