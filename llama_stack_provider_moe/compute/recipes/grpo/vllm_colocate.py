"""vLLM inside the training process as engine: its `LLM` class, on the GPU that trains.

Written against vLLM's documented interface; this project has not run it, because vLLM needs a GPU.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.compute.recipes.grpo.engines import Answer, Sampling, checked
from llama_stack_provider_moe.errors import EngineFailed
from llama_stack_provider_moe.spec.blocks import DType
from llama_stack_provider_moe.spec.rl_engines import VllmColocateEngine

_DTYPES: dict[DType, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WHO = "vLLM in the training process"


def require_vllm() -> None:
    """Check that this environment has vLLM.

    Raises:
        EngineFailed: it has not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineFailed(
            "rl.engine: 'vllm_colocate' needs the package vllm in the environment of the training process "
            "(training_python), which lacks it; pip install 'trl[vllm]' there, or use 'vllm_server' or 'transformers'"
        )


class ColocatedVllm:
    """See `Engine`.

    Args:
        engine: the job's choice.
        model: folder of the base.
        dtype: that the job trains in.
        vocabulary: number of the policy's tokens.
        positions: most tokens of a prompt with its answer.
        with_routes: whether the experts of each token will be asked for.
    """

    def __init__(
        self, engine: VllmColocateEngine, model: Path, dtype: DType, vocabulary: int, positions: int, with_routes: bool
    ) -> None:
        require_vllm()
        vllm: Any = importlib.import_module("vllm")
        self._vocabulary = vocabulary
        self._sampling: Any = vllm.SamplingParams
        self._share = engine.gpu_memory_utilization
        self._llm: Any = vllm.LLM(
            model=str(model), dtype=_DTYPES[dtype], max_model_len=positions, skip_tokenizer_init=True,
            gpu_memory_utilization=self._share, logprobs_mode="processed_logprobs",
            enable_return_routed_experts=with_routes,
        )  # fmt: skip

    @property
    def told(self) -> str:
        """See `Engine`."""
        return f"{_WHO}, with {self._share:.0%} of the GPU's memory"

    def close(self) -> None:
        """Free what it holds on the GPU."""
        del self._llm

    def take(self, folder: Path) -> None:
        """See `Engine`."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.reset_prefix_cache()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, advance: Callable[[], None]
    ) -> list[list[Answer]]:
        """See `Engine`."""
        wanted = [
            self._sampling(
                n=sampling.answers, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed, logprobs=0,
                max_tokens=sampling.most_tokens, ignore_eos=True, stop_token_ids=list(sampling.ends), detokenize=False,
            )
            for seed in sampling.seeds
        ]  # fmt: skip
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = []
        for prompt, output in zip(prompts, self._llm.generate(given, wanted, use_tqdm=False), strict=True):
            answers = [_answer(each, sampling.with_routes) for each in output.outputs]
            if len(answers) != sampling.answers:
                raise EngineFailed(f"{_WHO} gave {len(answers)} answers to a prompt; expected {sampling.answers}")
            found.append([checked(_WHO, each, prompt, sampling, self._vocabulary) for each in answers])
            advance()
        return found


def _answer(output: Any, with_routes: bool) -> Answer:
    tokens = [int(each) for each in output.token_ids]
    if output.logprobs is None:
        raise EngineFailed(f"{_WHO} gave no log-probabilities")
    logps = [float(each[token].logprob) for token, each in zip(tokens, output.logprobs, strict=True)]
    return Answer(
        tokens, [None if math.isnan(each) else each for each in logps], output.routed_experts if with_routes else None
    )
