"""Quantised experts are quantised, take the expected bytes, and train like the decoded weights."""

import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe import quantize as module
from llama_stack_provider_moe.compute.moe.adapters import Adapted, add_lora
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.quantize import (
    BLOCKS,
    Bits,
    Code,
    CodedLinear,
    QuantizeReport,
    dequantize,
    quantize,
    resident_bytes,
)
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.train.checkpoints import merge
from llama_stack_provider_moe.compute.train.fit import CHECKPOINTING
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.compute.moe.test_adapters import gap, logits, randomised
from tests.support import tiny_models

CPU = torch.device("cpu")
BITS: tuple[Bits, ...] = (4, 8)
# Of the norm, of normal numbers: NF4 in blocks of 64, and 8 bits in blocks of 256.
MERGED = 5e-5  # measured at most 1.7e-5, of logits of about 2
ERROR: dict[Bits, float] = {4: 0.1, 8: 0.012}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 48, 32), (2, 64, 128), (2, 24, 96), (4, 6, 10), (1, 7, 8)])
def test_the_codec_is_true_in_every_shape(shape: tuple[int, ...], dtype: torch.dtype, bits: Bits) -> None:
    """Also where rows are no multiple of a block long, which bitsandbytes 0.50 decodes wrongly if it is let."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    code = Code(weight, bits)
    assert (code.shape, code.dtype) == (shape, dtype)
    decoded = code.whole()
    assert decoded.dtype == dtype
    assert ((decoded - weight).float().norm() / weight.float().norm()).item() < ERROR[bits]
    for expert in range(shape[0]):
        assert torch.equal(code.expert(expert), decoded[expert])
    numbers = shape[1] * shape[2]
    assert code.nbytes == shape[0] * (math.ceil(numbers * bits / 8) + 4 * math.ceil(numbers / BLOCKS[bits]))


def quantized(family: str, bits: Bits, **changes: Any) -> tuple[Any, ExpertLayout | None, QuantizeReport]:
    model = tiny_models.model(family, **changes)
    layout = find_layout(model)
    return model, layout, quantize(model, layout, bits, CPU)


def adapted(model: Any, layout: ExpertLayout | None, **adapter: Any) -> Adapted:
    resolved = resolve_moe(Moe(**({"train_router": True} if layout else {})), layout, full=False)
    apply_moe(model, layout, resolved)
    torch.manual_seed(0)
    made = add_lora(model, Adapter(rank=2, **adapter), layout, resolved)
    randomised(made.model)
    return made


def learnt(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    return outputs.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", tiny_models.MOE)
def test_every_expert_is_quantised_and_no_plain_copy_remains(family: str, bits: Bits) -> None:
    model, layout, report = quantized(family, bits)
    assert layout is not None
    plain = tiny_models.model(family)
    assert report.experts == 2 * 4 * len(layout.moe_layers)
    assert report.bytes_before == sum(t.nbytes for t in [*plain.parameters(), *plain.buffers()])
    for experts in layout.experts(model).values():
        for name in (layout.gate_up, layout.down):
            placeholder = experts.get_parameter(name)
            assert placeholder.shape == layout.experts(plain)[layout.moe_layers[0]].get_parameter(name).shape
            assert placeholder.untyped_storage().nbytes() == 4
            assert placeholder.isnan().all()
            assert not placeholder.requires_grad
    coded = sum(child.weight.numel() for child in model.modules() if isinstance(child, CodedLinear))
    assert coded > 0
    numbers = coded + sum(
        parameter.numel() for experts in layout.experts(plain).values()
        for name, parameter in experts.named_parameters() if name in (layout.gate_up, layout.down)
    )  # fmt: skip
    saved = report.bytes_before - report.bytes_after
    assert saved == pytest.approx(numbers * (4 - bits / 8 - 4 / BLOCKS[bits]), rel=0.03)
    assert report.bytes_after == resident_bytes(model)
    assert f"{report.experts:,} expert matrices" in report.text()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", [*tiny_models.MOE, "llama"])
def test_loss_and_gradients_equal_those_over_decoded_weights(family: str, bits: Bits) -> None:
    model, layout, _ = quantized(family, bits)
    decoded, _, _ = quantized(family, bits)
    dequantize(decoded, layout)
    assert not any(isinstance(child, CodedLinear) for child in decoded.modules())
    assert gap(logits(decoded), logits(tiny_models.model(family))) > 1e-4, "they are not the weights of before"
    loss, gradients = learnt(adapted(model, layout).model)
    expected, expected_gradients = learnt(adapted(decoded, layout).model)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-6)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if ".experts." in name)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["granitemoe", "deepseek_v3", "llama4_text", "gpt_oss", "llama"])
def test_merged_to_16_bits_is_what_was_trained(family: str, bits: Bits, tmp_path: Any) -> None:
    model, layout, _ = quantized(family, bits)
    peft_model = adapted(model, layout).model.eval()
    expected = logits(peft_model)
    dequantize(peft_model, layout)
    assert gap(logits(peft_model), expected) < MERGED
    merged = merge(peft_model)
    assert gap(logits(merged), expected) < MERGED
    merged.save_pretrained(tmp_path)
    plain = type(merged).from_pretrained(tmp_path).eval()
    assert gap(logits(plain), expected) < MERGED


def test_checkpointing_and_two_passes() -> None:
    model, layout, _ = quantized("mixtral", 4)
    peft_model = adapted(model, layout).model
    expected, gradients = learnt(peft_model)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    peft_model.zero_grad()
    peft_model.train()
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    peft_model.enable_input_require_grads()
    with torch.no_grad(), peft_model.disable_adapter():
        off = logits(peft_model)
    assert torch.isfinite(off).all()
    loss, again = learnt(peft_model)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(again, gradients)


def test_a_reader_without_the_code_gets_nan() -> None:
    """The eager forward, or PEFT's fold, would read the placeholder: it shows in the first loss."""
    model, layout, _ = quantized("mixtral", 4)
    apply_moe(model, layout, resolve_moe(Moe(enable_moe_optimizations=False), layout, full=False))
    assert logits(model).isnan().all()


def test_experts_that_are_not_quantised_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "keep_code", lambda *_: None)
    with pytest.raises(ModelError, match=r"16 of 16 expert matrices are quantised; these are not: \['model"):
        quantized("mixtral", 4)


def test_a_dense_models_linear_layers() -> None:
    model, _, report = quantized("llama", 4)
    assert (report.experts, report.linear_layers) == (0, 2 * 7)
    assert all(
        isinstance(model.model.layers[0].self_attn.get_submodule(f"{name}_proj"), CodedLinear) for name in "qkvo"
    )
    assert isinstance(model.lm_head, nn.Linear)
    assert not isinstance(model.lm_head, CodedLinear)


def test_a_mid_size_model_in_bf16_takes_a_third() -> None:
    """Half a million numbers an expert matrix, as small real models have: 4.5 of 16 bits, and what is no matrix."""
    model = tiny_models.model(
        "qwen3_moe", hidden_size=256, moe_intermediate_size=512, num_experts=8, num_local_experts=8, head_dim=32
    ).to(torch.bfloat16)
    layout = find_layout(model)
    report = quantize(model, layout, 4, CPU)
    assert report.bytes_after < 0.35 * report.bytes_before
