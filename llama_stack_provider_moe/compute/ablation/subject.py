"""The model whose hidden states are measured: with or without experts, an adapter, and quantised weights."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.models.adapted import coding_asked, load_base, with_adapter
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.spec import AblationMeasureSpec


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
    model, tokenizer, layout, quantized = load_base(spec, coding_asked(spec.training))
    if spec.adapter_folder is None:
        return Subject(model.eval(), tokenizer, layout)
    return Subject(
        with_adapter(model, Path(spec.adapter_folder), layout, quantized is not None).eval(), tokenizer, layout
    )
