"""Our experts under DistributedDataParallel: two processes with half a batch each get the gradients of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from llama_stack_provider_moe.compute.moe.adapters import add_lora
from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.quantize import quantize, spare_ddp
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models
from tests.support.ep_group import in_processes

IDS = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(5))


def made(family: str, bits: int | None) -> Any:
    model = tiny_models.model(family)
    layout = find_layout(model)
    resolved = resolve_moe(Moe(train_router=True), layout, full=False)
    if bits is not None:
        quantize(model, layout, Coding(4 if bits == 4 else 8), torch.device("cpu"))
    apply_moe(model, layout, resolved)
    torch.manual_seed(0)
    adapted = add_lora(model, Adapter(rank=2), layout, resolved).model
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    spare_ddp(adapted)
    return adapted


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model(input_ids=ids).logits.square().mean().backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "bits"), [("granitemoe", 4), ("llama4_text", None)])
def test_two_processes_give_the_gradients_of_one(family: str, bits: int | None, tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        torch.set_num_threads(1)
        return gradients(DistributedDataParallel(made(family, bits)), IDS[2 * rank : 2 * rank + 2])

    first, second = in_processes(2, work, tmp_path)
    expected = gradients(made(family, bits), IDS)
    assert first.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-7)
    assert any(gradient.abs().max() > 0 for name, gradient in expected.items() if ".experts." in name)
