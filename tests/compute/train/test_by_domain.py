"""Figures of each domain of a job's data, on tiny models."""

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from llama_stack_provider_moe.compute.analysis.routing_report import mutual_information
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.spec.routing import RoutingReport
from tests.support.training_support import Run, Workshop, domains_of, workshop

__all__ = ["workshop"]

TIMES = {"training": {"n_epochs": 2, "batch_size": 4, "gradient_accumulation_steps": 2}}


@pytest.fixture(scope="module")
def sft(workshop: Workshop) -> Run:
    return workshop.run("sft", "granitemoe", domains=domains_of("sft"), **TIMES)


@pytest.fixture(scope="module")
def dpo(workshop: Workshop) -> Run:
    return workshop.run("dpo", "granitemoe", domains=domains_of("dpo"), **TIMES)


def test_a_step_tells_the_loss_of_each_domain(sft: Run) -> None:
    assert sft.exit_code == COMPLETED, sft.reason
    assert len(sft.events("step")) == 8, "2 epochs of 24 + 8 rows, 8 rows a step"
    for words, sums, both in zip(sft.steps("loss/words"), sft.steps("loss/sums"), sft.steps("ce"), strict=True):
        assert min(words, sums) < both < max(words, sums)
    assert sft.steps("loss/sums")[-1] < sft.steps("loss/sums")[0]
    words, sums = sft.resolved["domains"]
    assert [words["rows"], words["rows_an_epoch"], words["share"], words["times_seen"]] == [24, 24, 0.75, 2.0]
    assert [sums["rows"], sums["rows_an_epoch"], sums["held_out_rows"]] == [5, 8, 2]


def test_a_domains_loss_is_that_of_a_job_on_it_alone(workshop: Workshop) -> None:
    """The first step is before any update: all rows of both domains in one batch, and each domain's alone."""
    (words, *word_rows), (sums, *sum_rows) = domains_of("sft")
    shares = [(words | {"ratio": 24}, *word_rows), (sums | {"ratio": 5}, *sum_rows)]
    mixed = workshop.run("sft", "granitemoe", domains=shares, training={"batch_size": 29})
    assert mixed.exit_code == COMPLETED, mixed.reason
    for name, (train, held_out) in {"words": word_rows, "sums": sum_rows}.items():
        alone = workshop.run("sft", "granitemoe", train, held_out, training={"batch_size": 29})
        assert mixed.steps(f"loss/{name}")[0] == pytest.approx(alone.steps("ce")[0], abs=2e-6)
        for figure in ("validation_loss", "perplexity"):
            assert mixed.held_out(f"{figure}/{name}")[0] == pytest.approx(alone.held_out(figure)[0], rel=1e-6)


def test_pairs_have_held_out_figures_by_domain(workshop: Workshop, dpo: Run) -> None:
    assert dpo.exit_code == COMPLETED, dpo.reason
    assert not [name for name in dpo.events("step")[0].metrics if name.startswith("loss/")], "TRL gives one for a batch"
    domains = domains_of("dpo")
    for block, train, held_out in domains:
        alone = workshop.run("dpo", "granitemoe", train, held_out, **TIMES)
        name = block["name"]
        assert dpo.held_out(f"perplexity/{name}")[0] == pytest.approx(alone.held_out("perplexity")[0], rel=1e-6)
    overall, rows = dpo.held_out("validation_loss"), [len(held_out) for _, _, held_out in domains]
    by_domain = [dpo.held_out(f"validation_loss/{name}") for name in ("words", "sums")]
    for both, words, sums in zip(overall, *by_domain, strict=True):
        assert both == pytest.approx((words * rows[0] + sums * rows[1]) / sum(rows), rel=1e-6)


def test_log_probabilities_of_the_reference_can_be_computed_ahead(workshop: Workshop, dpo: Run) -> None:
    options = {"precompute_ref_log_probs": True}
    ahead = workshop.run("dpo", "granitemoe", domains=domains_of("dpo"), options=options, **TIMES)
    assert ahead.exit_code == COMPLETED, ahead.reason
    assert ahead.steps("preference_loss") == pytest.approx(dpo.steps("preference_loss"), abs=1e-5)


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_routers_are_reported_by_domain(request: pytest.FixtureRequest, recipe: str) -> None:
    run: Run = request.getfixturevalue(recipe)
    for event in run.events("routing"):
        assert event.sets.keys() == {"words", "sums"}
        for layer, words, sums in zip(event.layers, event.sets["words"], event.sets["sums"], strict=True):
            for whole, one, other in zip(layer.share, words.share, sums.share, strict=True):
                assert min(one, other) - 1e-6 <= whole <= max(one, other) + 1e-6


def test_a_dense_model_has_domains_too(workshop: Workshop) -> None:
    run = workshop.run("sft", "llama", domains=domains_of("sft"), adapter=None, training={"max_steps_per_epoch": 2})
    assert run.exit_code == COMPLETED, run.reason
    assert len(run.steps("loss/sums")) == 2
    assert not run.events("routing")


def test_a_domain_without_rows_in_an_epoch_is_named(workshop: Workshop) -> None:
    domains = domains_of("sft", ratio=100)
    run = workshop.run("sft", "llama", domains=domains, training={"max_steps_per_epoch": 1})
    assert run.exit_code == COMPLETED, run.reason
    warnings = [event.text for event in run.events("message") if event.level == "warning"]
    assert any("domain 'sums' has no row in an epoch of 8 rows" in text for text in warnings), warnings


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_a_job_leaves_an_analysis_of_its_domains(request: pytest.FixtureRequest, recipe: str) -> None:
    run: Run = request.getfixturevalue(recipe)
    found = [each for each in run.manifest.artifacts if each.kind == "analysis"]
    assert [each.path for each in found] == [str(run.folder.domains)]
    report = RoutingReport.model_validate_json((run.folder.domains / "routing.json").read_bytes())
    assert {name: (each.source, each.rows) for name, each in report.sets.items()} == {
        "words": ("words", 5), "sums": ("sums", 2),
    }  # fmt: skip
    for layer in report.layers:
        assert layer.random_router is not None
        assert 0 <= layer.random_router <= math.log(2)
        assert 0 <= layer.mutual_information <= math.log(2)
    assert {path.name for path in run.folder.domains.iterdir()} >= {"rates.png", "mutual_information.png"}


def test_steps_tell_the_information_between_domain_and_expert(sft: Run) -> None:
    for event in sft.events("routing"):
        shares = np.array([[layer.share for layer in each] for each in event.sets.values()])
        assert event.figures()["mutual_information"] == pytest.approx(mutual_information(shares).mean(), abs=1e-3)


@pytest.mark.parametrize("validation", [True, False])
def test_a_column_gives_what_data_sets_give(workshop: Workshop, validation: bool) -> None:
    """The same rows, interleaved in one file whose sidecar names each row's domain: the same steps and figures."""
    domains = domains_of("sft", ratio=2)
    domains.reverse()  # an order that is not the alphabet's
    if not validation:
        domains = [(each | {"validation_dataset_id": None}, rows, []) for each, rows, _ in domains]
    apart = workshop.run("sft", "granitemoe", domains=domains, **TIMES)
    ratios = {each["name"]: each.get("ratio", 1) for each, _, _ in domains}
    data: dict[str, Any] = {"domain_column": "topic", "domain_ratios": ratios}
    if not validation:
        data["validation_dataset_id"] = None
    folder = workshop.job("sft", "granitemoe", data=data, **TIMES)
    for part, at in (("train", 1), ("validation", 2)):
        order = [number for number, each in enumerate(domains) for _ in each[at]]
        random.Random(0).shuffle(order)
        given = [iter(each[at]) for each in domains]
        rows = [next(given[number]) for number in order]
        folder.rows(part).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        head = json.dumps([*ratios]).encode() + b"\n"
        folder.domains_of_rows(part).write_bytes(head + bytes(order))
    together = workshop.again(Run(folder, 0))
    assert (apart.exit_code, together.exit_code) == (COMPLETED, COMPLETED), together.reason
    assert together.resolved["domains"] == apart.resolved["domains"]
    for name in ("loss", "loss/words", "loss/sums"):
        one, other = ([event.metrics.get(name) for event in run.events("step")] for run in (together, apart))
        assert one == other
    for name in ("validation_loss", "validation_loss/words", "perplexity/sums"):
        assert together.held_out(name) == apart.held_out(name)
    report = RoutingReport.model_validate_json((together.folder.domains / "routing.json").read_bytes())
    assert [each.source for each in report.sets.values()] == ["train", "train"]


def test_a_damaged_list_of_domains_ends_the_job(workshop: Workshop) -> None:
    folder = workshop.job("sft", "llama", data={"domain_column": "topic", "validation_dataset_id": None})
    folder.domains_of_rows("train").write_bytes(b'["a", "b"]\n' + bytes([0, 1] * 7))
    run = workshop.again(Run(folder, 0))
    assert "train.domains has 14 rows, and train.jsonl 16" in run.reason
