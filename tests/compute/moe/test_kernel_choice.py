"""The trial of kernels in a child process: here Triton's are interpreted on the CPU, whole and with faults."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.kernel_choice import (
    Limits,
    Trial,
    Trials,
    form_of,
    rank_on_experts,
    run_trial,
)
from llama_stack_provider_moe.compute.moe.kernel_trial import Layer, TrialLayer, sizes
from llama_stack_provider_moe.compute.moe.kernels import reference
from llama_stack_provider_moe.compute.moe.kernels.agreement import AGREES, disagreement, worst_error
from llama_stack_provider_moe.compute.moe.quantize import quantize
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter, TrainingSpec
from tests.support import tiny_models, warm_trials

pytest.importorskip("triton", reason="triton is published for Linux only")
CPU = torch.device("cpu")
Child = Callable[[str], tuple[str, ...]]
SMALL = TrialLayer(16, 32, 32, 64, 2, 2, "float32", "cpu", rank=4)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """The command of a trial with a fault."""
    address = tmp_path_factory.mktemp("warm") / "socket"
    with warm_trials.warm(address):
        yield partial(warm_trials.command, address)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def job(**blocks: Any) -> TrainingSpec:
    spec: Any = JOB_SPEC.validate_python({"recipe": "sft", "model": "m", "data": {"dataset_id": "d"}} | blocks)
    return spec  # type: ignore[no-any-return]


@pytest.mark.parametrize("changes", [
    {"dtype": "bfloat16", "activation": "clamped", "alpha": 1.7, "limit": 7.0, "biased": True, "transposed": True},
    {"rank": 0, "trains": True, "biased": True}, {"lora_dropout": 0.2, "expert_dropout": 0.1},
])  # fmt: skip
def test_correct_kernels_pass_in_every_form_of_layer(child: Child, changes: dict[str, Any]) -> None:
    """Interpreted, Triton takes longer, so torch is kept; no tiles are timed."""
    trials = run_trial(replace(SMALL, **changes), child("none"))
    assert trials.torch.ms is not None
    assert trials.other.ms is not None, trials.text()
    assert not trials.prefer_other
    assert trials.text().startswith("one layer forward and backward, 16 tokens: torch ")


@pytest.mark.parametrize(("fault", "reason"), [
    ("raises", "the kernel has had enough (exit code 1); it is not used"),
    ("asserts", "killed by SIGABRT; it is not used"),
    ("ends", "exit code 0; it is not used"),
    ("is killed", "killed by SIGKILL; it is not used"),
    ("has a wrong tile", "of the norm in a block of (16, 32) with 16 tokens"),
    ("has a NaN", "is off by nan of the norm in a block of (16, 32) with 16 tokens"),
])  # fmt: skip
def test_a_fault_ends_the_trial_and_not_this_process(child: Child, fault: str, reason: str) -> None:
    trials = run_trial(SMALL, child(fault))
    assert trials.torch.ms is not None
    assert trials.other.ms is None
    assert reason in trials.other.reason
    assert trials.tiles == ()
    assert not trials.prefer_other
    assert f"triton {trials.other.reason}" in trials.text()


@pytest.mark.parametrize(("fault", "reason"), [
    ("none", ""), ("raises", "the kernel has had enough (exit code 1); it is not used"),
    ("has a wrong tile", "of the norm in a block of (16, 32) with 16 tokens"),
])  # fmt: skip
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_quack_kernels_have_the_same_trial(child: Child, fault: str, reason: str, dropout: float) -> None:
    form = replace(SMALL, dtype="bfloat16", kernels="quack", lora_dropout=dropout, expert_dropout=dropout / 2)
    trials = run_trial(form, child(fault))
    assert trials.torch.ms is not None
    assert (trials.other.ms is None) == bool(reason), trials.text()
    assert reason in trials.other.reason
    assert trials.tiles == ()
    assert ", quack " in trials.text()


def test_quack_kernels_that_are_not_there_fail_their_trial() -> None:
    trials = run_trial(replace(SMALL, dtype="bfloat16", kernels="quack"))
    assert trials.other.ms is None
    assert "No module named 'quack' (exit code 1); it is not used" in trials.other.reason


@pytest.mark.parametrize(("limits", "reason"), [
    (Limits(silence_s=5), "no sign of life for 5 s; it is not used"),
    (Limits(whole_s=3), "it took more than 3 s; it is not used"),
])  # fmt: skip
def test_a_trial_that_hangs_is_ended(child: Child, limits: Limits, reason: str) -> None:
    trials = run_trial(SMALL, child("hangs"), limits)
    assert trials.other.ms is None
    assert trials.other.reason.endswith(reason)


def test_a_child_that_never_starts_is_a_failed_trial() -> None:
    trials = run_trial(SMALL, (sys.executable, "-c", "raise SystemExit('no torch here')"))
    assert trials.torch.ms is None
    assert not trials.prefer_other
    assert trials.text() == (
        "one layer forward and backward, 16 tokens: triton failed in a trial of its own process, at its start: no "
        "torch here (exit code 1); it is not used"
    )


def test_the_fastest_kernel_wins() -> None:
    trials = Trials(Trial(2.5), Trial(1.25), 8192)
    assert trials.prefer_other
    assert trials.text() == "one layer forward and backward, 8,192 tokens: torch 2.5 ms, triton 1.25 ms"
    assert not Trials(Trial(1.25), Trial(2.5), 1).prefer_other
    assert not Trials(Trial(1.25), Trial(None, "failed"), 1).prefer_other


@pytest.mark.parametrize(("family", "bits"), [
    ("mixtral", None), ("gpt_oss", None), ("llama4_text", None), ("qwen3_moe", 4)
])  # fmt: skip
def test_the_trials_layer_has_the_form_of_the_models(family: str, bits: Any) -> None:
    """Shapes, strides, biases and activation; the trial's layer runs, with gradients of LoRA's shapes."""
    model = tiny_models.model(family)
    layout = find_layout(model)
    assert layout is not None
    if bits is not None:
        quantize(model, layout, Coding(bits), CPU)
    experts: Any = next(iter(layout.experts(model).values()))
    adapter = {"rank": 4, "dropout": 0.1, "quantize_base": bits is not None}
    form = form_of(job(adapter=adapter), experts, layout, CPU, 19)
    hidden = model.config.get_text_config().hidden_size
    assert (form.hidden, form.experts, form.top_k, form.tokens) == (hidden, layout.num_experts, layout.top_k, 19)
    assert (form.bits, form.rank, form.lora_dropout, form.trains) == (bits, 4, 0.1, False)
    assert form.transposed == layout.transposed
    layer = Layer(form)
    for mine, name in ((layer.up, layout.gate_up), (layer.down, layout.down)):
        weight = experts.get_parameter(name)
        assert tuple(mine.weight.shape) == tuple((weight.mT if form.transposed else weight).shape)
        assert (mine.bias_EO is not None) == layout.biased
        if isinstance(mine.weight, torch.Tensor):
            assert mine.weight.stride() == (weight.mT if form.transposed else weight).stride()
    out, *gradients = layer.on(19)(reference)
    assert out.shape == (19, hidden)
    assert [tuple(each.shape) for each in gradients] == [
        tuple(leaf.shape) for leaf in (torch.empty(19, hidden), torch.empty(19, layout.top_k), *layer.leaves)
    ]
    assert len(layer.leaves) == 4


@pytest.mark.parametrize(("adapter", "rank"), [
    ({"rank": 8}, 8), ({"plan": "trunk", "rank": 8}, 0), ({"rank": 8, "apply_lora_to_mlp": False}, 0),
    ({"plan": "per_expert", "rank": 8, "rules": [{"experts": {"0": 4, "1": 32}}]}, 32),
])  # fmt: skip
def test_the_rank_of_a_plan_on_experts(adapter: dict[str, Any], rank: int) -> None:
    assert rank_on_experts(Adapter(**adapter)) == rank


def test_every_size_of_tiles_up_to_the_batch_is_tried() -> None:
    form = TrialLayer(32768, 2048, 768, 1536, 128, 8, "bfloat16", "cuda:0")
    assert sizes(form, 1024) == [16384, 8192, 4096, 2048, 1024, 512, 256], "1,024 rows an expert down to 16"
    assert sizes(replace(form, tokens=100), 1024) == [100]
    assert sizes(replace(form, tokens=1, top_k=1), 1024) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_wrong_tile_shows_in_any_tensor(dtype: torch.dtype) -> None:
    """Although it is less than a rounding error of the whole tensor's norm; rounding itself does not show."""
    true = torch.randn(2048, 1536, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = true.to(dtype)
    rounded = (true.float() * (1 + 2**-10 * torch.randn(2048, 1536).clamp(-1, 1) * (dtype != torch.float32))).to(dtype)
    assert disagreement([rounded], [expected]) is None
    wrong = rounded.clone()
    wrong[512:528, 1024:1040] = 0
    of_the_whole = float((wrong.float() - expected.float()).norm() / expected.float().norm())
    assert of_the_whole < AGREES[torch.bfloat16] < 0.9 < worst_error(wrong, expected)
    assert "is off by 1 of the norm in a block of (2048, 1536)" in str(disagreement([wrong], [expected]))
    for shape in ((5,), (3, 7), (2, 5, 40)):  # smaller than a block, and with edges
        small = torch.ones(shape, dtype=dtype)
        assert worst_error(small, small) == 0
        spoilt = small.clone()
        spoilt.view(-1)[-1] = torch.nan
        assert disagreement([spoilt], [small]) is not None
    assert worst_error(torch.ones(0, 4), torch.ones(0, 4)) == 0
