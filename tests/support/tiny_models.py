"""Tiny random models of every family, with a tiny ChatML tokenizer: 2 layers (3 where two kinds must mix), 4 experts.

`build("granitemoe", folder)` saves one as a Hugging Face folder (fp32, safetensors); `model("granitemoe")` creates
one in memory. Weights depend only on `seed`. If a family has dense layers besides its MoE layers, layer 0 is dense.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 384

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SENTENCES = (
    "A mixture of experts sends each token to a few experts of many.",
    "What is the capital of France? The capital of France is Paris.",
    "Write a short letter to a friend about the garden in spring.",
    "Add two and three, and tell me the answer in one word: five.",
    "The system is helpful, the user asks, and the assistant answers with care.",
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Some five times the usual spread: otherwise two tiny layers would hardly change the logits or the routing.
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 48}
_DEEP = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
}
_LINEAR_ATTENTION = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 24,
}

# model_type -> differences from `_SHAPE`.
FAMILIES: dict[str, dict[str, Any]] = {
    "granitemoe": _LOCAL,
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 40},
    "granitemoehybrid": {
        **_LOCAL,
        "shared_intermediate_size": 40,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "mixtral": _LOCAL,
    "minimax_m2": {**_LOCAL, "head_dim": 8},
    "phimoe": _LOCAL,
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 40},
    "qwen3_next": {**_QWEN, **_LINEAR_ATTENTION},
    "qwen3_5_moe": {**_QWEN, **_LINEAR_ATTENTION},
    "qwen3_moe": {**_QWEN, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "moe_num_shared_experts": 1,
    },
    "glm4_moe": {**_DEEP, "head_dim": 8},
    "deepseek_v3": {
        **_DEEP,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "lfm2_moe": {
        **_QWEN,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "cohere2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "head_dim": 8,
        "prefix_dense_intermediate_size": 48,
        "mlp_layer_types": ["dense", "sparse"],
        "num_shared_experts": 1,
        "shared_expert_combination_strategy": "sum",
    },
    "llama4_text": {
        **_LOCAL,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "head_dim": 8,
        "attention_chunk_size": 128,
    },
    "gpt_oss": {**_LOCAL, "head_dim": 8, "sliding_window": 64},
    "llama": {"intermediate_size": 48},
    "qwen3": {"intermediate_size": 48, "head_dim": 8},
}  # fmt: skip
DENSE = ("llama", "qwen3")
# Dense families that normalise what attention and MLP add to the residual stream.
POST_NORM: dict[str, dict[str, Any]] = {
    "gemma2": {"intermediate_size": 48, "head_dim": 8},
    "olmo2": {"intermediate_size": 48},
    "glm4": {"intermediate_size": 48, "head_dim": 8},
}
MOE = tuple(family for family in FAMILIES if family not in DENSE)
# Families whose experts transformers can run grouped.
GROUPED = tuple(family for family in MOE if family != "llama4_text")

# Families whose causal language model has another config class than the composite model.
_MODEL_TYPE = {"qwen3_5_moe": "qwen3_5_moe_text"}


def config(family: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of `family` with `changes`."""
    values = {**_SHAPE, **{**FAMILIES, **POST_NORM}[family], **changes}
    return AutoConfig.for_model(_MODEL_TYPE.get(family, family), **values)


def model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random fp32 model in memory, in evaluation mode; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32)
    return made.eval()


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|pad|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 4, trainer)
    text: str = tokenizer.to_str()
    return text


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most `VOCAB_SIZE` entries; every text has tokens, none is unknown."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
        padding_side="right",
    )


def build(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model and its tokenizer to `folder`, and return it."""
    model(family, seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
