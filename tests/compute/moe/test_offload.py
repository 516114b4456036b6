"""Experts in main memory: two layers at most are on the device, and results are those of experts that stay there."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe import offload as module
from llama_stack_provider_moe.compute.moe.backend import code_of
from llama_stack_provider_moe.compute.moe.codes import Code, Coding
from llama_stack_provider_moe.compute.moe.offload import ExpertStream, Streamed, offload_experts
from llama_stack_provider_moe.compute.moe.quantize import decoded_on, dequantize, merge_memory, resident_bytes
from llama_stack_provider_moe.compute.planning.meta_model import blank
from llama_stack_provider_moe.compute.train.checkpoints import merge
from llama_stack_provider_moe.compute.train.fit import CHECKPOINTING
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.compute.moe.test_quantize import CPU, adapted, learnt, quantized
from tests.support import tiny_models

CODINGS = (Coding(4), Coding(4, nested=True), Coding(8))
ALL = Adapter(quantize_base=True, plan="all_experts")
DEEP = {"num_hidden_layers": 5}


class Watched:
    """What the streams of a test did: the layers that were read, fetched, and resident at each read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self.fetched: list[int] = []
        self.most = 0
        code, fetch = ExpertStream.code, ExpertStream._fetch

        def reading(stream: ExpertStream, layer: int, name: str) -> Code:
            found = code(stream, layer, name)
            inside = [buffer.untyped_storage().data_ptr() for buffer in stream._buffers]
            assert all(tensor.untyped_storage().data_ptr() in inside for tensor in found.tensors())
            assert layer in stream.resident
            self.most = max(self.most, len(stream.resident))
            if not self.read or self.read[-1] != layer:
                self.read.append(layer)
            return found

        def fetching(stream: ExpertStream, layer: int, place: int, free: Any) -> None:
            fetch(stream, layer, place, free)
            self.fetched.append(layer)

        monkeypatch.setattr(ExpertStream, "code", reading)
        monkeypatch.setattr(ExpertStream, "_fetch", fetching)


@pytest.mark.parametrize("coding", CODINGS, ids=Coding.text)
@pytest.mark.parametrize("shape", [(3, 96, 64), (5, 64, 72), (4, 6, 10)])
def test_a_placed_code_is_the_same_code(shape: tuple[int, ...], coding: Coding, monkeypatch: Any) -> None:
    monkeypatch.setattr("llama_stack_provider_moe.compute.moe.codes._MOST_NUMBERS", 2 * 96 * 64)  # several parts
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    code = Code(weight, coding)
    image = module._image({"it": code})
    assert code.nbytes - 8 * len(code._parts) <= image.nbytes <= code.nbytes + 256 * len(code.tensors())
    again = module._inside({"it": code}, image, CPU)["it"]
    assert torch.equal(again.whole(), code.whole())
    assert torch.equal(again.expert(2), code.expert(2))
    assert again.nbytes == code.nbytes
    image.zero_()
    assert not torch.equal(again.whole(), code.whole()), "it reads the image"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "coding"),
    [("mixtral", Coding(4)), ("qwen3_moe", Coding(4, nested=True)), ("gpt_oss", Coding(8)), ("llama4_text", Coding(4))],
)
def test_results_are_equal_and_two_layers_are_resident(
    family: str, coding: Coding, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    watched = None
    for offload in (False, True):
        model, layout, _ = quantized(family, coding, **DEEP)
        if offload:
            watched = Watched(monkeypatch)
            before = resident_bytes(model)
            report = offload_experts(model, layout, CPU)
            images, buffers = report.host_bytes, report.device_bytes
            assert resident_bytes(model) == before + buffers
            assert buffers == 2 * images / report.layers
        made = adapted(model, layout, plan="all_experts").model
        if checkpointing:
            made.train()
            getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
            made.enable_input_require_grads()
        loss, gradients = learnt(made)
        found.append((loss, {name: each.clone() for name, each in gradients.items()}))  # the next pass adds to them
        if watched is not None:
            layers = [place for place, _ in enumerate(layout.moe_layers)]  # type: ignore[union-attr]
            assert watched.most == min(2, len(layers))
            assert watched.read == [*layers, *layers[-2::-1]]
            # Once a direction, but for the two that are still there when the direction turns.
            assert watched.fetched == [*layers, *layers[-3::-1]]
            made.zero_grad()
            second = learnt(made)  # begins where the first ended, with the first two layers still there
            assert watched.fetched == [*layers, *layers[-3::-1], *layers[2:], *layers[-3::-1]]
            assert all(torch.equal(each, found[-1][1][name]) for name, each in second[1].items())
    (loss, gradients), (loss_off, gradients_off) = found
    assert torch.equal(loss, loss_off)
    assert gradients.keys() == gradients_off.keys()
    assert all(torch.equal(each, gradients_off[name]) for name, each in gradients.items())


def test_any_order_of_layers_is_right_and_passes_without_backward_fetch_each_layer_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, layout, _ = quantized("mixtral", Coding(4), num_hidden_layers=6)
    assert layout is not None
    experts = layout.experts(model)
    expected = [code_of(experts[layer], layout.down).whole() for layer in range(6)]  # type: ignore[union-attr]
    offload_experts(model, layout, CPU)
    watched = Watched(monkeypatch)

    def read(layer: int) -> None:
        code = code_of(experts[layer], layout.down)
        assert isinstance(code, Streamed)
        assert torch.equal(code.whole(), expected[layer])
        assert torch.equal(code.expert(1), expected[layer][1])

    for _ in range(3):
        for layer in range(6):
            read(layer)
    assert watched.fetched == 3 * list(range(6))
    drawn = torch.randint(0, 6, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for layer in drawn:
        read(layer)
    assert watched.most == 2


def test_one_layer_takes_one_buffer() -> None:
    model, layout, _ = quantized("mixtral", Coding(4), num_hidden_layers=1)
    report = offload_experts(model, layout, CPU)
    assert report.device_bytes == report.host_bytes
    assert "holds 1 layers at a time" not in report.text()
    learnt(adapted(model, layout, plan="all_experts").model)


def test_offloaded_experts_merge_like_others() -> None:
    merged = []
    for offload in (False, True):
        model, layout, _ = quantized("mixtral", Coding(4, nested=True), **DEEP)
        if offload:
            offload_experts(model, layout, CPU)
        made = adapted(model, layout, plan="all_experts").model
        dequantize(made, layout)
        merged.append(merge(made).state_dict())
    assert all(torch.equal(each, merged[1][name]) for name, each in merged[0].items())


def test_a_base_is_decoded_where_it_has_room() -> None:
    model, layout, _ = quantized("mixtral", Coding(4), **DEEP)
    made = adapted(model, layout, plan="all_experts").model
    needed = merge_memory(made).total
    assert [decoded_on(made, room) for room in (needed - 1, needed)] == [CPU, CPU], "its device is the CPU"
    blank_one = blank(tiny_models.config("mixtral", **DEEP), ALL, Moe(), 4).model
    needed = merge_memory(blank_one).total
    assert [decoded_on(blank_one, room) for room in (needed - 1, needed)] == [CPU, torch.device("meta")]
    offload_experts(model, layout, CPU)
    assert decoded_on(made, math.inf) == CPU


def test_a_dense_model_is_refused() -> None:
    model, layout, _ = quantized("llama", Coding(4))
    with pytest.raises(ModelError, match=r"efficiency\.offload_experts: true is not valid for this model: it is dense"):
        offload_experts(model, layout, CPU)
