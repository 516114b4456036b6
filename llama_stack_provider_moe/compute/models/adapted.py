"""A model with a trained adapter that no job trains further, and the model without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.models.classifier import is_reward_adapter
from llama_stack_provider_moe.compute.models.loader import load, pick_device
from llama_stack_provider_moe.compute.models.quantized_loading import load_quantized
from llama_stack_provider_moe.compute.models.rope import as_shipped, extend_for
from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.quantize import QuantizeReport
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.moe.split_lora import split_lora
from llama_stack_provider_moe.compute.moe.steering import restore_biases
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import AblationMeasureSpec, Moe, PlaygroundSpec, RoutingAnalysisSpec
from llama_stack_provider_moe.spec.ablation import MeasureTraining
from llama_stack_provider_moe.spec.playground import PlaygroundTraining

LoadedSpec = AblationMeasureSpec | PlaygroundSpec | RoutingAnalysisSpec


@dataclass(frozen=True)
class Adapted:
    """A model in evaluation mode, perhaps with an adapter.

    Attributes:
        model: the model.
        tokenizer: of the model.
        layout: of its experts; None for a dense model.
        base_biases: the router biases of the model without its adapter, by layer; an adapter may bring its own.
        quantized: what was quantised of the base; None: nothing.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    layout: ExpertLayout | None
    base_biases: dict[int, Tensor]
    quantized: QuantizeReport | None = None

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model computes what it computed before the adapter was loaded."""
        assert isinstance(self.model, PeftModel), "the model has an adapter"
        biases = {} if self.layout is None else self.layout.biases(self.model)
        adapted = {layer: bias.clone() for layer, bias in biases.items()}
        _copy(self.base_biases, biases)
        try:
            with self.model.disable_adapter(), as_shipped(self.model):
                yield
        finally:
            _copy(adapted, biases)


def load_adapted(spec: RoutingAnalysisSpec | PlaygroundSpec, template_needed: bool = True) -> Adapted:
    """Load the model of a job that trains nothing, and its adapter if the job names one.

    Args:
        spec: names the model, its dtype and the adapter.
        template_needed: whether the tokenizer must have a chat template.

    Raises:
        ModelError: the adapter does not fit the model, or either can't be loaded or quantised.
    """
    coding = coding_asked(spec.training) if isinstance(spec, PlaygroundSpec) else None
    model, tokenizer, layout, quantized = load_base(spec, coding, template_needed)
    if spec.adapter_folder is None:
        return Adapted(model.eval(), tokenizer, layout, {}, quantized)
    biases = {} if layout is None else {layer: bias.clone() for layer, bias in layout.biases(model).items()}
    adapted = with_adapter(model, Path(spec.adapter_folder), layout, quantized is not None)
    return Adapted(adapted.eval(), tokenizer, layout, biases, quantized)


def load_base(
    spec: LoadedSpec, coding: Coding | None, template_needed: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ExpertLayout | None, QuantizeReport | None]:
    """Load the model of a job that trains nothing, without its adapter, quantised if there is a coding.

    Raises:
        ModelError: it can't be loaded, or has no weight to quantise.
    """
    device = pick_device(spec.training.dtype)
    if coding is None:
        model, tokenizer = load(spec, device, template_needed)
        return model, tokenizer, find_layout(model), None
    (model, layout, report), tokenizer = load_quantized(spec, device, coding, "training.quantize_bits", template_needed)
    # Only this package's code computes quantised experts.
    apply_moe(model, layout, resolve_moe(Moe(), layout, full=False))
    return model, tokenizer, layout, report


def with_adapter(
    model: PreTrainedModel, folder: Path, layout: ExpertLayout | None, is_quantized: bool = False
) -> PeftModel:
    """Return the model with the adapter in `folder`, with the router biases and the context of its training.

    Args:
        model: without an adapter.
        folder: of the adapter.
        layout: of the model's experts; None: it is dense.
        is_quantized: the model's experts are codes, which LoRA can't be folded into: it is computed beside them.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    extend_for(model, folder)
    if is_reward_adapter(folder):
        raise ModelError(f"adapter_folder: {str(folder)!r} is the adapter of a reward model, which writes no text; "
                         "expected one of a model that does")  # fmt: skip
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of other shapes
        raise ModelError(f"adapter_folder: {str(folder)!r} is not an adapter of this model: {error}") from error
    if layout is not None:
        restore_biases(folder, adapted, layout)
    if is_quantized:
        split_lora(adapted)
    return adapted


def coding_asked(training: PlaygroundTraining | MeasureTraining) -> Coding | None:
    """The coding that a job that trains nothing asks for; None: the model stays as it is."""
    return Coding(training.quantize_bits, training.quantize_scales) if training.quantize_bits else None


def _copy(source: dict[int, Tensor], target: dict[int, Tensor]) -> None:
    with torch.no_grad():
        for layer, bias in target.items():
            bias.copy_(source[layer])
