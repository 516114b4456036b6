"""A tiny model of any family with experts, always with the same weights, and the arithmetic of the laws on it.

The laws are in `family_laws` and `family_job_laws`.
"""

import copy
import tempfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.export.probe import Arithmetic, record
from llama_stack_provider_moe.compute.moe.adapters import add_lora
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.model_types import types_with_experts
from llama_stack_provider_moe.compute.moe.resolve_settings import ShippedConfig, apply_moe, resolve_moe
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models
from tests.support.every_family import tiny_config

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(5))
RANK, ALPHA = 2, 4
EXPERTS_ONLY = Adapter(rank=RANK, alpha=ALPHA, lora_attn_modules=[], plan="all_experts")
# Of the norm, in fp32.
CLOSE = 2e-5


@dataclass
class Subject:
    """A tiny model of one model type, always with the same weights."""

    model_type: str

    @property
    def kind(self) -> type[PreTrainedModel]:
        """The class of the whole model."""
        found: type[PreTrainedModel] = getattr(transformers, types_with_experts()[self.model_type])
        return found

    def model(self) -> PreTrainedModel:
        """A copy that a law may change."""
        return copy.deepcopy(_built(self.model_type))

    @property
    def layout(self) -> ExpertLayout:
        """Where its experts are."""
        return _layout(self.model_type)

    @property
    def files(self) -> "Files":
        """Its base and a trained adapter on the disk; not to be changed."""
        return _files(self.model_type)

    def adapted(
        self, moe: Moe, adapter: Adapter = EXPERTS_ONLY, seed: int = 1, trained: bool = True
    ) -> tuple[PeftModel, ShippedConfig]:
        """With LoRA; as after training, because B begins at zero and would hide A's gradient."""
        model = self.model()
        resolved = resolve_moe(moe, self.layout, full=False)
        shipped = apply_moe(model, self.layout, resolved)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = add_lora(model, adapter, self.layout, resolved)
            with torch.no_grad():
                for name, parameter in made.model.named_parameters():
                    if trained and "lora_B" in name:
                        parameter.normal_(0, 0.1)
        return made.model.eval(), shipped


class Files:
    """A base, an adapter on its experts and MLPs, and both merged, in a folder that goes with this object.

    Attributes:
        expected: logits of the model with its adapter, in memory.
    """

    def __init__(self, subject: Subject) -> None:
        self._kept = tempfile.TemporaryDirectory()
        self.folder = Path(self._kept.name)
        self.base, self.adapter = self.folder / "base", self.folder / "adapter"
        subject.model().save_pretrained(self.base)
        tokenizer = tiny_models.tokenizer()
        tokenizer.save_pretrained(self.base)
        model, shipped = subject.adapted(Moe(), Adapter(rank=RANK, alpha=ALPHA, lora_attn_modules=[]))
        with torch.no_grad():
            self.expected = answer(model)
        how = resolve_moe(Moe(), subject.layout, full=False).experts_implementation
        arithmetic = Arithmetic(dtype="fp32", device="cpu", quantize_bits=None, experts_implementation=how)
        probe = record(model, tokenizer, arithmetic)
        checkpoints.save(model, tokenizer, self.adapter, shipped.restored(), step=1, probe=probe)

    @cached_property
    def merged(self) -> Path:
        """The folder with both in one."""
        merge(self.base, self.adapter, self.folder / "merged")
        return self.folder / "merged"


# The tests of one family follow each other.
@lru_cache(maxsize=2)
def _built(model_type: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = Subject(model_type).kind(tiny_config(model_type)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1 and not parameter.abs().max() > 0:  # some start at zero, as routers
                    parameter.normal_(0, 0.1)
            for name, buffer in made.named_buffers():
                if name.endswith("tid2eid"):
                    buffer.copy_(torch.randint(4, buffer.shape))
    return made


@lru_cache(maxsize=2)
def _layout(model_type: str) -> ExpertLayout:
    found = find_layout(Subject(model_type).model())
    assert found is not None, "no experts were found"
    return found


@lru_cache(maxsize=1)
def _files(model_type: str) -> Files:
    return Files(Subject(model_type))


def answer(model: nn.Module) -> Tensor:
    made: Tensor = model(input_ids=IDS, use_cache=False).logits
    return made


def loss_of(model: nn.Module) -> Tensor:
    logits = answer(model)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def off_by(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12))
