"""Routing analysis counts the experts that the routers chose, and finds the differences that the test created."""

import doctest
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.analysis import plots, routing, routing_report
from llama_stack_provider_moe.compute.analysis.routing_report import (
    Counts,
    Prompt,
    bootstrap,
    by_chance,
    compare,
    count,
)
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.masking import masked_experts
from llama_stack_provider_moe.compute.moe.resolve_settings import resolve_moe
from llama_stack_provider_moe.compute.moe.steering import Steering, restore_biases
from llama_stack_provider_moe.errors import CheckpointError, InvalidInput
from llama_stack_provider_moe.spec import Moe
from llama_stack_provider_moe.spec.routing import Analysis, RoutingReport, SetSummary
from tests.support import tiny_models

FEW = Analysis(resamples=200, permutations=100)
EXPERTS = 4


def made(family: str, **changes: Any) -> tuple[PreTrainedModel, ExpertLayout]:
    model = tiny_models.model(family, **changes)
    layout = find_layout(model)
    assert layout is not None
    return model, layout


def prompts(seed: int, rows: int = 5) -> list[Prompt]:
    """Rows of several lengths; the first tokens of each do not count."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (rows,), generator=generator).tolist()
    return [
        Prompt(torch.randint(3, 300, (length,), generator=generator).tolist(), [index >= 2 for index in range(length)])
        for length in lengths
    ]


def chosen_by_hand(layout: ExpertLayout, router: Any, hidden_TH: Tensor, bias: Tensor | None) -> Tensor:
    """Whether an expert gets a token, (T, E), computed only from the router's weights."""
    own_bias = dict(router.named_parameters()).get("bias")
    logits_TE = functional.linear(hidden_TH, router.get_parameter("weight"), own_bias)
    if bias is not None:
        scores_TE = logits_TE.sigmoid() if layout.scoring == "sigmoid" else logits_TE.softmax(-1)
        logits_TE = scores_TE + bias.view(-1)
    greatest_TK = logits_TE.argsort(dim=-1, descending=True)[:, : layout.top_k]
    return functional.one_hot(greatest_TK, EXPERTS).sum(dim=1)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_counts_equal_those_of_each_row_alone(family: str) -> None:
    """Batched and padded, without some tokens: the same as from the routers' inputs, one row at a time."""
    model, layout = made(family)
    generator = torch.Generator().manual_seed(3)
    biases = layout.biases(model)
    for bias in biases.values():
        bias.data.copy_(0.3 * torch.rand(bias.shape, generator=generator))
    rows = prompts(1)
    counted = count(model, layout, rows, batch_size=3)
    assert counted.tokens_N.tolist() == [len(row.ids) - 2 for row in rows]
    hidden: dict[int, Tensor] = {}
    for layer, router in layout.routers(model).items():
        router.register_forward_pre_hook(lambda _, inputs, layer=layer: hidden.update({layer: inputs[0]}))
    for number, row in enumerate(rows):
        with torch.no_grad():
            model(torch.tensor([row.ids]))
            for place, (layer, router) in enumerate(layout.routers(model).items()):
                got_TE = chosen_by_hand(layout, router, hidden[layer].reshape(-1, 32), biases.get(layer))
                assert counted.routed_NLE[number, place].tolist() == got_TE[2:].sum(dim=0).tolist()
    assert counted.rate_LE().sum(axis=-1) == pytest.approx(layout.top_k)


@pytest.mark.parametrize("family", tiny_models.MOE)
def test_checkpointing_and_masks_count_once(family: str) -> None:
    model, layout = made(family)
    rows = prompts(2)
    plain = count(model, layout, rows, batch_size=2)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert np.array_equal(count(model, layout, rows, batch_size=2).routed_NLE, plain.routed_NLE)
    with masked_experts(model, layout, {layout.moe_layers[-1]: [2]}):
        masked = count(model, layout, rows, batch_size=2)
    assert masked.routed_NLE[:, -1, 2].sum() == 0
    assert masked.rate_LE()[-1].sum() == pytest.approx(layout.top_k)


def steered() -> tuple[PreTrainedModel, ExpertLayout]:
    """Layer 0 sends tokens 10 to 19 to expert 1 and tokens 20 to 29 to expert 2, by hand; top-1."""
    model, layout = made("mixtral", num_experts_per_tok=1)
    routers = layout.routers(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding[10:20, 0], embedding[20:30, 0] = 5.0, -5.0
        weight = routers[0].get_parameter("weight")
        weight.zero_()
        weight[1, 0], weight[2, 0] = 5.0, -5.0
    return model, layout


def tokens_from(first: int, rows: int, seed: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (rows,), generator=generator).tolist()
    drawn = [torch.randint(first, first + 10, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(ids, [True] * len(ids)) for ids in drawn]


def test_only_the_differences_put_into_a_router_are_found() -> None:
    model, layout = steered()
    sets = {
        "a": count(model, layout, tokens_from(10, 12, 1), 4),
        "b": count(model, layout, tokens_from(20, 9, 2), 4),
    }
    report = report_of(sets, layout)
    first = report.layers[0]
    assert first.rate == {"a": [0, 1, 0, 0], "b": [0, 0, 1, 0]}
    assert first.mutual_information == pytest.approx(math.log(2), abs=1e-7)
    assert first.chance_high < 0.5 * first.mutual_information
    for name, expert in (("a", 1), ("b", 2)):
        best = report.ranked(name)[0]
        assert (best.layer, best.expert, best.difference) == (0, expert, 1.0)
        assert best.low > 0
        assert [one for one in report.ranked(name) if one.is_sure and one.layer == 0] == [best]
    assert first.low["a"][2] == first.high["a"][2] == -1.0


def test_sets_that_are_alike_do_not_differ() -> None:
    model, layout = steered()
    counted = count(model, layout, tokens_from(10, 6, 3) + tokens_from(20, 6, 4), 4)
    report = report_of({"a": counted, "b": counted, "c": counted}, layout)
    for layer in report.layers:
        assert layer.mutual_information == pytest.approx(0, abs=1e-7)
        for name in report.sets:
            assert max(map(abs, layer.difference[name])) < 1e-7
            assert not any(one.is_sure for one in report.ranked(name))
            assert all(low <= 0 <= high for low, high in zip(layer.low[name], layer.high[name], strict=True))


def test_chance_explains_differences_of_sets_from_one_source() -> None:
    """Twenty pairs of samples from one source: few pass the threshold of 95%; mutual information is as by chance."""
    generator = np.random.default_rng(5)
    share_E = generator.dirichlet(np.ones(16))
    passed, excess = 0, []
    for seed in range(20):
        one, other = (sampled(generator, share_E, rows) for rows in (30, 40))
        (found,) = compare({"a": one, "b": other}, [0], FEW, seed)
        passed += any(
            difference > needed
            for name in ("a", "b")
            for difference, needed in zip(found.difference[name], found.chance_difference[name], strict=True)
        )
        excess.append(found.mutual_information - found.chance_mean)
    assert passed <= 4  # 1 is expected; 5 or more of 20 at 5% happen once in 400 times
    assert abs(np.mean(excess)) < 2.5 * np.std(excess) / math.sqrt(20)
    assert found.chance_mean > 0.001, "of samples it is not 0"


def sampled(generator: np.random.Generator, share_E: Any, rows: int) -> Counts:
    tokens_N = generator.integers(5, 60, size=rows)
    routed = [[generator.multinomial(tokens, share_E)] for tokens in tokens_N]
    return Counts(np.array(routed, dtype=np.float32), tokens_N.astype(np.float32))


def test_intervals_cover_what_they_should() -> None:
    """With 40 rows that differ, some 360 of 400 intervals of 90% contain the true value, or a few less."""
    generator = np.random.default_rng(7)
    held = 0
    for seed in range(400):
        sets = []
        for mean in (0.3, 0.5):
            rate_N = generator.beta(8 * mean, 8 * (1 - mean), size=40)
            tokens_N = np.full(40, 50.0, dtype=np.float32)
            got_N = generator.binomial(50, rate_N)
            sets.append(Counts(np.stack([got_N, 50 - got_N], axis=-1)[:, None].astype(np.float32), tokens_N))
        low_SLE, high_SLE = bootstrap(sets, 200, 0.9, seed)
        held += low_SLE[1, 0, 0] <= 0.2 <= high_SLE[1, 0, 0]
    assert 0.85 <= held / 400 <= 0.94


def test_a_seed_determines_the_result() -> None:
    one, other = (sampled(np.random.default_rng(seed), np.ones(4) / 4, 8) for seed in (1, 2))
    assert np.array_equal(bootstrap([one, other], 100, 0.9, 3), bootstrap([one, other], 100, 0.9, 3))
    assert not np.array_equal(bootstrap([one, other], 100, 0.9, 3), bootstrap([one, other], 100, 0.9, 4))
    assert np.array_equal(by_chance([one, other], 20, 3).greatest_R, by_chance([one, other], 20, 3).greatest_R)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(routing_report).failed == 0


def test_a_row_without_a_token_that_counts_is_refused() -> None:
    model, layout = made("mixtral")
    with pytest.raises(InvalidInput, match="rows that each have a token that counts"):
        count(model, layout, [Prompt([3, 4], [True, True]), Prompt([5], [False])], 2)


def report_of(sets: dict[str, Counts], layout: ExpertLayout) -> RoutingReport:
    found = compare(sets, layout.moe_layers, FEW, seed=1)
    report = RoutingReport(
        model="m", adapter=None, family=layout.family, moe_layers=list(layout.moe_layers),
        num_experts=layout.num_experts, top_k=layout.top_k, tokens="all", confidence=FEW.confidence,
        resamples=FEW.resamples, permutations=FEW.permutations, seed=1,
        sets={name: SetSummary(source=name, rows=len(each.tokens_N), tokens=int(each.tokens_N.sum()))
              for name, each in sets.items()},
        layers=found, top={},
    )  # fmt: skip
    top = {name: [one for one in report.ranked(name) if one.difference > 0][:5] for name in sets}
    return report.model_copy(update={"top": top})


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_charts_of_two_and_of_three_sets(names: str, tmp_path: Path) -> None:
    model, layout = made("mixtral")
    report = report_of({name: count(model, layout, prompts(seed), 4) for seed, name in enumerate(names)}, layout)
    paths = plots.heat_maps(report, tmp_path)
    assert [path.name for path in paths] == ["difference.png", "rates.png", "mutual_information.png", "top_experts.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_ticks_of_many_experts_do_not_touch() -> None:
    assert plots.ticks(4) == [0, 1, 2, 3]
    assert plots.ticks(128) == list(range(0, 128, 8))
    assert plots.ticks(48) == list(range(0, 48, 4))


# The command line.

ANSWER = [{"role": "user", "content": "Add two and three."}, {"role": "assistant", "content": "Five."}]
FILES: dict[str, Sequence[Mapping[str, object]]] = {
    "a": [{"prompt": f"Write {i} words about the garden.", "completion": "In spring."} for i in range(6)],
    "b": [{"prompt": f"Add {i} and three."} for i in range(4)] + [{"messages": ANSWER[:1]}, {"messages": ANSWER}],
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, rows in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: tmp_path / f"{name}.jsonl" for name in FILES}


def typed(model: Path, files: dict[str, Path], out: Path, *more: str) -> list[str]:
    sets = [word for name, path in files.items() for word in ("--rows", f"{name}={path}")]
    return [
        str(model),
        *sets,
        "--dtype",
        "fp32",
        "--resamples",
        "100",
        "--permutations",
        "20",
        "--out",
        str(out),
        *more,
    ]


@pytest.mark.parametrize("charts", [True, False])
def test_files_become_a_report(
    charts: bool, files: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build("granitemoe", tmp_path / "model")
    if not charts:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert routing.main(typed(model, files, tmp_path / "out")) == 0
    printed = capsys.readouterr()
    assert "sets: a (6 rows, " in printed.out
    assert ("matplotlib is not installed" in printed.err) is not charts
    report = RoutingReport.model_validate_json((tmp_path / "out" / "routing.json").read_bytes())
    assert {name: each.rows for name, each in report.sets.items()} == {"a": 6, "b": 6}
    assert (tmp_path / "out" / "difference.png").exists() is charts
    assert routing.main(typed(model, files, tmp_path / "out")) == 2
    assert "expected a folder without routing.json" in capsys.readouterr().err


def test_prompt_and_response_are_parts_of_all(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    model = tiny_models.build("qwen3_moe", tmp_path / "model")
    files["b"] = files["a"]
    tokens = {}
    for part in ("prompt", "response", "all"):
        assert routing.main(typed(model, files, tmp_path / part, "--tokens", part, "--json")) == 0
        tokens[part] = json.loads(capsys.readouterr().out)["sets"]["a"]["tokens"]
    assert tokens["prompt"] + tokens["response"] == tokens["all"]
    assert 0 < tokens["response"] < tokens["prompt"]


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (["--rows", "c"], "--rows: 'c' is not valid; expected NAME=FILE", 2),
        (["--rows", "b=x"], "--rows: 'b=x' is not valid; expected NAME=FILE, each name once", 2),
        (["--rows", "c d=x"], "data.sets: 'c d' is not valid as a name", 2),
        (["--rows", "c=/no/file"], "--rows: '/no/file' is not valid; expected a file of rows", 2),
        (["--tokens", "response"], "row 1: completion: is missing beside 'prompt'", 2),
        (["--confidence", "1"], "analysis.confidence: '1' is not valid; expected < 1", 2),
        (["--adapter", "/no/folder"], "adapter_folder: '/no/folder' is not an adapter of this model", 1),
        (["--max-length", "8", "--tokens", "response"], "completion", 2),
    ],
)
def test_mistakes_are_named(
    words: list[str], told: str, code: int, files: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    model = tiny_models.build("granitemoe", tmp_path / "model")
    assert routing.main(typed(model, files, tmp_path / "out", *words)) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dense_model_has_no_routing(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    model = tiny_models.build("llama", tmp_path / "model")
    assert routing.main(typed(model, files, tmp_path / "out")) == 1
    assert "is dense; it has no experts" in capsys.readouterr().err


def test_moved_biases_come_with_an_adapter(tmp_path: Path) -> None:
    """An `aux_free` job writes its routers' biases beside its adapter; plain PEFT loads only the adapter."""
    model, layout = made("deepseek_v3")
    moved = Steering(model, layout, resolve_moe(Moe(moe_load_balancing="aux_free"), layout, full=False))
    moved.after_step({layer: torch.tensor([9.0, 0.0, 0.0, 0.0]) for layer in layout.moe_layers})
    moved.save(tmp_path)
    fresh, _ = made("deepseek_v3")
    restore_biases(tmp_path, fresh, layout)
    for layer, bias in layout.biases(fresh).items():
        assert bias.tolist() == layout.biases(model)[layer].tolist() != [0, 0, 0, 0]
    other, other_layout = made("glm4_moe", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        restore_biases(tmp_path, other, other_layout)
    restore_biases(tmp_path / "none", other, other_layout)
