"""bitsandbytes' optimisers with our bounds, LoRA in bf16, and what a job says and refuses of both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.train import optimizers
from llama_stack_provider_moe.compute.train.optimizers import BoundedAdamW, foreseen, found, longest_step, rounded
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.spec import JOB_SPEC, Optimizer
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

IN_8_BITS = Optimizer(optimizer_type="adamw_8bit", min_8bit_size=16, lr=1e-3)
BF16: dict[str, Any] = {
    "training": {"dtype": "bf16"}, "adapter": {"dtype": "bf16"},
    "optimizer": {"optimizer_type": "adamw_8bit", "min_8bit_size": 64},
}  # fmt: skip


def made(weights: list[nn.Parameter], settings: Optimizer = IN_8_BITS, seed: int = 0) -> BoundedAdamW:
    return BoundedAdamW(weights, lr=settings.lr, settings=settings, seed=seed, looked_up=frozenset())


@pytest.mark.parametrize("shape", [(33, 130), (3, 50, 41), (7, 999)], ids=str)
def test_moments_in_8_bits_give_nearly_the_steps_of_torch(shape: tuple[int, ...]) -> None:
    """Stacked experts too, and blocks that are not filled."""
    torch.manual_seed(0)
    coded = nn.Parameter(torch.randn(shape))
    exact = nn.Parameter(coded.detach().clone())
    pair = made([coded]), torch.optim.AdamW([exact], lr=IN_8_BITS.lr, weight_decay=0)
    start = coded.detach().clone()
    for _ in range(10):
        coded.grad = torch.randn(shape)
        exact.grad = coded.grad.clone()
        for each in pair:
            each.step()
    assert (coded - exact).norm() < 0.03 * (exact - start).norm()
    numbers = coded.numel()
    assert found(pair[0]).bytes == 2 * numbers + 8 * -(-numbers // 256)


def test_a_quiet_expert_beside_busy_ones_takes_no_giant_step() -> None:
    """Its second moment has code 0 and its first has not, as rounding to the nearest code leaves them."""
    steps = {}
    for name in ("plain", "bounded"):
        weight = nn.Parameter(torch.ones(256))
        optimizer = made([weight]) if name == "bounded" else AdamW([weight], lr=1e-3, weight_decay=0, optim_bits=8,
                                                                   min_8bit_size=16)  # fmt: skip
        weight.grad = torch.ones(256)
        optimizer.step()
        state = optimizer.state[weight]
        state["state2"][128:] = 0  # the code of 0
        before = weight.detach().clone()
        weight.grad = torch.cat([torch.ones(128), torch.zeros(128)])
        optimizer.step()
        steps[name] = (weight - before).abs()
    assert steps["plain"][128:].min() > 1000, "bitsandbytes divides by its epsilon alone"
    assert steps["bounded"].max() <= longest_step(0.9, 0.999) * 1e-3 * 1.001
    assert torch.equal(steps["bounded"][:128], steps["plain"][:128]), "ordinary steps do not change"


def test_no_exact_step_is_longer_than_the_bound() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0, eps=1e-30)
    longest = 0.0
    # The gradients that make it longest grow by b1 / b2 a step backwards (equality in Cauchy-Schwarz).
    for step in range(400):
        before = weight.item()
        weight.grad = torch.tensor([(0.999 / 0.9) ** (step - 300)])
        optimizer.step()
        longest = max(longest, abs(weight.item() - before))
    assert 0.5 * longest_step(0.9, 0.999) < longest < longest_step(0.9, 0.999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_zero_and_has_no_gradient_stays_zero(dtype: torch.dtype) -> None:
    """The ranks that an expert does not use, beside large numbers of others in the same block."""
    weight = nn.Parameter(torch.cat([torch.zeros(100), torch.ones(156)]).to(dtype))
    optimizer = made([weight])
    for _ in range(5):
        weight.grad = torch.cat([torch.zeros(100), torch.randn(156)]).to(dtype)
        optimizer.step()
    assert not weight[:100].any()
    assert (weight[100:] != 1).any()


def test_a_bf16_weight_moves_by_its_small_steps_on_average() -> None:
    """Steps of 1e-4 of a weight of 1, whose next numbers are 2**-8 and 2**-7 away: plain rounding loses all."""
    ends = {}
    for kind in ("adamw_8bit", "torch"):
        weight = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        settings = Optimizer(optimizer_type="adamw_8bit", lr=1e-4)
        optimizer = made([weight], settings) if kind != "torch" else torch.optim.AdamW([weight], 1e-4, weight_decay=0)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert weight.dtype == weight.grad.dtype == torch.bfloat16
        ends[kind] = weight.float().mean().item()
    assert ends["torch"] == 1
    assert ends["adamw_8bit"] == pytest.approx(1 - 20e-4, abs=1e-4)


def test_rounding_at_random_is_repeatable_and_keeps_what_is_not_finite() -> None:
    wide = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.5])
    narrow = rounded(wide, torch.Generator().manual_seed(1))
    assert torch.equal(narrow.float().nan_to_num(7), wide.nan_to_num(7)), "these are bf16 numbers already"
    start = torch.randn(5000, dtype=torch.bfloat16)
    runs = []
    for seed in (3, 3, 4):
        weight = nn.Parameter(start.clone())
        optimizer = made([weight], seed=seed)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        runs.append(weight.detach())
    assert torch.equal(runs[0], runs[1]), "whatever else draws random numbers meanwhile"
    assert not torch.equal(runs[0], runs[2])


def test_a_state_that_was_saved_gives_the_same_steps() -> None:
    """Of the paged class too, whose state goes into buffers of its own (plain ones on a CPU)."""
    for kind in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw"):
        settings = Optimizer(optimizer_type=kind, lr=1e-3)
        pair = [nn.Parameter(torch.ones(70, 100)), nn.Parameter(torch.ones(3))]
        first = made(pair, settings)
        first._cpu_paged_warned = True  # bitsandbytes' warning that jobs never see, because they are refused
        for weight in pair:
            weight.grad = torch.randn_like(weight)
        first.step()
        copies = [nn.Parameter(weight.detach().clone()) for weight in pair]
        second = made(copies, settings)
        second._cpu_paged_warned = True
        second.load_state_dict(first.state_dict())
        for weight, copy in zip(pair, copies, strict=True):
            copy.grad = weight.grad
        first.step()
        second.step()
        assert all(torch.equal(one, other) for one, other in zip(pair, copies, strict=True))


def test_embeddings_and_small_weights_keep_32_bits() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100), nn.LayerNorm(100))
    settings = Optimizer(optimizer_type="adamw_8bit")
    optimizer = BoundedAdamW(model.parameters(), **optimizers.arguments_of(settings, model, 0, False))  # type: ignore[arg-type]
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    assert found(optimizer) == foreseen(settings, model)
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.float32
    assert optimizer.state[model[1].weight]["state1"].dtype == torch.uint8
    assert (found(optimizer).coded, found(optimizer).whole) == (1, 4)


def test_a_job_trains_lora_on_experts_in_8_and_16_bits(workshop: Workshop) -> None:
    """Losses as with fp32 and torch's AdamW; weights, gradients, state, files and the log are what was asked for."""
    blocks: dict[str, Any] = {"training": {"dtype": "bf16", "n_epochs": 6}, "optimizer": {"lr": 2e-2}}
    plain = workshop.run("sft", "mixtral", **blocks)
    for name, block in BF16.items():
        blocks[name] = {**blocks.get(name, {}), **block}
    small = workshop.run("sft", "mixtral", **blocks)
    assert (plain.exit_code, small.exit_code) == (COMPLETED, COMPLETED), small.reason
    curves = [run.steps("loss") for run in (plain, small)]
    fall = curves[0][0] - curves[0][-1]
    assert fall > 0.5, "the model learns"
    worst = max(abs(one - other) for one, other in zip(*curves, strict=True))
    assert worst < 0.1 * fall, curves
    assert {tensor.dtype for tensor in small.adapter().values()} == {torch.bfloat16}
    told = small.resolved["optimizer"]
    assert told["coded"] > told["whole"], told
    assert any("rounded at random" in note for note in small.resolved["adapter"]["notes"])


def test_lora_in_bf16_merges_in_the_job_as_on_disk(workshop: Workshop, tmp_path: Path) -> None:
    run = workshop.run("sft", "granitemoe", **BF16, options={"save_merged": True})
    assert run.exit_code == COMPLETED, run.reason
    merge(workshop.model("granitemoe"), run.folder.root, tmp_path / "merged", dtype="bf16")
    here, there = (
        load_file(folder / "model.safetensors") for folder in (run.folder.artifacts / "merged", tmp_path / "merged")
    )
    assert here.keys() == there.keys()
    assert {tensor.dtype for name, tensor in here.items() if tensor.dim() > 1} == {torch.bfloat16}
    for name, tensor in here.items():
        torch.testing.assert_close(tensor.float(), there[name].float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ({"optimizer": {"optimizer_type": "paged_adamw"}, "resources": {"gpus": 0}},
         "optimizer.optimizer_type: 'paged_adamw' is not valid with resources.gpus 0; expected 'adamw'"),
        ({"optimizer": {"optimizer_type": "adamw_8bit"}, "resources": {"gpus": 2, "strategy": "fsdp"}},
         "optimizer.optimizer_type 'adamw_8bit', whose state can't be divided"),
        ({"optimizer": {"optimizer_type": "adamw_8bit"}, "resources": {"gpus": 2, "strategy": "ep"}},
         "optimizer.optimizer_type 'adamw_8bit', whose state can't be divided"),
        ({"optimizer": {"min_8bit_size": 10}}, "min_8bit_size: is used only with optimizer_type"),
        ({"optimizer": {"optimizer_type": "adamw_8bit", "min_8bit_size": 0}}, "greater than or equal to 1"),
        ({"adapter": {"dtype": "bf16"}}, "adapter.dtype: 'bf16' is not valid with optimizer.optimizer_type 'adamw'"),
        ({**BF16, "training": {"dtype": "fp32"}}, "adapter.dtype: 'bf16' is not valid with training.dtype 'fp32'"),
        ({**BF16, "adapter": {"dtype": "fp16"}}, "'fp32' or 'bf16'"),
        ({**BF16, "loader": "unsloth"}, "adapter.dtype 'bf16'; it adds LoRA in fp32"),
        ({**BF16, "adapter": {"dtype": "bf16", "plan": "per_expert",
                              "rules": [{"experts": {"0": 4}, "lr_multiplier": 2}]}},
         "adapter.dtype: 'bf16' is not valid with an lr_multiplier"),
    ],
    ids=["paged-on-cpu", "fsdp", "ep", "size-alone", "size-0", "torch", "fp32", "fp16", "unsloth", "multiplier"],
)  # fmt: skip
def test_the_door_refuses_what_can_not_be(blocks: dict[str, Any], told: str) -> None:
    body = {"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, "adapter": {"rank": 4}, **blocks}
    with pytest.raises(ValidationError) as refused:
        JOB_SPEC.validate_python(body)
    assert told in str(refused.value)


def test_a_machine_without_a_gpu_refuses_paged_memory_before_it_loads_the_model(workshop: Workshop) -> None:
    run: Run = workshop.run("sft", "mixtral", optimizer={"optimizer_type": "paged_adamw_8bit"})
    assert run.exit_code == FAILED
    assert run.reason == (
        "optimizer.optimizer_type: 'paged_adamw_8bit' is not valid on a CPU, and this machine has no CUDA device; "
        "expected 'adamw_8bit'"
    )


def test_the_spec_of_a_job_is_json(workshop: Workshop) -> None:
    folder = workshop.job("sft", "mixtral", **BF16)
    spec = json.loads(folder.spec.read_text(encoding="utf-8"))
    assert (spec["adapter"]["dtype"], spec["optimizer"]["min_8bit_size"]) == ("bf16", 64)
