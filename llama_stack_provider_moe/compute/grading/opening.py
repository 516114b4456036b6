"""The rewards of a job, ready inside a `with`: graders of `graders`, and those that need torch.

with open_rewards(spec.reward, spec.grading, "bf16", device) as panel:
    graded = panel.grade([Sample(item, text, tokens, truncated), ...])
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from llama_stack_provider_moe.compute.evaluation.judges import ModelJudge
from llama_stack_provider_moe.compute.grading.monitor import MonitorGrader
from llama_stack_provider_moe.compute.grading.refusal_model import ModelRefusal
from llama_stack_provider_moe.compute.grading.reward_model import RewardModelGrader
from llama_stack_provider_moe.compute.models.classifier import load_classifier
from llama_stack_provider_moe.compute.models.loader import load_for_inference
from llama_stack_provider_moe.graders.judges import Judges, judges_of_environment
from llama_stack_provider_moe.graders.opening import OpenTorch
from llama_stack_provider_moe.graders.panel import Panel, panel_of
from llama_stack_provider_moe.graders.samples import Grades
from llama_stack_provider_moe.spec import DType
from llama_stack_provider_moe.spec.graders import Monitor, PlainGrader, Refusal, RewardModel
from llama_stack_provider_moe.spec.rewards import Grading, Reward

JUDGE_LENGTH = 4096  # tokens of a question to a model judge; a longer answer is cut at its end
JUDGE_BATCH = 8


@contextmanager
def open_rewards(
    rewards: Sequence[Reward],
    grading: Grading,
    dtype: DType,
    device: torch.device,
    judges: Judges | None = None,
) -> Iterator[Panel]:
    """The rewards, ready inside the `with`.

    Args:
        rewards: their specs.
        grading: how they run.
        dtype: of the models that graders load.
        device: that these run on.
        judges: models at URLs; None: those that the server named for this process.

    Raises:
        InvalidInput: a grader can't run here.
        ModelError: a model can't be loaded.
    """
    named = judges_of_environment() if judges is None else judges
    with panel_of(rewards, grading, named, torch_opener(dtype, device)) as panel:
        yield panel
    if device.type == "cuda":
        torch.cuda.empty_cache()


def torch_opener(dtype: DType, device: torch.device) -> OpenTorch:
    """Return what opens graders that need torch.

    Args:
        dtype: of the models that graders load.
        device: that these run on.
    """

    def opened(grader: PlainGrader) -> Grades:
        match grader:
            case RewardModel():
                return RewardModelGrader(grader, *load_classifier(grader.model, dtype, device, f"{grader.name}.model"))
            case Monitor():
                return MonitorGrader.of(grader)
            case Refusal(model=str() as name):
                model, tokenizer = load_for_inference(name, dtype, device)
                longest = min(JUDGE_LENGTH, getattr(model.config, "max_position_embeddings", JUDGE_LENGTH))
                judge = ModelJudge(name, model, tokenizer, JUDGE_BATCH, longest, f"{grader.name}.model")
                return ModelRefusal(grader, judge)
            case _:
                raise AssertionError(f"a grader of type {grader.type} needs no torch")

    return opened
