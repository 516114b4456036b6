"""What the derivation of a layout (`derive`) can't see in a model, one line each, with its reason.

Model types are those of the language model inside (`config.get_text_config()`); class names are those of transformers
5.23. `tests/compute/moe/test_exceptions.py` shows that every line is still needed.
"""

from llama_stack_provider_moe.compute.moe.scoring import Scoring

# Class of a router -> its scoring, where no formula of the logits gives the weights of the chosen experts.
SCORINGS: dict[str, Scoring] = {
    # SparseMixer weighs each of a token's two experts by a softmax of its own (arXiv 2409.12136, section 2.2).
    "PhimoeTopKRouter": "softmax",
}

# Model type -> names of the modules, in a MoE layer, whose experts only see tokens of images; they stay frozen.
OF_IMAGES: dict[str, str] = {
    # Its layers have one block of experts for text and another for images.
    "ernie4_5_vl_moe_text": "vision_moe",
}

# Class of experts that transformers does not dispatch (`use_experts_implementation`), but whose formula is known: our
# kernels compute them. Any other class keeps transformers' own loop.
KNOWN_LOOPS = ("Llama4TextExperts", "LongcatFlashExperts", "Step3p7Experts")

# Model type of a whole model -> why this version can't train it.
REFUSED: dict[str, str] = {
    "diffusion_gemma": "it fills blocks of masked tokens; its loss is not that of the next token",
    "jetmoe": "its attention has experts too, in a layout of its own",
    "doge": "its experts are single rows of an embedding, chosen by products of keys",
    "dbrx": "its experts are stacked in two axes, not three",
}
