"""Quantised experts are quantised, take the expected bytes, and train like the decoded weights."""

import math
from typing import Any

import bitsandbytes.functional as codec
import pytest
import torch
from bitsandbytes.functional import QuantState
from peft import PeftModel
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe import codes
from llama_stack_provider_moe.compute.moe import quantize as module
from llama_stack_provider_moe.compute.moe.adapters import Adapted, add_lora
from llama_stack_provider_moe.compute.moe.codes import BLOCKS, Bits, Code, Coding, bytes_of
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.quantize import (
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
CODINGS = (Coding(4), Coding(4, nested=True), Coding(8))
SCALES = {Coding(4): 4 / 64, Coding(4, nested=True): 1 / 64 + 4 / (64 * 256), Coding(8): 4 / 256}  # bytes a number
# Of the norm, of normal numbers: NF4 in blocks of 64, and 8 bits in blocks of 256.
MERGED = 5e-5  # measured at most 1.7e-5, of logits of about 2
ERROR: dict[Bits, float] = {4: 0.1, 8: 0.012}


@pytest.mark.parametrize("coding", CODINGS, ids=Coding.text)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 48, 32), (2, 64, 128), (2, 24, 96), (4, 6, 10), (1, 7, 8)])
def test_the_codec_is_true_in_every_shape(shape: tuple[int, ...], dtype: torch.dtype, coding: Coding) -> None:
    """Also where rows are no multiple of a block long, which bitsandbytes 0.50 decodes wrongly if it is let."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    code = Code(weight, coding)
    assert (code.shape, code.dtype) == (shape, dtype)
    decoded = code.whole()
    assert decoded.dtype == dtype
    assert ((decoded - weight).float().norm() / weight.float().norm()).item() < ERROR[coding.bits]
    for expert in range(shape[0]):
        assert torch.equal(code.expert(expert), decoded[expert])
    numbers = shape[1] * shape[2]
    assert code.nbytes == bytes_of(shape, coding)
    if not coding.nested:
        each = math.ceil(numbers * coding.bits / 8) + 4 * math.ceil(numbers / BLOCKS[coding.bits])
        assert code.nbytes == shape[0] * each


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 96, 64), (5, 64, 72), (1, 200, 320)])
def test_the_numbers_are_bitsandbytes_own(
    shape: tuple[int, ...], nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bitsandbytes encodes and decodes in one go, though here a code is encoded piece by piece."""
    monkeypatch.setattr(codes, "_ENCODED_AT_ONCE", 1024)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    state: QuantState
    numbers, state = codec.quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4", compress_statistics=nested)
    assert state.nested is nested
    expected = codec.dequantize_4bit(numbers, state).view(shape)
    code = Code(weight, Coding(4, nested))
    assert torch.equal(code.whole(), expected)
    for expert in range(shape[0]):  # 96, 72 and 1,000 blocks: some begin within a block of scales
        assert torch.equal(code.expert(expert), expected[expert])
    inner = numbers.nbytes + state.absmax.nbytes
    assert code.nbytes == inner + (state.state2.absmax.nbytes + state.offset.nbytes if nested else 0)


def test_nested_scales_by_hand() -> None:
    """A weight is value * scale, and the scale its 8-bit value * the outer scale + the mean of all scales."""
    weight = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(1))
    blocks = weight.view(-1, 64)
    scales = blocks.abs().amax(dim=1)
    less = scales - scales.mean()
    table = codec.create_dynamic_map()
    outer = less.view(-1, 256).abs().amax(dim=1, keepdim=True)
    eighth = table[(less.view(-1, 256, 1) / outer.unsqueeze(-1) - table).abs().argmin(dim=-1)]
    again = (eighth * outer).flatten() + scales.mean()
    nf4 = codec.get_4bit_type("nf4", device="cpu")
    values = nf4[(blocks.unsqueeze(-1) / scales.view(-1, 1, 1) - nf4).abs().argmin(dim=-1)]
    expected = (values * again.unsqueeze(1)).view(weight.shape)
    torch.testing.assert_close(Code(weight, Coding(4, nested=True)).whole(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coding", CODINGS, ids=Coding.text)
def test_bits_a_weight(coding: Coding) -> None:
    bits = bytes_of((128, 1536, 2048), coding) * 8 / (128 * 1536 * 2048)
    assert bits == pytest.approx(coding.bits + 8 * SCALES[coding], rel=1e-6)


def quantized(family: str, coding: Coding, **changes: Any) -> tuple[Any, ExpertLayout | None, QuantizeReport]:
    model = tiny_models.model(family, **changes)
    layout = find_layout(model)
    return model, layout, quantize(model, layout, coding, CPU)


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


@pytest.mark.parametrize("coding", CODINGS, ids=Coding.text)
@pytest.mark.parametrize("family", tiny_models.MOE)
def test_every_expert_is_quantised_and_no_plain_copy_remains(family: str, coding: Coding) -> None:
    model, layout, report = quantized(family, coding)
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
    assert saved == pytest.approx(numbers * (4 - coding.bits / 8 - SCALES[coding]), rel=0.03)
    assert report.bytes_after == resident_bytes(model)
    assert f"{report.experts:,} expert matrices" in report.text()
    assert f"at {report.bits_a_weight:.3f} bits a weight" in report.text()
    assert report.bits_a_weight == pytest.approx(coding.bits + 8 * SCALES[coding], rel=0.05)


@pytest.mark.parametrize("coding", CODINGS, ids=Coding.text)
@pytest.mark.parametrize("family", [*tiny_models.MOE, "llama"])
def test_loss_and_gradients_equal_those_over_decoded_weights(family: str, coding: Coding) -> None:
    model, layout, _ = quantized(family, coding)
    decoded, _, _ = quantized(family, coding)
    dequantize(decoded, layout)
    assert not any(isinstance(child, CodedLinear) for child in decoded.modules())
    assert gap(logits(decoded), logits(tiny_models.model(family))) > 1e-4, "they are not the weights of before"
    loss, gradients = learnt(adapted(model, layout).model)
    expected, expected_gradients = learnt(adapted(decoded, layout).model)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-6)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if ".experts." in name)


@pytest.mark.parametrize("coding", CODINGS, ids=Coding.text)
@pytest.mark.parametrize("family", ["granitemoe", "deepseek_v3", "llama4_text", "gpt_oss", "llama"])
def test_merged_to_16_bits_is_what_was_trained(family: str, coding: Coding, tmp_path: Any) -> None:
    model, layout, _ = quantized(family, coding)
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
    model, layout, _ = quantized("mixtral", Coding(4, nested=True))
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
    model, layout, _ = quantized("mixtral", Coding(4, nested=True))
    apply_moe(model, layout, resolve_moe(Moe(enable_moe_optimizations=False), layout, full=False))
    assert logits(model).isnan().all()


def test_experts_that_are_not_quantised_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "keep_code", lambda *_: None)
    with pytest.raises(ModelError, match=r"16 of 16 expert matrices are quantised; these are not: \['model"):
        quantized("mixtral", Coding(4, nested=True))


def test_a_dense_models_linear_layers() -> None:
    model, _, report = quantized("llama", Coding(4))
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
    report = quantize(model, layout, Coding(4), CPU)
    assert report.bytes_after < 0.35 * report.bytes_before
