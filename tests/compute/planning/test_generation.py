"""What writing GRPO's answers takes, by the planner: against numbers by hand, and against real tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from llama_stack_provider_moe.compute.planning.estimated_time import BANDWIDTH_SHARE, estimated, flops_a_token
from llama_stack_provider_moe.compute.planning.generation import (
    cached_numbers,
    decode_bytes,
    generation_memory,
    windows_of,
)
from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
from llama_stack_provider_moe.compute.planning.throughput import bandwidth
from llama_stack_provider_moe.spec import JOB_SPEC, GRPOSpec
from tests.support import tiny_models

# 2 layers, 2 heads of keys and of values with 8 numbers each, 4 experts, top-2, a vocabulary of 384.
CONFIG = tiny_models.config("mixtral")
A_TOKEN = 2 * 2 * 8  # numbers of a layer
ANSWERS = 4 * 2 * 3  # batch x accumulation x steps of a generation


def job(**blocks: Any) -> GRPOSpec:
    """GRPO with LoRA on one GPU: 24 answers of 40 tokens to prompts of 24, in bf16."""
    body: dict[str, Any] = {
        "recipe": "grpo", "model": "a/b", "data": {"dataset_id": "d"}, "options": {"max_length": 64},
        "training": {"batch_size": 4, "gradient_accumulation_steps": 2}, "adapter": {"rank": 4},
        "rl": {"n_generations": 4, "steps_per_generation": 3, "max_completion_length": 40}, "resources": {"gpus": 1},
        "reward": [{"grader": {"type": "regex", "name": "has e", "pattern": "e"}}],
    }  # fmt: skip
    for name, block in blocks.items():
        body[name] = {**body[name], **block} if isinstance(block, dict) and isinstance(body.get(name), dict) else block
    made = JOB_SPEC.validate_python(body)
    assert isinstance(made, GRPOSpec)
    return made


def test_the_cache_and_the_logits_by_hand() -> None:
    found = generation_memory(job(), CONFIG)
    assert found is not None
    assert found.answers == ANSWERS * 63 * 2 * A_TOKEN * 2
    assert found.prompts == ANSWERS * 24 * 2 * A_TOKEN * 2
    assert found.layer == found.answers // 2
    assert found.logits == ANSWERS * 384 * (2 + 4 + 4 + 4)
    assert found.share == 6 * 24 / 64
    wide = generation_memory(job(training={"dtype": "fp32"}, rl={"temperature": 0.7, "top_p": 0.9}), CONFIG)
    assert wide is not None
    assert wide.answers == 2 * found.answers
    assert wide.logits == ANSWERS * 384 * (4 + 12 + 4 + 20)
    assert generation_memory(job(rl={"engine": {"type": "vllm_server", "server": "x"}}), CONFIG) is None


def test_distillation_writes_an_answer_to_each_prompt_of_a_step() -> None:
    body = {
        "recipe": "distill", "teacher": "t", "generation": {"max_completion_length": 40},
        **job().model_dump(mode="json", include={"model", "data", "training", "adapter", "resources"}),
        "options": {"max_length": 64},
    }  # fmt: skip
    found, grpo = generation_memory(JOB_SPEC.validate_python(body), CONFIG), generation_memory(job(), CONFIG)
    assert found is not None
    assert grpo is not None
    assert 3 * found.answers == grpo.answers, "no steps share a generation"
    assert (3 * found.logits, 3 * found.share) == (grpo.logits, grpo.share)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_5_moe", "granitemoehybrid"])
def test_the_cache_is_what_a_model_keeps(family: str) -> None:
    """Of 20 tokens, by layer: all, a window of 8, latent attention, and layers without keys."""
    changes = {"sliding_window": 8} if family == "gpt_oss" else {}
    model = tiny_models.model(family, **changes)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in (torch.arange(10, 26)[None], *torch.arange(26, 30).view(4, 1, 1)):  # a prompt, then one by one
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
    kept = [layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
            for layer in cache.layers if getattr(layer, "keys", None) is not None]  # fmt: skip
    wanted = [4 * cached_numbers(model.config) * min(20, window or 20) for window in windows_of(model.config)]
    assert kept == wanted
    assert (8 in windows_of(model.config)) == (family == "gpt_oss")


def test_the_plan_has_the_moment_at_which_answers_are_longest() -> None:
    planner = Planner(CONFIG, Machine("cuda", 80 * 10**9))
    short, _ = planner.estimate(job(), "ddp")
    assert short.terms.cache == 0, "learning takes more"
    many = {"steps_per_generation": 384, "max_completion_length": 62}
    found, certain = planner.estimate(job(rl=many), "ddp")
    memory = generation_memory(job(rl=many), CONFIG)
    assert memory is not None
    assert found.moment == "last token of answers"
    assert found.terms.cache == memory.answers
    assert found.terms.working == memory.layer + memory.logits
    assert (found.terms.gradients, found.terms.activations) == (0, 0)
    long, _ = planner.estimate(job(rl={**many, "max_completion_length": 20}), "ddp")
    assert long.moment == "prompts of answers"
    assert long.terms.cache == 384 * 8 * 44 * 2 * A_TOKEN * 2
    assert long.terms.working > memory.logits
    assert planner.estimate(job(), "ddp")[1] == certain, "of all batches the same"
    elsewhere = job(rl={**many, "engine": {"type": "vllm_server", "server": "x"}}, adapter={"rank": 4})
    remote, _ = planner.estimate(elsewhere, "ddp")
    assert remote.peak_bytes == short.peak_bytes


def test_a_reference_is_a_copy_only_where_no_adapter_can_be_off() -> None:
    planner = Planner(CONFIG, Machine("cuda", 80 * 10**9))
    lora, penalised, whole, copied = (
        planner.estimate(job(adapter=adapter, rl={"beta": beta}), "ddp")[0].terms.weights
        for adapter in ({"rank": 4}, None) for beta in (0, 0.1)
    )  # fmt: skip
    assert lora == penalised
    assert copied == pytest.approx(2 * whole, rel=0.01)


def test_the_time_counts_written_tokens() -> None:
    planner, spec = Planner(CONFIG, Machine("cuda", 80 * 10**9)), job(rl={"steps_per_generation": 1})
    weights = planner.weights(spec)
    # 39 steps after the prompt's pass, which gives the first token, over 25 to 63 tokens; with 8 answers, 255 of 256
    # experts' parts are read.
    experts = sum(each.bytes for each in weights if each.kind == "expert")
    others = sum(each.bytes for each in weights if each.kind not in ("expert", "embedding"))
    cache = sum(8 * 2 * 2 * A_TOKEN * tokens for tokens in range(25, 64))
    assert experts > 0
    assert decode_bytes(spec, planner.adapted(spec), weights) == pytest.approx(
        39 * (others + experts * (1 - 0.5**8)) + cache
    )
    speed = bandwidth("NVIDIA H100 80GB HBM3")
    assert speed == 3350e9
    found = estimated(planner, spec, "NVIDIA H100 80GB HBM3", rows=100)
    learnt_s = flops_a_token(planner, spec) / (0.2 * 989.4e12)
    written_s = decode_bytes(spec, planner.adapted(spec), weights) / (BANDWIDTH_SHARE * speed)  # for 8 answers
    assert found["seconds"] == pytest.approx(400 * (64 * learnt_s + written_s / 8))
    assert "50% of its memory's bandwidth" in found["basis"]
    twice = estimated(planner, job(rl={"steps_per_generation": 1, "n_iterations": 2}), "NVIDIA H100 80GB HBM3", 100)
    assert found["seconds"] < (twice["seconds"] or 0) < 2 * found["seconds"], "written once, learnt from twice"
    one = replace(planner.adapted(spec), layout=None)
    assert decode_bytes(spec, one, weights) > decode_bytes(spec, planner.adapted(spec), weights)
