"""The model that a surgery makes, in memory beside the model before, so that it can be measured before it is written.

The two share every tensor that the surgery leaves as it is.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.moe.model_types import blank_model
from llama_stack_provider_moe.compute.surgery.plan import Expert, experts_of
from llama_stack_provider_moe.compute.surgery.resized import Resized


def twin_of(model: PreTrainedModel, resized: Resized, experts: Mapping[int, Sequence[Expert]]) -> PreTrainedModel:
    """The new model in evaluation mode.

    Args:
        model: the model before, loaded, without adapters.
        resized: what changes in it.
        experts: layer with experts -> its new experts.
    """
    config = resized.config()
    for made, loaded in ((config, model.config), (config.get_text_config(), text_config(model))):
        made._attn_implementation = loaded._attn_implementation
        made._experts_implementation = loaded._experts_implementation
    with torch.device("meta"):
        new = blank_model(config, model.dtype)
    state = {
        name: _grown(name, tensor, resized, experts) if name in resized.axes else tensor
        for name, tensor in model.state_dict().items()
    }
    new.load_state_dict(state, assign=True)
    kept = dict(new.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in state:  # computed from the config, such as rotary frequencies
            assert kept[name].shape == buffer.shape, f"{name} changes with the experts"
            parent, _, last = name.rpartition(".")
            setattr(new.get_submodule(parent), last, buffer)
    new.tie_weights()
    left = [name for name, each in (*new.named_parameters(), *new.named_buffers()) if each.is_meta]
    assert not left, f"{left[:3]} have no numbers"
    return new.eval()


def _grown(name: str, tensor: Tensor, resized: Resized, experts: Mapping[int, Sequence[Expert]]) -> Tensor:
    """The new tensor, each of whose parts is summed in fp32 and rounded once."""
    axis = resized.axes[name]
    wanted = experts_of(resized, experts, name, tensor.shape[axis])
    shape = list(tensor.shape)
    shape[axis] = len(wanted)
    made = tensor.new_empty(shape)
    for at, expert in enumerate(wanted):
        if isinstance(expert, tuple):
            part = sum((share * tensor.select(axis, old).float() for old, share in expert), torch.zeros(()))
        else:
            part = expert.part(name).to(tensor.device)
        made.select(axis, at).copy_(part)
    return made
