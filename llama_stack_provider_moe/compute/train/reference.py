"""What a recipe compares a model with: the model with its adapter off, or while all weights train a frozen copy."""

from peft import PeftModel
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.models.determinism import without_dropout
from llama_stack_provider_moe.compute.models.heads import needs_plain_head, set_plain_head
from llama_stack_provider_moe.compute.models.loader import load_model, load_sharded
from llama_stack_provider_moe.compute.models.prepare import Base
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.moe.rates import Rates
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe
from llama_stack_provider_moe.compute.runtime.context import AnySession


def load_reference(session: AnySession, base: Base) -> PreTrainedModel:
    """Load a frozen copy of the untrained model, and run its experts as the policy does."""
    spec, config = session.spec, type(base.model.config).from_pretrained(session.spec.model)
    by_fsdp = spec.resources.strategy == "fsdp"
    model = load_sharded(spec, config) if by_fsdp else load_model(spec, config, base.device)
    if base.experts is not None:
        model.requires_grad_(False)
        base.experts.set_aside(model)
        base.experts.take(model, Rates())
    apply_moe(model, base.layout, base.resolved)
    text_config(model).output_router_logits = False  # else TRL would compute an aux loss and drop it
    without_dropout(model)
    if base.steering is not None:
        base.steering.attach(model)
    return model.requires_grad_(False)


def own_reference(model: PreTrainedModel | PeftModel) -> None:
    """Make a policy's reference the model with its adapter off, not TRL 1.16's frozen copy of the adapter.

    For a fresh adapter, which adds nothing yet, both give the same, but every checkpoint would contain the copy. For
    one that starts from another (`adapter.init_from`) the reference is the base. TRL's head is replaced where it finds
    no hidden states in the model.
    """
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")
    if needs_plain_head(model):
        set_plain_head(model)
