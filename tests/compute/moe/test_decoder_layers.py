"""Where the decoder layers of a model are, also in dense families that name them otherwise."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llama_stack_provider_moe.compute.moe.layout import decoder_layers
from llama_stack_provider_moe.compute.planning.throughput import count_flops
from llama_stack_provider_moe.errors import LayoutError
from tests.support import tiny_models

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"vocab_size": 384, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 64},
}  # fmt: skip


def model_of(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **SHAPES[family])
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return made


@pytest.mark.parametrize(
    ("family", "path"), [("gpt2", "transformer.h"), ("bloom", "transformer.h"), ("gpt_neox", "gpt_neox.layers")]
)
def test_dense_families(family: str, path: str) -> None:
    model = model_of(family)
    found, layers = decoder_layers(model)
    assert (found, len(layers)) == (path, 2)
    weights = sum(each.numel() for name, each in model.named_parameters() if path in name and each.ndim == 2)
    head = model.get_output_embeddings().weight.numel()
    assert count_flops(model, None).a_token == 6 * (weights + head), "forward, and twice as much backward"


def test_a_model_without_such_a_list_is_refused() -> None:
    model = tiny_models.model("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(LayoutError, match="3 decoder layers named 'layers' or 'h', found none"):
        decoder_layers(model)
