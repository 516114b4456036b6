"""The model whose hidden states are measured: with or without experts, an adapter, and quantised weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.models.adapted import with_adapter
from llama_stack_provider_moe.compute.models.loader import load, pick_device
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.quantize import quantize
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.spec import AblationMeasureSpec, Moe


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, its tokenizer, and where its experts are (None: it is dense)."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    layout: ExpertLayout | None

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def load_subject(spec: AblationMeasureSpec) -> Subject:
    """Load what the job names.

    Raises:
        ModelError: the model can't be loaded or quantised.
        AdapterError: the adapter does not fit it.
    """
    bits, device = spec.training.quantize_bits, pick_device(spec.training.dtype)
    model, tokenizer = load(spec, device if bits is None else torch.device("cpu"))
    layout = find_layout(model)
    if bits is not None:
        quantize(model, layout, bits, device)
        # Only this package's code computes quantised experts.
        apply_moe(model, layout, resolve_moe(Moe(), layout, full=False))
    if spec.adapter_folder is None:
        return Subject(model.eval(), tokenizer, layout)
    return Subject(with_adapter(model, Path(spec.adapter_folder), layout).eval(), tokenizer, layout)
