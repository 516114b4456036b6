"""Grader `reward_model`: the logit of a sequence classifier for a conversation, in the classifier's own template."""

from collections.abc import Sequence

import jinja2
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.grading.conversations import messages_with_answer
from llama_stack_provider_moe.graders.here import graded
from llama_stack_provider_moe.graders.samples import GradeFailed, Outcome, Sample
from llama_stack_provider_moe.spec.graders import RewardModel


class RewardModelGrader:
    """A reward model in memory.

    Args:
        grader: its spec.
        model: a classifier of one label.
        tokenizer: of the model; it pads on the right.
    """

    def __init__(self, grader: RewardModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._grader, self._model, self._tokenizer = grader, model, tokenizer

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """See `Grades`."""
        rendered: list[list[int]] = []

        def noted(sample: Sample) -> float:
            rendered.append(self._ids(sample))
            return 0.0

        made = [graded(noted, sample, self._grader.limits()[0]) for sample in samples]
        values = iter(self._values(rendered))
        return [each if each.failure is not None else Outcome(next(values)) for each in made]

    def close(self) -> None:
        """Let go of the model."""
        del self._model

    def _ids(self, sample: Sample) -> list[int]:
        messages = messages_with_answer(sample)
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except jinja2.TemplateError as error:
            raise GradeFailed("bad_reference", f"the reward model's template refuses the messages: {error}") from None
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not 1 <= len(ids) <= self._grader.max_length:
            raise GradeFailed("too_large", f"{len(ids)} tokens; expected 1 to max_length {self._grader.max_length}")
        return ids

    @torch.no_grad()
    def _values(self, rendered: list[list[int]]) -> list[float]:
        found: list[float] = []
        pad = self._tokenizer.pad_token_id
        for first in range(0, len(rendered), self._grader.batch_size):
            batch = rendered[first : first + self._grader.batch_size]
            width = max(map(len, batch))
            ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids in batch], device=self._model.device)
            mask_BT = torch.tensor(
                [[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=self._model.device
            )
            logits_B = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].float()
            found += (logits_B.sigmoid() if self._grader.scale == "sigmoid" else logits_B).tolist()
        return found
