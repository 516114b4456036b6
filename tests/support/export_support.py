"""An adapter of a tiny model, saved as a job saves it, and its results with plain PEFT."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.moe.adapters import add_lora
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))
EVERYTHING = Adapter(rank=2, alpha=4, apply_lora_to_output=True)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def gap(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def adapted(base: Path, out: Path, adapter: Adapter, **moe: Any) -> Path:
    """Save an adapter of `base` as a job does, with a B that is not zero, as after training."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    layout = find_layout(model)
    resolved = resolve_moe(Moe(**moe), layout, full=False)
    shipped = apply_moe(model, layout, resolved)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft_model = add_lora(model, adapter, layout, resolved).model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    checkpoints.save(peft_model, tiny_models.tokenizer(), out, shipped.restored(), step=1)
    return out


def by_peft(base: Path, adapter: Path) -> PeftModel:
    with warnings.catch_warnings():
        # As in `compute.moe.adapters`: peft 0.21 looks for parameters' names among modules.
        warnings.filterwarnings("ignore", message=r".*(rank_pattern|alpha_pattern)")
        model: PeftModel = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
