"""The judge that the settings name, for as long as it is needed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llama_stack_provider_moe.evaluation.judges import Judge, KeywordJudge, ModelJudge
from llama_stack_provider_moe.spec import DType, SafetyEvaluation
from llama_stack_provider_moe.training.loader import load_beside


@contextmanager
def opened_judge(settings: SafetyEvaluation, dtype: DType, device: torch.device, max_length: int) -> Iterator[Judge]:
    """The keyword judge, or a model that is in memory inside the `with` alone."""
    name = settings.judge.model
    if name is None:
        yield KeywordJudge()
        return
    model, tokenizer = load_beside(name, dtype, device)
    yield ModelJudge(name, model, tokenizer, settings.batch_size, max_length)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
