"""Types of GGUF files, as llama.cpp names them."""

from typing import Literal, get_args

# llama.cpp's converter writes `f32` to `q8_0`; its llama_model_quantize makes the others.
GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s",
    "q5_k_m", "q6_k",
]  # fmt: skip
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
