"""A probe from rows to its card: what each third decides, what is refused, and scoring that repeats its figures."""

from pathlib import Path

import pytest
import torch

from llama_stack_provider_moe.compute.ablation.states import measure
from llama_stack_provider_moe.compute.ablation.subject import Subject
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.probing.artifact import read_probe, write_probe
from llama_stack_provider_moe.compute.probing.fit import candidates
from llama_stack_provider_moe.compute.probing.prompt_sets import read_set, split
from llama_stack_provider_moe.compute.probing.scoring import LoadedProbe, ReadProbe, load_probes
from llama_stack_provider_moe.compute.probing.states import read_states
from llama_stack_provider_moe.compute.probing.texts import Reader, Reading
from llama_stack_provider_moe.compute.probing.trunk import load_trunk
from llama_stack_provider_moe.errors import DataError, InvalidInput
from llama_stack_provider_moe.shields.intervals import clopper_pearson
from llama_stack_provider_moe.spec import ProbeSpec
from llama_stack_provider_moe.spec.ablation import BASELINE, TARGET, Measure
from llama_stack_provider_moe.spec.probe import CARD_FILE, WEIGHTS_FILE
from tests.support import tiny_models
from tests.support.ablation_models import load
from tests.support.tiny_probe import OTHERS, SETTINGS, TARGETS, fitted_in, tiny_probe, write_rows


def loaded(folder: Path) -> LoadedProbe:
    found, refused = load_probes([ReadProbe.at("p", folder)])
    assert refused == {}
    return found["p"]


def test_scoring_repeats_the_figures_of_the_card(tmp_path: Path) -> None:
    _, folder, fitted = tiny_probe()
    probe, card = loaded(folder), fitted.card
    for name, texts, of in (
        ("target", TARGETS, card.held_out.probe.detected),
        ("baseline", OTHERS, card.held_out.probe.false_positives),
    ):
        found = read_set(write_rows(tmp_path, **{name: texts})[name], name, probe.reader)
        parts = split(found, "shuffled", 42)
        assert sorted([*parts.fit, *parts.choose, *parts.report]) == list(range(len(texts)))
        scores = probe.score([found.views[row] for row in parts.report], batch_size=3)
        assert (sum(score.is_flagged for score in scores), len(scores)) == (of.count, of.rows)
        assert (of.low, of.high) == clopper_pearson(of.count, of.rows)
        if name == "baseline":
            chosen = probe.score([found.views[row] for row in parts.choose], batch_size=5)
            above = sum(score.probability > card.threshold + 1e-9 for score in chosen)
            assert above == int(card.false_positive_rate * card.negatives) == 2
            assert min(abs(score.probability - card.threshold) for score in chosen) < 1e-6
    assert card.held_out.probe.auc.value > 0.9, "the sets differ in every word"
    assert {score.layer for score in scores} == set(card.layers)


def test_the_layer_is_the_one_that_detects_most_on_the_second_third() -> None:
    fitted = tiny_probe()[2]
    best = max(fitted.candidates.values())
    assert fitted.candidates[fitted.card.layers[0]] == best


def test_two_layers_score_as_the_worse_of_both(tmp_path: Path) -> None:
    model = tiny_probe()[0]
    fitted, _ = fitted_in(tmp_path, model, layers_read=2)
    write_probe(tmp_path / "probe", fitted.card, fitted.regressions)
    probe = loaded(tmp_path / "probe")
    assert probe.card.layers == [0, 1]
    views = [probe.reader.prompts({"messages": [{"role": "user", "content": text}]}) for text in TARGETS[:5]]
    both = probe.score(views, 8)
    alone = [
        LoadedProbe(probe.card.model_copy(update={"layers": [layer]}), [probe.regressions[layer]], probe.trunk,
                    probe.reader).score(views, 8)
        for layer in (0, 1)
    ]  # fmt: skip
    for score, *each in zip(both, *alone, strict=True):
        worst = max(each, key=lambda one: one.probability)
        assert (score.layer, score.probability) == (worst.layer, pytest.approx(worst.probability, abs=1e-9))


def test_the_states_are_those_of_ablations_measuring() -> None:
    folder = tiny_probe()[0]
    trunk = load_trunk(str(folder), None, "fp32", None, highest=1)
    reading = Reading("position", -2, 2)
    reader = Reader(trunk, reading, "whole", 128)
    prompts = {
        name: [reader.prompts({"messages": [{"role": "user", "content": text}]})[0] for text in texts[:6]]
        for name, texts in ((TARGET, TARGETS), (BASELINE, OTHERS))
    }
    model = load(folder)
    subject = Subject(model, tiny_models.tokenizer(), find_layout(model))
    wanted, _ = measure(subject, prompts, Measure(position=-2, span=2), 4, lambda done, total: None)
    for name, each in prompts.items():
        found = read_states(trunk, each, reading, [0, 1], batch_size=3)
        for block, states in found.items():
            torch.testing.assert_close(states.double().mean(dim=0), wanted[name].mean_LH[block], rtol=1e-5, atol=1e-6)


def test_the_same_row_in_two_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sets\.baseline: 2 of its rows are also in target"):
        fitted_in(tmp_path, tiny_probe()[0], others=[*OTHERS, *TARGETS[:2]])


def test_equal_rows_count_once_and_too_few_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sets\.baseline: has 20 different rows; expected at least 30, a third"):
        fitted_in(tmp_path, tiny_probe()[0], others=OTHERS[:20] * 3)
    with pytest.raises(DataError, match=r"data\.sets\.target: has 29 different rows; expected at least 30"):
        fitted_in(tmp_path, tiny_probe()[0], targets=TARGETS[:29])


def test_a_row_that_is_too_long_is_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 3: it has \d+ tokens, more than options\.max_length = 128"):
        fitted_in(tmp_path, tiny_probe()[0], targets=[*TARGETS[:2], "eggs " * 200, *TARGETS[2:]])


def test_a_confound_is_said(tmp_path: Path) -> None:
    answered = [[text, "Yes."] for text in TARGETS]
    fitted, said = fitted_in(tmp_path, tiny_probe()[0], targets=answered, layers="0")
    assert any("100% of target and 0% of baseline end with an answer" in line for line in said)
    assert any("number of tokens alone tells the sets apart" in line for line in said)
    assert fitted.card.length_auc > 0.75


def test_candidates() -> None:
    def named(layers: str | None, blocks: int, read: int = 1) -> list[int]:
        probe = {"layers": layers, "layers_read": read}
        return candidates(ProbeSpec.model_validate(SETTINGS | {"model": "m", "probe": probe}), blocks)

    assert named(None, 30) == [7, 10, 13, 16, 19, 22]
    assert named(None, 2) == [0, 1]
    assert named("3,1-2", 4) == [1, 2, 3]
    with pytest.raises(InvalidInput, match=r"probe\.layers: '4' is not valid; expected decoder blocks of 'm': 0 to 3"):
        named("4", 4)
    with pytest.raises(InvalidInput, match=r"probe\.layers_read: 2 is not valid; expected at most 1"):
        named("1", 4, read=2)


def test_a_probe_of_another_base_is_refused_and_the_others_score(tmp_path: Path) -> None:
    _, folder, fitted = tiny_probe()
    other = tiny_models.build("granitemoe", tmp_path / "model", seed=1)
    base = fitted.card.base.model_copy(update={"model": str(other)})
    write_probe(tmp_path / "probe", fitted.card.model_copy(update={"base": base}), fitted.regressions)
    template = fitted.card.base.model_copy(update={"chat_template": "f" * 64})
    write_probe(tmp_path / "old", fitted.card.model_copy(update={"base": template}), fitted.regressions)
    gone = fitted.card.base.model_copy(update={"model": str(tmp_path / "gone")})
    write_probe(tmp_path / "lost", fitted.card.model_copy(update={"base": gone}), fitted.regressions)
    folders = {"good": folder, "moved": tmp_path / "probe", "old": tmp_path / "old", "lost": tmp_path / "lost"}
    found, refused = load_probes([ReadProbe.at(name, each) for name, each in folders.items()])
    assert list(found) == ["good"]
    assert "probes.moved" in refused["moved"]
    assert "of the loaded weights" in refused["moved"]
    assert "the same chat template" in refused["old"]
    assert "there is no folder" in refused["lost"]


def test_weights_that_do_not_fit_the_card_are_refused(tmp_path: Path) -> None:
    fitted = tiny_probe()[2]
    with_nan = fitted.regressions[0]._replace(bias=torch.tensor(float("nan"), dtype=torch.float64))
    write_probe(tmp_path / "a", fitted.card, [with_nan])
    with pytest.raises(InvalidInput, match="finite numbers in 'bias'"):
        read_probe(tmp_path / "a", "probe")
    write_probe(tmp_path / "b", fitted.card, [fitted.regressions[0]] * 2)
    with pytest.raises(InvalidInput, match=r"a tensor 'mean' of shape \(1, 32\)"):
        read_probe(tmp_path / "b", "probe")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {CARD_FILE, WEIGHTS_FILE}
