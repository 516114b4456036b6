"""What is measured, by hand: means of the right token, whatever the batches; halves that don't see each other."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.ablation import prompts as prompt_rows
from llama_stack_provider_moe.compute.ablation.analyze import analyze, text
from llama_stack_provider_moe.compute.ablation.lora import write_adapter
from llama_stack_provider_moe.compute.ablation.measure_command import main as measure_main
from llama_stack_provider_moe.compute.ablation.measurements import MeasuredStates, Measurements, read
from llama_stack_provider_moe.compute.ablation.states import measure, structure_of
from llama_stack_provider_moe.compute.ablation.subject import Subject, load_subject
from llama_stack_provider_moe.compute.analysis.plots import installed
from llama_stack_provider_moe.compute.analysis.routing_report import count
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.errors import DataError, ModelError
from llama_stack_provider_moe.spec import AblationMeasureSpec
from llama_stack_provider_moe.spec.ablation import BASELINE, MEASUREMENTS_FILE, TARGET, Measure
from llama_stack_provider_moe.spec.routing import RoutingReport
from tests.support import tiny_models
from tests.support.ablation_models import load, measured, plan, prompts

_KEPT = TemporaryDirectory()
SETS = {TARGET: prompts(1), BASELINE: prompts(2)}


@cache
def folder_of(family: str) -> Path:
    return tiny_models.build(family, Path(_KEPT.name) / family)


def subject(family: str) -> Subject:
    model = load(folder_of(family))
    return Subject(model, tiny_models.tokenizer(), find_layout(model))


def states_by_hand(family: str, name: str, position: int) -> Tensor:
    """(N, L, H): every row alone, by transformers; the last of `hidden_states` is after the final norm, so without."""
    model, found = load(folder_of(family)), []
    for prompt in SETS[name]:
        last: list[Tensor] = []
        layers = model.model.layers
        handle = layers[-1].register_forward_hook(
            lambda module, inputs, output, last=last: last.append(output if isinstance(output, Tensor) else output[0])
        )
        with torch.no_grad():
            every = model(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        handle.remove()
        found.append(torch.stack([*(each[0, position] for each in every[1:-1]), last[0][0, position]]))
    return torch.stack(found).double()


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "glm4_moe", "llama"])
@pytest.mark.parametrize(("position", "span"), [(-1, 1), (-2, 1), (0, 1), (-1, 3), (-2, 2), (2, 2)])
def test_means_are_those_of_every_row_alone(family: str, position: int, span: int) -> None:
    tokens = Measure(position=position, span=span)
    found, _ = measure(subject(family), SETS, tokens, 4, lambda done, total: None)
    for name, each in found.items():
        at = range(position - span + 1, position + 1)
        by_hand = torch.stack([states_by_hand(family, name, one) for one in at]).mean(dim=0)
        assert each.mean_LH.dtype == torch.float64
        assert torch.allclose(each.mean_LH, by_hand.mean(dim=0), atol=1e-5)
        for half in (0, 1):
            assert torch.allclose(each.halves_2LH[half], by_hand[half::2].mean(dim=0), atol=1e-5)


def test_a_row_is_scored_by_the_direction_of_the_other_half() -> None:
    found, _ = measure(subject("mixtral"), SETS, Measure(), 4, lambda done, total: None)
    target, baseline = found[TARGET], found[BASELINE]
    rows = states_by_hand("mixtral", TARGET, -1)
    for row, scores_L in enumerate(target.scores_NL):
        other = 1 - row % 2
        for layer in range(2):
            b = baseline.halves_2LH[other, layer]
            r = target.halves_2LH[other, layer] - b
            r = r - (r @ b) / (b @ b) * b
            assert float(scores_L[layer]) == pytest.approx(float(rows[row, layer] @ (r / r.norm())), abs=1e-4)


def test_batches_do_not_matter_and_all_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    one, _ = measure(subject("mixtral"), SETS, Measure(), 1, lambda done, total: told.append((done, total)))
    many, _ = measure(subject("mixtral"), SETS, Measure(), 6, lambda done, total: None)
    assert told == [(done, 24) for done in range(1, 25)]
    for name in SETS:
        assert torch.allclose(one[name].mean_LH, many[name].mean_LH, atol=1e-6)
        assert torch.allclose(one[name].scores_NL, many[name].scores_NL, atol=1e-4)


def test_routing_is_that_of_a_routing_analysis() -> None:
    found = subject("mixtral")
    _, counts = measure(found, SETS, Measure(), 4, lambda done, total: None)
    assert found.layout is not None
    for name, each in counts.items():
        alone = count(found.model, found.layout, SETS[name], 4)
        assert (each.routed_NLE == alone.routed_NLE).all()
        assert (each.tokens_N == alone.tokens_N).all()
    assert measure(subject("llama"), SETS, Measure(), 4, lambda done, total: None)[1] == {}


@pytest.mark.parametrize(
    ("family", "norm"),
    [("mixtral", "post_attention_layernorm"), ("granitemoeshared", "post_attention_layernorm"),
     ("lfm2_moe", "ffn_norm"), ("cohere2_moe", "input_layernorm")],
)  # fmt: skip
def test_the_norm_before_a_router_is_found(family: str, norm: str) -> None:
    found = subject(family)
    assert found.layout is not None
    structure = structure_of(found, SETS[TARGET][0])
    assert structure.router_norms == dict.fromkeys(found.layout.moe_layers, norm)
    assert structure.normed_outputs == []


def test_norms_after_attention_and_experts_are_found() -> None:
    """FlexOlmo normalises what a block adds."""
    from tests.support.family_subject import Subject as Family

    family = Family("flex_olmo")
    found = structure_of(Subject(family.model(), tiny_models.tokenizer(), family.layout), SETS[TARGET][0])
    assert any("self_attn" in name for name in found.normed_outputs)
    assert any("mlp" in name for name in found.normed_outputs)
    assert set(found.router_norms.values()) == {None}
    assert found.output_norms.keys() == set(found.normed_outputs)
    assert {name.rpartition(".")[2] for name in found.output_norms.values()} == {
        "post_attention_layernorm", "post_feedforward_layernorm"
    }  # fmt: skip


def test_a_block_that_does_more_than_add_what_its_norms_return() -> None:
    model = tiny_models.model("olmo2")
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: 1.5 * output)
    found = structure_of(Subject(model, tiny_models.tokenizer(), None), SETS[TARGET][0])
    assert len(found.normed_outputs) == 4
    assert found.output_norms == {
        "model.layers.1.self_attn.o_proj": "model.layers.1.post_attention_layernorm",
        "model.layers.1.mlp.down_proj": "model.layers.1.post_feedforward_layernorm",
    }


def test_sets_that_are_alike_have_no_direction() -> None:
    same = {TARGET: SETS[TARGET], BASELINE: SETS[TARGET]}
    with pytest.raises(DataError, match=r"after decoder block 0 the two means are equal"):
        measure(subject("mixtral"), same, Measure(), 4, lambda done, total: None)


def test_states_that_are_not_finite_are_refused() -> None:
    found = subject("mixtral")
    with torch.no_grad():
        found.model.get_parameter("model.layers.1.self_attn.o_proj.weight").fill_(torch.inf)
    with pytest.raises(ModelError, match=r"after decoder block 1 are not finite"):
        measure(found, SETS, Measure(), 4, lambda done, total: None)


def spec(**options: object) -> AblationMeasureSpec:
    body = {"recipe": "ablation_measure", "model": str(folder_of("mixtral")), "options": {"max_length": 40}, **options,
            "data": {"sets": {"target": "a", "baseline": "b"}}, }  # fmt: skip
    return AblationMeasureSpec.model_validate(body)


def tokens_of(tmp_path: Path, row: dict[str, object], **options: object) -> list[int]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (prompt,) = prompt_rows.read(path, "rows", spec(**options), tiny_models.tokenizer(), 384)
    assert all(prompt.counts)
    return prompt.ids


def test_a_prompt_ends_with_the_generation_prompt_and_answers_are_not_read(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    asked = {"role": "user", "content": "Hi"}
    alone = tokens_of(tmp_path, {"messages": [asked]})
    assert tokenizer.decode(alone) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens_of(tmp_path, {"messages": [asked, {"role": "assistant", "content": "Hello"}]}) == alone
    assert tokenizer.decode(tokens_of(tmp_path, {"text": "In spring"})) == "In spring", "without an end"


def test_a_row_that_is_too_long_or_too_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'rows': 1 row\(s\) can't be measured: row 1: it has \d+ tokens, more than "):
        tokens_of(tmp_path, {"text": "In spring " * 40})
    with pytest.raises(DataError, match=r"none at measure.position = -30"):
        tokens_of(tmp_path, {"text": "In"}, measure={"position": -30})
    with pytest.raises(DataError, match=r"it has 1 tokens up to measure.position = 0, fewer than measure.span"):
        tokens_of(tmp_path, {"text": "In spring"}, measure={"position": 0, "span": 2})


def test_a_quantised_model_is_measured() -> None:
    """Its states differ from the plain model's by the rounding of its weights, and not by more."""
    plain = load_subject(spec(training={"dtype": "fp32"}))
    coded = load_subject(spec(training={"dtype": "fp32", "quantize_bits": 8}))
    one, many = (measure(each, SETS, Measure(), 4, lambda done, total: None)[0][TARGET] for each in (plain, coded))
    distance = float((one.mean_LH - many.mean_LH).norm() / one.mean_LH.norm())
    assert 1e-6 < distance < 0.1


def test_a_quantised_model_is_measured_with_its_adapter(tmp_path: Path) -> None:
    """The adapter takes a direction out of the experts, whose weights are codes that it can't be folded into."""
    folder = tiny_models.build("mixtral", tmp_path / "mixtral")
    found = measured(folder)
    wanted = plan("0-1", ablate_individual_experts=True, norm_preserving="off")
    write_adapter(str(folder), wanted, found, tmp_path / "adapter")
    training = {"dtype": "fp32", "quantize_bits": 8}
    body = {"model": str(folder), "training": training}
    without, coded = (
        load_subject(spec(**body, **changes)) for changes in ({}, {"adapter_folder": str(tmp_path / "adapter")})
    )
    plain = load_subject(spec(**body | {"training": {"dtype": "fp32"}}, adapter_folder=str(tmp_path / "adapter")))
    states = [measure(each, SETS, Measure(), 4, lambda done, total: None)[0][TARGET].mean_LH[-1]
              for each in (plain, coded, without)]  # fmt: skip
    assert float((states[0] - states[1]).norm()) < 0.2 * float((states[0] - states[2]).norm())


def by_hand(target: list[list[float]], baseline: list[list[float]]) -> Measurements:
    """Measurements of one block from the states of four rows a set, of width 2; scores are the second numbers."""
    made = []
    for rows in (target, baseline):
        states = torch.tensor(rows, dtype=torch.float64)
        halves = torch.stack([states[0::2].mean(dim=0), states[1::2].mean(dim=0)])
        made.append(MeasuredStates(states.mean(dim=0)[None], halves[:, None], states[:, 1:].float()))
    found = measured(folder_of("mixtral")).provenance.model_copy(update={"layers": 1, "width": 2})
    return Measurements(found, made[0], made[1])


def test_figures_by_hand() -> None:
    """Means (1, 3) and (1, 0): the difference (0, 3) is orthogonal to the baseline's mean, and orders all pairs."""
    report = analyze(by_hand([[1, 2], [1, 2], [1, 4], [1, 4]], [[1, -1], [1, -1], [1, 1], [1, 1]]))
    (found,) = report.layers
    assert found.cosine == pytest.approx(1 / 10**0.5, abs=1e-6)
    assert found.signal_to_noise == pytest.approx(3 / 10**0.5, abs=1e-6)
    assert (found.purity, found.stability, found.auc) == (1, 1, 1)
    # Both halves: gap 3, and each set's two scores differ by 2, so their variance is 2.
    assert found.separation == pytest.approx(3 / 2**0.5, abs=1e-6)
    assert report.agreement.projected == [[1.0]]
    # Half of the pairs tied, half in order.
    half = analyze(by_hand([[1, 0], [1, 0], [1, 1], [1, 1]], [[1, 0], [1, 0], [1, 0], [1, 0]])).layers[0]
    assert half.auc == 0.75


def test_the_command_writes_measurements_routing_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, subjects in (("target", "the garden in spring"), ("baseline", "two and three")):
        rows = [{"prompt": f"Tell me {number} facts of {subjects}"} for number in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = [str(folder_of("mixtral")), "--rows", f"target={tmp_path / 'target.jsonl'}", "--rows",
             f"baseline={tmp_path / 'baseline.jsonl'}", "--dtype", "fp32", "--out", str(tmp_path / "out")]  # fmt: skip
    assert measure_main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    found = read(tmp_path / "out" / MEASUREMENTS_FILE, "f")
    assert {name: each.rows for name, each in found.provenance.sets.items()} == {"target": 6, "baseline": 6}
    assert found.provenance.router_norms == {0: "post_attention_layernorm", 1: "post_attention_layernorm"}
    assert text(analyze(found)) in shown.out
    assert "24 of 24 passes of rows" in shown.err
    routing = RoutingReport.model_validate_json((tmp_path / "out" / "routing.json").read_bytes())
    assert set(routing.sets) == {"target", "baseline"}
    assert (tmp_path / "out" / "difference.png").exists() == installed()
    assert measure_main(words) == 2
    assert "--out" in capsys.readouterr().err
