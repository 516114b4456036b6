"""A tiny config of any model type that transformers has, made from the defaults of its config class.

`tiny_config("deepseek_v4")` keeps one decoder layer of each kind that the default config has and makes every size
small. Nothing here knows a family, except `EXCEPTIONS`: what the general rule gets wrong, with the reason.
"""

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 384
_MOST_LAYERS = 4

# Name of a config key (all of it) -> its tiny value; the first line that matches counts.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?|vocab_size_.*", VOCABULARY),
    (r"(bos|eos|pad)_token_id", 1),
    (r"(text_|out_|output_)?hidden_size|d_model|n_embd|embed_dim|embedding_size", 32),
    (r"(text_|out_|output_|adapter_in_|adapter_out_)dim|adapter_input_size", 32),
    (r".*intermediate_size.*|.*ffn_hidden_size|.*ffn_dim|moe_.*_size", 24),
    (r"num_attention_heads|n_heads?|num_heads|.*_attention_heads|.*_num_heads|num_swa_.*heads", 4),
    (r".*(num_key_value_heads|kv_heads).*", 2),
    (r".*num_key_heads", 2),
    (r".*num_value_heads", 4),
    (r".*(head_dim|head_size|key_dim|value_dim).*|kv_channels|v_head_dim|qk_.*_dim", 8),
    (r".*lora_rank|.*_rank|router_hidden_size", 16),
    (r"n_routed_experts|num_(local_|routed_)?experts|moe_num_experts", 4),
    (r"(moe_)?(num_experts_per_tok(en)?|top_?k(_experts)?|k)", 2),
    (r".*(n|num)_shared_experts?", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"n_groups?|num_expert_groups?|.*_n_groups?", 2),
    (r"topk_group|num_limited_groups", 2),
    (r"index_topk|index_kpool", 16),
    (r".*num_nextn_predict_layers|mtp_num_layers|num_mtp.*", 0),
    (r"max_position_embeddings|max_seq_len|max_sequence_length", 256),
    (r".*(state_size|d_state)", 8),
    (r".*chunk_size", 16),
    (r"mamba_n(um)?_heads|mamba_num_heads|ssm_n_heads", 4),
)
# Config keys that count layers; per-layer lists have this length.
_DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers")

# model_type -> changes to the rule's result, each with its reason.
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXCEPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "bailing_hybrid": ({"layer_group_size": 2}, "one layer in `layer_group_size` has full attention"),
    "dbrx": ({"attn_config": {"rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 24}, "n_heads": 4},
             "its sizes are in parts of its config"),
    "deepseek_ocr2_text": ({**_MOE, "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1},
                           "its defaults leave these unset"),
    "deepseek_v2": ({**_MOE, "n_group": 1, "topk_group": 1}, "its defaults leave these unset"),
    "diffusion_gemma_text": ({**_MOE, "num_experts": 4, "top_k_experts": 2}, "its defaults leave these unset"),
    "dots1": ({**_MOE, "n_routed_experts": 4, "n_shared_experts": 1}, "its defaults leave these unset"),
    "dots3_note_text": ({"head_dim": 16, "per_layer_config": {}}, "its head is the sum of two parts"),
    "ernie4_5_vl_moe_text": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                  "mrope_section": [1, 1, 2]}, "moe_intermediate_size": [24, 24]},
                             "sections of the rotation add up to half a head"),
    "flint": ({"mlp_only_layers": [0]}, "its default lists two layers without experts, and two are left"),
    "muse_spark_audio": ({"hidden_sizes": [8, 8, 8, 32], "depths": [1, 1, 1, 1]}, "a list of sizes is not shortened"),
    "gemma4_text": ({**_MOE, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
                    "its experts are off by default"),
    "glm4v_moe_text": ({"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                            "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
                       "sections of the rotation add up to half of its rotated part"),
    "granitemoehybrid": ({"mamba_d_head": 16, "shared_intermediate_size": 24,
                          "layer_types": ["linear_attention", "full_attention"]}, "Mamba's heads must fit its width"),
    "hunyuan_v1_moe": ({"num_experts": 4, "moe_topk": 2, "head_dim": 8}, "its defaults have one expert"),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1}, "the first two layers have no attention"),
    "lfm2_moe": ({"layer_types": ["conv", "full_attention"]}, "its defaults leave these unset"),
    "longcat_flash": ({"head_dim": 8, "qk_head_dim": 16, "zero_expert_num": 2}, "its heads have two parts"),
    "mistral4": ({"head_dim": 16, "qk_head_dim": 16}, "its heads have two parts"),
    "qwen3_omni_moe_thinker": ({"vision_start_token_id": 383}, "its class reads it, and its config has no default"),
    "qwen4_exp_text": ({"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
                        "indexer_compress_ratio": 2, "output_gate_type": "sigmoid", "ngram_vocab_size_base": 64,
                        "split_ngram_parts": 1}, "its defaults leave these unset"),
    "step3p5": ({"sliding_window": 64}, "its defaults leave it unset"),
}  # fmt: skip


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny config of a model type; random weights spread widely enough that layers and routers matter."""
    return _tiny(CONFIG_MAPPING[model_type]())


def _tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    values = {
        key: value for key, value in config.to_dict().items() if key not in ("transformers_version", "model_type")
    }
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = _tiny(part).to_dict()
    depth = next((values[key] for key in _DEPTH if isinstance(values.get(key), int)), None)
    if depth is not None:
        kept = _layers(values, depth)
        for key in values:
            if key in _DEPTH:
                values[key] = len(kept)
            elif key == "per_layer_config" and values[key]:
                values[key] = {new: values[key][old] for new, old in enumerate(kept) if old in values[key]}
            elif isinstance(values[key], list) and len(values[key]) == depth:
                values[key] = [values[key][layer] for layer in kept]
    for key, value in values.items():
        if type(value) is int and value > 1:
            values[key] = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), value)
    if values.get("kv_lora_rank") and "num_attention_heads" in values:  # latent attention expands to every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "initializer_range" in values:
        values["initializer_range"] = 0.1
    if "tie_word_embeddings" in values:
        values["tie_word_embeddings"] = False
    values |= EXCEPTIONS.get(config.model_type, ({}, ""))[0]
    return type(config)(**values)


def _layers(values: dict[str, Any], depth: int) -> list[int]:
    """One layer of each kind, by the per-layer lists of a config; at least two."""
    kinds = [value for value in values.values() if isinstance(value, list) and len(value) == depth]
    seen: dict[str, int] = {}
    for layer in range(depth):
        seen.setdefault(repr([kind[layer] for kind in kinds]), layer)
    first = list(seen.values())[:_MOST_LAYERS]
    return sorted({*first, *range(min(2, depth))}) if len(first) < 2 else first
