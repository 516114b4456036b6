"""A model in memory, asked: greedy answers in batches, tool calls, and log-likelihoods of given answers.

The model may be one that is being trained: what an evaluation needs otherwise (evaluation mode, no router logits, a
cache, its own generation settings, the random state) is put back behind it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.datarows import Message
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.evaluation.agent import Call, tool_calls
from llama_stack_provider_moe.evaluation.report import TaskScore
from llama_stack_provider_moe.evaluation.tasks import run_tasks
from llama_stack_provider_moe.experts.layout import text_config
from llama_stack_provider_moe.training.rendering import Renderer, Unrenderable

Tell = Callable[[str, int, int], None]


class Subject(Protocol):
    """What is evaluated."""

    def answers(self, name: str, conversations: Sequence[list[Message]]) -> list[str]:
        """What it says to each conversation, which ends where it is to speak."""

    def calls(self, name: str, scenarios: Sequence[dict[str, Any]]) -> list[list[Call]]:
        """The tool calls it makes in each scenario."""

    def likelihoods(self, name: str, conversations: Sequence[list[Message]]) -> tuple[list[float], list[int]] | None:
        """NLL of each conversation's answers, in nats, and their tokens; None where it does not tell them."""

    def tasks(self, names: Sequence[str], skip: Callable[[str], None]) -> dict[str, TaskScore]:
        """Scores of lm-eval's tasks; `skip` is told of those that there are none of."""


@dataclass(frozen=True)
class Limits:
    """How it is asked."""

    batch_size: int
    max_new_tokens: int
    max_length: int  # tokens of a prompt, or of a conversation whose answers are measured


@contextmanager
def evaluating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, `model` is as it will run; afterwards it is, with the random state, as it was."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modes = {module: module.training for module in model.modules()}
    config, generation = text_config(base), base.generation_config
    logits = getattr(config, "output_router_logits", None)  # only MoE families have it
    devices = [model.device] if model.device.type == "cuda" else []
    states = random.getstate(), numpy.random.get_state()  # lm-eval seeds these too
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            base.generation_config = GenerationConfig()
            if logits:
                # Passes with a cache see one token, the mask all of them: the balance loss of both would fail.
                config.output_router_logits = False
            yield
        finally:
            if logits:
                config.output_router_logits = logits
            base.generation_config = generation
            for module, training in modes.items():
                module.training = training
            random.setstate(states[0])
            numpy.random.set_state(states[1])


class LocalModel:
    """A `Subject` in memory. To be used inside `evaluating`.

    Args:
        model: with or without adapters.
        tokenizer: its own, with a chat template and a padding token.
        limits: how it is asked.
        ends: further ids that end an answer: those of the generation config that the model shipped with.
        autocast: dtype of the passes where parameters have several, as in training; None: their own.
        tell: told a set's name, how many of its rows are done, and of how many.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        ends: Sequence[int],
        autocast: torch.dtype | None,
        tell: Tell,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._limits = limits
        self._ends = sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        self._autocast = autocast
        self._tell = tell
        self._renderer = Renderer(tokenizer)

    def answers(self, name: str, conversations: Sequence[list[Message]]) -> list[str]:
        """Greedy, special tokens left out."""
        prompts = []
        for number, messages in enumerate(conversations, start=1):
            try:
                text = self._renderer.prompt(messages).text
            except Unrenderable as problem:
                raise DataError(f"eval: {name} row {number}: {problem}") from None
            prompts.append(text)
        return [self._text(ids, plain=True) for ids in self._generate(name, prompts)]

    def calls(self, name: str, scenarios: Sequence[dict[str, Any]]) -> list[list[Call]]:
        """Found in greedy answers, special tokens included: several families mark calls by them."""
        prompts = [self._with_tools(name, number, each) for number, each in enumerate(scenarios, start=1)]
        return [tool_calls(self._text(ids, plain=False)) for ids in self._generate(name, prompts)]

    def _with_tools(self, name: str, number: int, scenario: dict[str, Any]) -> str:
        messages, tools = scenario["messages"], scenario["tools"] or None
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True
            )
            bare = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise DataError(f"eval: {name} row {number}: the chat template refuses it ({error})") from None
        if tools is not None and text == bare:
            raise DataError(
                f"eval: {name} row {number}: the model's chat template leaves `tools` out; describe them in a system "
                "message, and give no `tools`"
            )
        return text

    def _text(self, ids: list[int], plain: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=plain)
        return text.strip()

    @torch.no_grad()
    def _generate(self, name: str, prompts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        room = self._limits.max_length
        for number, ids in enumerate(encoded, start=1):
            if len(ids) > room:
                raise DataError(
                    f"eval: {name} row {number}: its prompt has {len(ids)} tokens, options.max_length is {room}"
                )
        # Rows of like length together; which rows share a batch is the same before and after.
        order = sorted(range(len(encoded)), key=lambda row: (len(encoded[row]), row))
        found: dict[int, list[int]] = {}
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._limits.max_new_tokens,
            eos_token_id=self._ends or None,
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
        )
        for first in range(0, len(order), self._limits.batch_size):
            rows = order[first : first + self._limits.batch_size]
            ids_BT, mask_BT = self._padded([encoded[row] for row in rows], left=True)
            with self._precision():
                made_BT = self._model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings)
            for row, ids in zip(rows, made_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
                found[row] = self._until_end(ids)
            self._tell(name, len(found), len(order))
        return [found[row] for row in range(len(encoded))]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in self._ends), len(ids))
        return ids[:end]

    @torch.no_grad()
    def likelihoods(self, name: str, conversations: Sequence[list[Message]]) -> tuple[list[float], list[int]]:
        """By the tokens of assistant turns, cut at `max_length` tokens of a conversation."""
        ids, said = [], []
        for number, messages in enumerate(conversations, start=1):
            try:
                [tokens] = self._renderer.tokens([self._renderer.conversation(messages)])
            except Unrenderable as problem:
                raise DataError(f"eval: {name} row {number}: {problem}") from None
            ids.append(tokens.ids[: self._limits.max_length])
            said.append(tokens.said[: self._limits.max_length])
            if not any(said[-1][1:]):  # the first token is never predicted
                raise DataError(f"eval: {name} row {number}: no token of an answer within options.max_length")
        nll: list[float] = []
        for first in range(0, len(ids), self._limits.batch_size):
            part = slice(first, first + self._limits.batch_size)
            ids_BT, mask_BT = self._padded(ids[part], left=False)
            with self._precision():
                logits_BTV = self._model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            for row, counts in enumerate(said[part]):
                nll.append(_nll(logits_BTV[row], ids_BT[row], counts))
            self._tell(name, len(nll), len(ids))
        return nll, [sum(counts[1:]) for counts in said]

    def tasks(self, names: Sequence[str], skip: Callable[[str], None]) -> dict[str, TaskScore]:
        """See `tasks.run_tasks`."""
        with self._precision():
            return run_tasks(self._model, self._tokenizer, names, self._limits.batch_size, skip)

    def _padded(self, rows: Sequence[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        width, pad = max(map(len, rows)), self._tokenizer.pad_token_id
        ids, mask = [], []
        for row in rows:
            gap = width - len(row)
            ids.append([pad] * gap + row if left else row + [pad] * gap)
            mask.append([0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap)
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if self._autocast is None:
            yield
            return
        with torch.autocast(self._model.device.type, dtype=self._autocast):
            yield


def _nll(logits_TV: Tensor, ids_T: Tensor, counts: list[bool]) -> float:
    """Of the tokens that count, in nats; one row at a time, for fp32 logits of a batch are the largest thing here."""
    length = len(counts)
    log_probs_TV = logits_TV[: length - 1].float().log_softmax(-1)
    picked_T = log_probs_TV.gather(-1, ids_T[1:length, None])[:, 0]
    return -picked_T[torch.tensor(counts[1:], device=picked_T.device)].double().sum().item()


def ends_of(model: PreTrainedModel | PeftModel) -> list[int]:
    """Ids that end an answer by the model's shipped generation config; to be asked before `evaluating`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    ends = base.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
