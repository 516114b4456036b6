"""Memory and time that answers take which the trained model itself writes: distill, and GRPO without another engine.

One call of transformers' `generate` writes all answers of a process's part of a generation, B of them, to prompts of P
tokens with at most C tokens each:

    cache      keys and values: B x (P + C - 1) x layers with attention x numbers of a token x bytes of a number, where
               a token has 2 x key-value heads x width of a head numbers, or with latent attention its compressed ones.
               A layer with a sliding window keeps no more than the window, but all of the prompt until the first token.
               It is copied layer by layer as it grows. Fixed states of linear attention and state-space layers are left
               out: they are as large as some tokens are.
    logits     of a decode step: the model's, and in fp32 those that are sampled from, see `_SAMPLED`

No gradient and no activation exists then, and the optimiser's state does.

A decode step reads the weights that act on any of B tokens, and the cache, once: its time is that of the memory's
bandwidth, of which a job is assumed to reach `BANDWIDTH_SHARE`. No GPU was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llama_stack_provider_moe.compute.models.loader import DTYPES
from llama_stack_provider_moe.compute.planning.meta_model import MetaModel
from llama_stack_provider_moe.compute.planning.per_process import Weight
from llama_stack_provider_moe.spec import DistillSpec, GRPOSpec, TrainingSpec, WritingSpec
from llama_stack_provider_moe.spec.rl_engines import TransformersEngine

BANDWIDTH_SHARE = 0.5
# Bytes of each logit: an fp32 copy, its probability, and the random number that it is divided by. With a temperature a
# further copy; with top-p the sorted logits, their places (8 bytes), probabilities and sums of these.
_SAMPLED, _TEMPERATURE, _TOP_P = 3 * 4, 4, 4 + 8 + 4 + 4


@dataclass(frozen=True)
class GenerationMemory:
    """What writing answers takes, in bytes.

    Attributes:
        prompts: cache of the prompts.
        answers: cache when answers have their full length.
        layer: of these, the largest layer's.
        logits: of a decode step.
        share: tokens of prompts, divided by those of a micro-batch that is learnt from.
    """

    prompts: int
    answers: int
    layer: int
    logits: int
    share: float


def writes_itself(spec: TrainingSpec) -> TypeGuard[WritingSpec]:
    """Whether the trained model writes the answers that it learns from, not another engine."""
    return isinstance(spec, DistillSpec) or (
        isinstance(spec, GRPOSpec) and isinstance(spec.rl.engine, TransformersEngine)
    )


def answers_at_once(spec: WritingSpec) -> int:
    """B, the answers that one process writes together."""
    training = spec.training
    steps = spec.rl.steps_per_generation if isinstance(spec, GRPOSpec) else 1
    return training.batch_size * training.gradient_accumulation_steps * steps


def generation_memory(spec: TrainingSpec, config: PreTrainedConfig) -> GenerationMemory | None:
    """What a job's model takes to write answers; None: it writes none.

    Args:
        spec: the job.
        config: of its model.
    """
    if not writes_itself(spec):
        return None
    asked, length = spec.generating, spec.options.max_length
    size, rows = DTYPES[spec.training.dtype].itemsize, answers_at_once(spec)
    prompt = length - asked.max_completion_length
    token = rows * size * cached_numbers(config)
    kept = [_least(length - 1, window) for window in windows_of(config)]  # the last token is never run
    top_p = _TOP_P if asked.top_p < 1 else 0
    sampled = _SAMPLED + top_p + (_TEMPERATURE if asked.temperature != 1 else 0)
    return GenerationMemory(
        prompts=token * prompt * len(kept),
        answers=token * sum(kept),
        layer=token * max(kept, default=0),
        logits=rows * int(config.get_text_config().vocab_size) * (size + sampled),
        share=rows * prompt / (spec.training.batch_size * length),
    )


def cached_numbers(config: PreTrainedConfig) -> int:
    """Numbers that a layer with attention keeps of a token."""
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):  # transformers keeps what all heads expand
        return int(text.kv_lora_rank + text.qk_rope_head_dim)
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return 2 * int(getattr(text, "num_key_value_heads", None) or heads) * width


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """For each layer that keeps keys and values of tokens, the most that it keeps; None: all."""
    return [
        layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        for layer in DynamicCache(config=config).layers
        if isinstance(layer, DynamicLayer)
    ]


def decode_bytes(spec: WritingSpec, adapted: MetaModel, weights: Sequence[Weight]) -> float:
    """Bytes that all decode steps of a generation read in one process.

    An expert is read if any of the B answers' tokens chose it: of even choices 1 - (1 - K / E)^B of all experts.

    Args:
        spec: the job, whose answers all have their full length.
        adapted: its model.
        weights: that the process holds.
    """
    layout, config = adapted.layout, adapted.model.config
    rows, size = answers_at_once(spec), DTYPES[spec.training.dtype].itemsize
    hit = 1.0 if layout is None else 1 - (1 - layout.top_k / layout.num_experts) ** rows
    held = sum(each.bytes * (hit if each.kind == "expert" else 1.0) for each in weights if each.kind != "embedding")
    last = spec.options.max_length - 1  # tokens that are run; the first of an answer follows from its prompt's pass
    steps = range(last - spec.generating.max_completion_length + 2, last + 1)
    cached = sum(_least(tokens, window) for window in windows_of(config) for tokens in steps)
    return len(steps) * held + rows * size * cached_numbers(config) * cached


def _least(tokens: int, window: int | None) -> int:
    return tokens if window is None else min(tokens, window)
