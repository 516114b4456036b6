"""Operations of a step: by hand, and against what torch counts while it runs one; peaks and lengths."""

import doctest
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_stack_provider_moe.experts.adapters import add_lora
from llama_stack_provider_moe.experts.layout import find_layout
from llama_stack_provider_moe.experts.quantize import quantize
from llama_stack_provider_moe.experts.settings import apply_moe, resolve_moe
from llama_stack_provider_moe.spec import Adapter, Moe
from llama_stack_provider_moe.training import throughput
from llama_stack_provider_moe.training.throughput import Work, lengths_of, peak_flops, work_of
from tests import tiny_models
from tests.training_support import Workshop, workshop

__all__ = ["workshop"]

# A tiny Mixtral: 2 layers, 32 wide, 4 heads of 8 over 2 of keys and values, 2 of 4 experts of 24, vocabulary 384.
ATTENTION = 32 * 32 + 2 * 16 * 32 + 32 * 32  # q, k and v, o
ROUTER = 4 * 32
ACTIVE = 2 * (48 * 32 + 32 * 24)  # two experts' gate and up, and down
LAYER = ATTENTION + ROUTER + ACTIVE
HEAD = 384 * 32
LORA = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32))  # rank 4 on q, k and v, o
LORA_EXPERTS = 2 * 4 * ((32 + 48) + (24 + 32))
PAIR = 2 * 4 * (8 + 8)


def mixtral(rank: int | None, bits: int | None = None) -> Any:
    model = tiny_models.model("mixtral")
    layout = find_layout(model)
    resolved = resolve_moe(Moe(), layout, full=rank is None)
    if bits is not None:
        quantize(model, layout, 4, torch.device("cpu"))
    apply_moe(model, layout, resolved)
    adapted = model if rank is None else add_lora(model, Adapter(rank=rank), layout, resolved).model
    return adapted, layout


def test_examples() -> None:
    assert doctest.testmod(throughput).failed == 0


def test_all_weights_by_hand() -> None:
    """Three products for each weight, as 6 N a token has it; N are the active ones."""
    assert work_of(*mixtral(None)) == Work(3 * 2 * (2 * LAYER + HEAD), 3 * PAIR, (None, None))


@pytest.mark.parametrize("bits", [None, 4])
def test_lora_by_hand(bits: int | None) -> None:
    """Frozen weights have two products, LoRA's three; a base in 4 bits computes the same."""
    frozen, lora = 2 * LAYER + HEAD, 2 * (LORA + LORA_EXPERTS)
    adapted = mixtral(4, bits)
    assert work_of(*adapted) == Work(2 * 2 * frozen + 3 * 2 * lora, 3 * PAIR, (None, None))
    policy_and_reference = work_of(*adapted, references=1)
    assert policy_and_reference.a_token == 3 * 2 * frozen + 3 * 2 * lora
    assert policy_and_reference.a_pair == 4 * PAIR
    breaker = work_of(*adapted, references=1, head=False, layers=1)
    assert breaker == Work(3 * 2 * LAYER + 3 * 2 * (LORA + LORA_EXPERTS), 4 * PAIR, (None,))


def test_layers_below_the_lowest_that_trains_have_no_backward() -> None:
    model, layout = mixtral(4)
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
    work = work_of(model, layout)
    lora = LORA + LORA_EXPERTS
    assert work.a_token == 2 * (2 * LAYER + HEAD + 2 * lora) + 2 * (LAYER + HEAD + lora) + 2 * lora
    assert work.a_pair == 2 * PAIR


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe", "deepseek_v3", "llama"])
def test_torch_counts_the_same(family: str) -> None:
    """All weights, eager experts and attention: torch counts the products as they run, attention's without the mask."""
    model = tiny_models.model(family)
    model.set_attn_implementation("eager")
    layout = find_layout(model)
    apply_moe(model, layout, resolve_moe(Moe(enable_moe_optimizations=False), layout, full=True))
    ids = torch.randint(3, 300, (3, 10), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids).loss.backward()
    work = work_of(model, layout)
    unmasked = len(work.windows) * 3 * 10 * 10
    # Rotary angles are a product too: a millionth of a model that is not tiny.
    assert counted.get_total_flops() == pytest.approx(work.a_token * 30 + work.a_pair * unmasked, rel=2e-3)


def test_rows_are_counted_without_padding() -> None:
    assert Work(10.0, 1.0, (None, 2)).of([4, 1]) == 10 * 5 + (10 + 7) + (1 + 1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert lengths_of({"attention_mask": mask}) == [3, 4]
    assert lengths_of({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}) == [3, 2, 1]


@pytest.mark.parametrize(
    ("device", "tera"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5),
     ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L40S", 362.05), ("NVIDIA L4", 121.0), ("NVIDIA A10G", 70.0),
     ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090", None), ("", None)],
)  # fmt: skip
def test_peaks_of_devices_that_we_know(device: str, tera: float | None) -> None:
    assert peak_flops(device, "bf16") == (None if tera is None else tera * 1e12)
    assert peak_flops(device, "fp32") is None


def test_a_runs_figures_are_of_its_steps(workshop: Workshop) -> None:
    run = workshop.run("sft", "mixtral")
    work = work_of(*mixtral(4))
    ratios = [event.metrics["tflops_per_device"] * 1e12 / event.metrics["tokens_per_s"] for event in run.events("step")]
    assert all(work.a_token < ratio < 1.5 * work.a_token for ratio in ratios), "and the pairs'"
    (finished,) = run.events("finished")
    means = sorted(event.metrics["tokens_per_s_per_device"] for event in run.events("step"))
    assert means[0] <= finished.throughput["tokens_per_s_per_device"] <= means[-1]
    assert "mfu" not in finished.throughput, "nobody knows a CPU's peak"
