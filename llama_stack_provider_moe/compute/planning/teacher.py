"""Memory that distilling takes beside the model's own: the teacher's weights, and logits of both where they compare."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.models.loader import DTYPES
from llama_stack_provider_moe.compute.moe.model_types import blank_model
from llama_stack_provider_moe.compute.planning.meta_model import read_config
from llama_stack_provider_moe.spec import DistillSpec, GRPOSpec, SFTSpec, TrainingSpec

# In fp32, of each logit: log-probabilities of both, the teacher's probabilities, and two products.
_COMPARED = 5 * 4
# On-policy distillation compares so many tokens at a time, in backward again. In fp32, of each logit: the gradients and
# log-probabilities of both and of their mixture, the probabilities of both, and the products of each with a difference.
TILE = 256
_COMPARED_OF_TILE = 12 * 4


def distils(spec: TrainingSpec) -> bool:
    """Whether the job learns from a teacher's probabilities: then the head's logits are whole."""
    return isinstance(spec, DistillSpec) or (isinstance(spec, SFTSpec) and spec.distill is not None)


def blank_teacher(spec: TrainingSpec) -> PreTrainedModel | None:
    """The frozen model without weights that a job names as its teacher; None: it names none.

    Raises:
        ModelError: the teacher's config can't be read.
    """
    if (named := spec.teacher_named()) is None:
        return None
    with torch.device("meta"):
        teacher = blank_model(read_config(named[1], named[0])[0])
    teacher.requires_grad_(False)
    return teacher


def compares(spec: TrainingSpec) -> bool:
    """Whether the job compares with the model as it was, of which it needs a copy if all weights train."""
    return spec.recipe in ("dpo", "kto") or (isinstance(spec, GRPOSpec) and spec.rl.beta > 0)


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes.

    Attributes:
        copies: frozen copies of the model itself, 0 or 1.
        weights: of another model that is the teacher.
        logits: of the teacher, which are kept while the model runs.
        compared: of both models' probabilities while they are compared.
    """

    copies: int
    weights: int
    logits: int
    compared: int


def teacher_memory(spec: TrainingSpec, config: PreTrainedConfig) -> TeacherMemory | None:
    """What a job's teacher takes; None: it has none. Every token of a micro-batch, or of its answers, counts as learnt.

    Args:
        spec: the job.
        config: of its model.

    Raises:
        ModelError: the teacher's config can't be read.
    """
    if not distils(spec):
        return None
    size, vocabulary = DTYPES[spec.training.dtype].itemsize, int(config.get_text_config().vocab_size)
    teacher = blank_teacher(spec)
    weights = 0 if teacher is None else size * sum(each.numel() for each in teacher.parameters())
    copies = int(teacher is None and spec.adapter is None)
    if isinstance(spec, DistillSpec):
        tokens = spec.training.batch_size * spec.generation.max_completion_length
        compared = min(tokens, TILE) * vocabulary * _COMPARED_OF_TILE
        return TeacherMemory(copies, weights, tokens * vocabulary * size, compared)
    tokens = spec.training.batch_size * spec.options.max_length
    return TeacherMemory(copies, weights, tokens * vocabulary * size, tokens * vocabulary * _COMPARED)
