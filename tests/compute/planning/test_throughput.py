"""Operations of a step: by hand, and compared with torch's count while it runs; peaks and lengths."""

import doctest
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_stack_provider_moe.compute.moe.adapters import add_lora
from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.quantize import quantize
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.planning import throughput
from llama_stack_provider_moe.compute.planning.throughput import StepFlops, count_flops, lengths_of, peak_flops
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models
from tests.support.training_support import Workshop, workshop

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
        quantize(model, layout, Coding(4), torch.device("cpu"))
    apply_moe(model, layout, resolved)
    adapted = model if rank is None else add_lora(model, Adapter(rank=rank), layout, resolved).model
    return adapted, layout


def test_examples() -> None:
    assert doctest.testmod(throughput).failed == 0


def test_all_weights_by_hand() -> None:
    """Three products for each weight, i.e. 6 N per token, where N counts the active weights."""
    assert count_flops(*mixtral(None)) == StepFlops(3 * 2 * (2 * LAYER + HEAD), 3 * PAIR, (None, None))


@pytest.mark.parametrize("bits", [None, 4])
def test_lora_by_hand(bits: int | None) -> None:
    """Frozen weights have two products, LoRA's three; a base in 4 bits computes the same."""
    frozen, lora = 2 * LAYER + HEAD, 2 * (LORA + LORA_EXPERTS)
    adapted = mixtral(4, bits)
    assert count_flops(*adapted) == StepFlops(2 * 2 * frozen + 3 * 2 * lora, 3 * PAIR, (None, None))
    policy_and_reference = count_flops(*adapted, references=1)
    assert policy_and_reference.a_token == 3 * 2 * frozen + 3 * 2 * lora
    assert policy_and_reference.a_pair == 4 * PAIR
    breaker = count_flops(*adapted, references=1, head=False, layers=1)
    assert breaker == StepFlops(3 * 2 * LAYER + 3 * 2 * (LORA + LORA_EXPERTS), 4 * PAIR, (None,))


def test_layers_below_the_lowest_that_trains_have_no_backward() -> None:
    model, layout = mixtral(4)
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
    work = count_flops(model, layout)
    lora = LORA + LORA_EXPERTS
    assert work.a_token == 2 * (2 * LAYER + HEAD + 2 * lora) + 2 * (LAYER + HEAD + lora) + 2 * lora
    assert work.a_pair == 2 * PAIR


def test_what_backward_needs() -> None:
    """None if nothing trains; all layers if the embeddings train, whatever trains above them."""
    model, layout = mixtral(None)
    model.requires_grad_(False)
    assert count_flops(model, layout) == StepFlops(2 * (2 * LAYER + HEAD), PAIR, (None, None))
    model.get_input_embeddings().weight.requires_grad_(True)
    assert count_flops(model, layout) == StepFlops(2 * 2 * (2 * LAYER + HEAD), 3 * PAIR, (None, None))
    model.get_input_embeddings().weight.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    assert count_flops(model, layout) == StepFlops(2 * (2 * LAYER + 3 * HEAD), PAIR, (None, None)), "only the head"


def test_lora_on_the_head_trains_and_is_not_the_references() -> None:
    model = tiny_models.model("mixtral")
    layout = find_layout(model)
    resolved = resolve_moe(Moe(), layout, full=False)
    adapter = Adapter(rank=4, plan="trunk", layers="1", apply_lora_to_output=True)
    model = add_lora(model, adapter, layout, resolved).model
    lora = LORA + 4 * (32 + 384)
    assert count_flops(model, layout).a_token == 2 * (2 * LAYER + HEAD + lora) + 2 * (LAYER + HEAD + lora) + 2 * lora
    with_reference = count_flops(model, layout, references=1)
    assert with_reference.a_token - count_flops(model, layout).a_token == 2 * (2 * LAYER + HEAD)
    assert count_flops(model, layout, head=False).a_token == 2 * (2 * LAYER + LORA) + 2 * (LAYER + LORA) + 2 * LORA


def test_attentions_width_is_the_models_own() -> None:
    """4 heads with the config's width, and with the widths of keys and values if they differ."""
    for family, changes, keys, values in (
        ("llama", {}, 8, 8), ("llama", {"head_dim": 16}, 16, 16), ("deepseek_v3", {"v_head_dim": 6}, 12, 6)
    ):  # fmt: skip
        model = tiny_models.model(family, **changes)
        assert count_flops(model, find_layout(model)).a_pair == 3 * 2 * 4 * (keys + values), family


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mixtral", {}, (None, None)),
        ("mixtral", {"sliding_window": 7}, (7, 7)),  # all layers, if the config names no kinds
        ("gpt_oss", {}, (64, None)),
        ("llama4_text", {"num_hidden_layers": 4}, (128, 128, 128, None)),
        ("qwen3_next", {}, (None,)),  # linear attention has no pairs
        ("granitemoehybrid", {"layer_types": ["linear_attention", "full_attention"]}, (None,)),
    ],
)
def test_layers_see_what_their_kind_does(family: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    model = tiny_models.model(family, **changes)
    assert count_flops(model, find_layout(model)).windows == windows
    assert count_flops(model, find_layout(model), layers=1).windows == windows[: 1 if len(windows) > 1 else 0]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe", "deepseek_v3", "gpt_oss", "llama"])
def test_torch_counts_the_same(family: str) -> None:
    """All weights, eager experts and attention: torch counts the products as they run, attention's without the mask."""
    model = tiny_models.model(family)
    model.set_attn_implementation("eager")
    layout = find_layout(model)
    apply_moe(model, layout, resolve_moe(Moe(enable_moe_optimizations=False), layout, full=True))
    ids = torch.randint(3, 300, (3, 10), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids).loss.backward()
    work = count_flops(model, layout)
    unmasked = len(work.windows) * 3 * 10 * 10
    # Rotary angles are a product too: a millionth of a model that is not tiny.
    assert counted.get_total_flops() == pytest.approx(work.a_token * 30 + work.a_pair * unmasked, rel=2e-3)


def test_rows_are_counted_without_padding() -> None:
    assert StepFlops(10.0, 1.0, (None, 2)).of([4, 1]) == 10 * 5 + (10 + 7) + (1 + 1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert lengths_of({"attention_mask": mask}) == [3, 4]
    assert lengths_of({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}) == [3, 2, 1]


@pytest.mark.parametrize(
    ("device", "tera"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5),
     ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L40S", 362.05), ("NVIDIA L4", 121.0), ("NVIDIA A10G", 70.0),
     ("NVIDIA B200", 2250.0), ("NVIDIA H100 NVL", 835.5), ("NVIDIA A10", 125.0),
     ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090", None), ("", None)],
)  # fmt: skip
def test_peaks_of_devices_that_we_know(device: str, tera: float | None) -> None:
    assert peak_flops(device, "bf16") == (None if tera is None else tera * 1e12)
    assert peak_flops(device, "fp32") is None


def test_a_runs_figures_are_of_its_steps(workshop: Workshop) -> None:
    run = workshop.run("sft", "mixtral")
    work = count_flops(*mixtral(4))
    ratios = [event.metrics["tflops_per_device"] * 1e12 / event.metrics["tokens_per_s"] for event in run.events("step")]
    assert all(work.a_token < ratio < 1.5 * work.a_token for ratio in ratios), "and the pairs'"
    (finished,) = run.events("finished")
    means = sorted(event.metrics["tokens_per_s_per_device"] for event in run.events("step"))
    assert means[0] <= finished.throughput["tokens_per_s_per_device"] <= means[-1]
    assert "mfu" not in finished.throughput, "a CPU's peak is unknown"
