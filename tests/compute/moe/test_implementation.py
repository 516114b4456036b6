"""Which implementation computes the experts: the decision on each device, without a GPU."""

from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.moe import implementation
from llama_stack_provider_moe.compute.moe.backend import (
    OURS,
    OURS_PARTIAL,
    QUACK,
    QUACK_PARTIAL,
    TRITON,
    TRITON_PARTIAL,
    kernels_of,
)
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.implementation import (
    Decision,
    ImplementationChoice,
    available,
    by_settings,
    check,
    choose,
    limitations,
)
from llama_stack_provider_moe.compute.moe.kernel_choice import Trial, Trials
from llama_stack_provider_moe.compute.moe.kernel_trial import TrialLayer
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import JOB_SPEC, TrainingSpec
from tests.support import tiny_models

pytest.importorskip("triton", reason="triton is published for Linux only")
from llama_stack_provider_moe.compute.moe.kernels import quack, tiles

TILES = (
    tiles.Choice("times", (32, "a shape"), tiles.Tiles(32, 16, 16)),
    tiles.Choice("times", (128, "a shape"), tiles.Tiles(128, 16, 16)),
)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def job(**blocks: Any) -> TrainingSpec:
    body = {"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}}
    spec: Any = JOB_SPEC.validate_python(body | blocks)
    return spec  # type: ignore[no-any-return]


def model_of(family: str) -> tuple[Any, ExpertLayout]:
    model = tiny_models.model(family)
    layout = find_layout(model)
    assert layout is not None
    return model, layout


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision sees an sm_90 GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def trials(monkeypatch: pytest.MonkeyPatch, torch_ms: float, triton_ms: float | None) -> list[TrialLayer]:
    """The trial finds these times; the result collects the layers that it is called with."""
    calls: list[TrialLayer] = []

    def found(form: TrialLayer) -> Trials:
        calls.append(form)
        return Trials(Trial(torch_ms), Trial(triton_ms, "" if triton_ms else "failed"), form.tokens, TILES)

    monkeypatch.setattr(implementation, "run_trial", found)
    return calls


def chosen(spec: TrainingSpec, model: Any, layout: ExpertLayout, device: torch.device) -> ImplementationChoice:
    return choose(spec, spec.moe, model, layout, device, lambda decide: decide())


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
@pytest.mark.parametrize(("balancing", "names"), [
    ("switch", (OURS, TRITON)), ("expert_choice", (OURS_PARTIAL, TRITON_PARTIAL)),
])  # fmt: skip
def test_auto_takes_the_faster_kernels_on_a_gpu(
    family: str, balancing: str, names: tuple[str, str], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(moe={"moe_load_balancing": balancing}, training={"batch_size": 2}, options={"max_length": 1024})
    for torch_ms, triton_ms, expected in ((2.0, 1.0, names[1]), (1.0, 2.0, names[0]), (1.0, None, names[0])):
        trials(monkeypatch, torch_ms, triton_ms)
        choice = chosen(spec, *model_of(family), GPU)
        assert choice.implementation == expected
        assert choice.notes[0].startswith("one layer forward and backward, 2,048 tokens: torch ")
    assert chosen(spec, *model_of(family), CPU) == ImplementationChoice(names[0]), "nothing to time on a CPU"


@pytest.mark.parametrize(("blocks", "expected"), [
    ({"training": {"batch_size": 2}, "options": {"max_length": 1024}}, {"tokens": 2048, "rank": 0, "trains": True}),
    ({"training": {"batch_size": 9}, "options": {"max_length": 1024},
      "adapter": {"rank": 4, "dropout": 0.1, "expert_modules": ["down_proj"]}, "moe": {"expert_dropout": 0.2}},
     {"tokens": 9216, "rank": 4, "lora_dropout": 0.1, "expert_dropout": 0.2, "adapts_up": False}),
    ({"training": {"batch_size": 1}, "options": {"max_length": 64}, "adapter": {"plan": "trunk", "dropout": 0.1}},
     {"tokens": 64, "rank": 0, "trains": False}),
])  # fmt: skip
def test_the_trial_runs_a_layer_at_the_jobs_sizes(
    blocks: dict[str, Any], expected: dict[str, Any], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = trials(monkeypatch, 2.0, 1.0)
    model, layout = model_of("mixtral")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # the oldest for Triton's kernels
    chosen(job(**blocks), model, layout, GPU)
    [form] = calls
    expected = {"lora_dropout": 0.0, "expert_dropout": 0.0, "adapts_up": True, "trains": False} | expected
    assert {name: getattr(form, name) for name in expected} == expected
    assert (form.hidden, form.top_k, form.experts, form.device, form.dtype) == (32, 2, 4, "cuda:0", "float32")


def test_a_job_uses_the_tiles_that_its_trial_chose(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of these shapes is timed any more: other numbers of rows get the nearest one's tiles."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "_CHOSEN", {})
    monkeypatch.setattr(tiles, "_AHEAD", set())
    trials(monkeypatch, 2.0, 1.0)
    assert chosen(job(), *model_of("mixtral"), GPU).implementation == TRITON
    candidates = (tiles.Tiles(16, 16, 16), tiles.Tiles(32, 32, 32))
    for rows, expected in ((16, 32), (32, 32), (64, 128), (128, 128), (1024, 128)):
        found = tiles.best("times", (rows, "a shape"), candidates, GPU, None)  # type: ignore[arg-type]
        assert found.rows == expected, rows


@pytest.fixture
def quack_ms(gpu: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """The times of a trial, by kernels; quack-kernels are installed."""
    ms: dict[str, float | None] = {"torch": 3.0, "triton": 2.0, "quack": 1.0}

    def found(form: TrialLayer) -> Trials:
        other = ms[form.kernels]
        why = "" if other else "failed"
        return Trials(
            Trial(ms["torch"]), Trial(other, why), form.tokens, () if form.kernels == "quack" else TILES, form.kernels
        )

    monkeypatch.setattr(implementation, "run_trial", found)
    monkeypatch.setattr(quack, "installed", lambda: "0.6.5")
    return ms


@pytest.mark.parametrize(("triton", "quacks", "expected"), [
    (2.0, 1.0, QUACK), (1.0, 2.0, TRITON), (None, 2.0, QUACK), (2.0, None, TRITON), (4.0, 5.0, OURS),
    (None, None, OURS),
])  # fmt: skip
def test_auto_compares_quack_kernels_where_they_are_installed(
    triton: float | None, quacks: float | None, expected: str, quack_ms: dict[str, float | None]
) -> None:
    quack_ms |= {"triton": triton, "quack": quacks}
    model, layout = model_of("mixtral")
    choice = chosen(job(), model.bfloat16(), layout, GPU)
    assert choice.implementation == expected
    assert ["triton" in choice.notes[0], "quack" in choice.notes[1]] == [True, True]


def test_quack_kernels_by_name(quack_ms: dict[str, float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job(moe={"experts_backend": "quack", "moe_load_balancing": "expert_choice"})
    model, layout = model_of("mixtral")
    with pytest.raises(ModelError, match=r"'quack' is not valid here: they compute in bf16 and fp16, not in float32"):
        chosen(spec, model, layout, GPU)
    model.bfloat16()
    quack_ms |= {"quack": 9.0}
    assert chosen(spec, model, layout, GPU).implementation == QUACK_PARTIAL, "however slow"
    quack_ms |= {"quack": None}
    with pytest.raises(ModelError, match=r"'quack' is not valid here: .* quack failed; expected 'auto' or 'torch'"):
        chosen(spec, model, layout, GPU)
    with pytest.raises(ModelError, match=r"'quack' is not valid here; it needs a CUDA GPU .* \(extra 'quack'\)"):
        check(spec, QUACK_PARTIAL, CPU)
    check(spec, QUACK_PARTIAL, GPU)
    assert available(QUACK, "cpu") == OURS
    monkeypatch.setattr(quack, "installed", lambda: None)
    with pytest.raises(
        ModelError, match=r"'quack' is not valid here: quack-kernels is not installed \(extra 'quack'\)"
    ):
        chosen(spec, model, layout, GPU)
    assert len(chosen(job(), model, layout, GPU).notes) == 1, "auto does not speak of what nobody installed"


def test_the_notes_of_the_settings_are_not_repeated() -> None:
    spec = job(moe={"experts_backend": "peft"})
    model, layout = model_of("llama4_text")
    assert by_settings(spec.moe, layout).notes
    assert chosen(spec, model, layout, CPU) == ImplementationChoice("eager")


def test_every_process_follows_rank_0(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others run no trial of their own."""
    calls = trials(monkeypatch, 2.0, 1.0)
    of_rank_0 = ImplementationChoice(OURS, ("rank 0 measured",))
    spec = job()
    choice = choose(spec, spec.moe, *model_of("mixtral"), GPU, lambda decide: Decision(of_rank_0))
    assert choice == of_rank_0
    assert not calls


def test_triton_by_name_is_tried_too_and_refused_if_it_is_wrong(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job(moe={"experts_backend": "triton"})
    trials(monkeypatch, 1.0, 2.0)
    choice = chosen(spec, *model_of("mixtral"), GPU)
    assert choice.implementation == TRITON, "however slow"
    assert "torch 1 ms, triton 2 ms" in choice.notes[0]
    trials(monkeypatch, 1.0, None)
    with pytest.raises(
        ModelError, match=r"moe\.experts_backend: 'triton' is not valid here: .* triton failed; expected"
    ):
        chosen(spec, *model_of("mixtral"), GPU)


@pytest.mark.parametrize(("moe", "expected"), [
    ({"experts_backend": "torch"}, OURS),
    ({"experts_backend": "peft"}, "grouped_mm"), ({"enable_moe_optimizations": False}, "eager"),
])  # fmt: skip
def test_an_implementation_of_torch_that_was_named_is_not_tried(
    moe: dict[str, Any], expected: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = trials(monkeypatch, 1.0, 1.0)
    assert chosen(job(moe=moe), *model_of("mixtral"), GPU) == ImplementationChoice(expected)  # type: ignore[arg-type]
    assert not calls


@pytest.mark.parametrize(("blocks", "reason"), [
    ({"options": {"deterministic": True}}, "timing must not decide in a repeatable job (options.deterministic)"),
    ({"resources": {"strategy": "ep", "gpus": 2}}, "each process holds different experts (resources.strategy ep)"),
])  # fmt: skip
def test_settings_that_rule_out_a_trial(blocks: dict[str, Any], reason: str, gpu: None) -> None:
    """Nothing is timed, so this holds without a GPU too."""
    choice = chosen(job(**blocks), *model_of("mixtral"), GPU)
    assert choice == ImplementationChoice(OURS, (f"Triton's kernels were not tried: {reason}",))


def test_an_old_gpu_rules_out_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    choice = chosen(job(), *model_of("mixtral"), GPU)
    assert choice == ImplementationChoice(OURS, ("Triton's kernels were not tried: they need sm_80 or newer",))
    with pytest.raises(ModelError, match=r"'triton' is not valid here: they need sm_80 or newer; expected 'auto'"):
        chosen(job(moe={"experts_backend": "triton"}), *model_of("mixtral"), GPU)


def test_a_missing_triton_rules_out_a_trial(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "find_spec", lambda name: None)
    choice = chosen(job(), *model_of("mixtral"), GPU)
    assert choice == ImplementationChoice(OURS, ("Triton's kernels were not tried: triton is not installed",))


def test_triton_without_a_gpu_is_refused() -> None:
    spec = job(moe={"experts_backend": "triton"})
    for name in (TRITON, TRITON_PARTIAL):
        with pytest.raises(ModelError, match=r"moe\.experts_backend: 'triton' is not valid here; it needs a CUDA GPU"):
            check(spec, name, CPU)
        check(spec, name, GPU)


def test_quantised_experts_need_our_kernels() -> None:
    spec = job(adapter={"quantize_base": True})
    for name in ("grouped_mm", "eager"):
        with pytest.raises(
            ModelError, match=rf"quantize_base: true is not valid with .*, which compute experts by {name}; expected"
        ):
            check(spec, name, CPU)  # type: ignore[arg-type]
        check(job(adapter={}), name, CPU)  # type: ignore[arg-type]
    for fine in (OURS, OURS_PARTIAL, None):
        check(spec, fine, CPU)


def test_limitations_of_the_kernels_are_reported() -> None:
    model, layout = model_of("mixtral")
    experts: Any = next(iter(layout.experts(model).values()))
    assert limitations(experts, OURS, CPU, rank=256) == []
    assert limitations(experts, TRITON, CPU, rank=64) == []
    assert limitations(experts, TRITON, CPU, rank=65) == [
        "LoRA of rank 65 takes products of its own: one pass with the base holds at most rank 64"
    ]
    experts.act_fn = torch.nn.GELU()
    assert limitations(experts, TRITON, CPU, rank=0) == [
        "torch computes the activation of MixtralExperts: no kernel has its formula"
    ]
    assert kernels_of(TRITON) is not kernels_of(OURS)


@pytest.mark.parametrize(("blocks", "rank"), [
    ({}, 0), ({"moe": {"expert_dropout": 0.1}}, 0), ({"adapter": {"rank": 65, "dropout": 0.1}}, 65),
    ({"adapter": {"rank": 65}}, 65), ({"adapter": {"rank": 65, "plan": "trunk"}}, 0),
])  # fmt: skip
def test_what_of_a_job_concerns_the_kernels(
    blocks: dict[str, Any], rank: int, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials(monkeypatch, 2.0, 1.0)
    blocks = blocks | {"moe": {"experts_backend": "triton", **blocks.get("moe", {})}}
    choice = chosen(job(**blocks), *model_of("mixtral"), GPU)
    text = "; ".join(choice.notes)
    assert ("LoRA of rank 65" in text) == (rank == 65)
    assert "are kept" not in text, "dropout is recomputed as everything else is"


def test_the_same_computation_without_a_gpu() -> None:
    assert [available(name, "cpu") for name in (TRITON, TRITON_PARTIAL, "grouped_mm", OURS)] == [
        OURS, OURS_PARTIAL, "grouped_mm", OURS,
    ]  # fmt: skip
    assert available(TRITON, "cuda") == TRITON
