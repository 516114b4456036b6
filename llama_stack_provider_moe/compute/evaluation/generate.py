"""A model in memory that is evaluated: greedy answers in batches, tool calls, and log-likelihoods of given answers.

The model may be in training: afterwards, everything that an evaluation changes (evaluation mode, router logits, cache,
generation settings, random state) is as before.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from llama_stack_provider_moe.compute.data.rendering import Rendered, Renderer, Unrenderable
from llama_stack_provider_moe.compute.evaluation.agent import Call, tool_calls
from llama_stack_provider_moe.compute.evaluation.lm_eval_tasks import run_tasks
from llama_stack_provider_moe.compute.evaluation.report import TaskScore
from llama_stack_provider_moe.compute.models import generation_ends
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.evaluation_rows import ScenarioRow
from llama_stack_provider_moe.spec.rows import Conversation

Progress = Callable[[str, int, int], None]
Around = Callable[[Tensor], AbstractContextManager[None]]


class Subject(Protocol):
    """A model that is evaluated."""

    def answers(self, name: str, conversations: Sequence[Conversation]) -> list[str]:
        """Its answer to each conversation, which ends where the answer begins."""

    def calls(self, name: str, scenarios: Sequence[ScenarioRow]) -> list[list[Call]]:
        """Its tool calls in each scenario."""

    def likelihoods(self, name: str, conversations: Sequence[Conversation]) -> tuple[list[float], list[int]] | None:
        """NLL of each conversation's answers, in nats, and their number of tokens; None if it is not available."""

    def tasks(self, names: Sequence[str], skip: Callable[[str], None]) -> dict[str, TaskScore]:
        """Scores of lm-eval's tasks; calls `skip` for tasks without a score."""


@dataclass(frozen=True)
class Limits:
    """Sizes of an evaluation."""

    batch_size: int
    max_new_tokens: int
    max_length: int  # tokens of a prompt, or of a conversation whose answers are measured


class Texts(NamedTuple):
    """Texts of conversations; a conversation may need several, one for each answer."""

    ids: list[list[int]]
    said: list[list[bool]]  # whether a token is of an answer
    owners: list[int]  # number of the conversation


@contextmanager
def evaluating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, `model` is ready to answer; afterwards the model and the random state are as before."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modes = {module: module.training for module in model.modules()}
    config, generates = text_config(base), base.can_generate()  # a classifier does not
    generation = base.generation_config if generates else None
    logits = getattr(config, "output_router_logits", None)  # only MoE families have it
    devices = [model.device] if model.device.type == "cuda" else []
    states = random.getstate(), numpy.random.get_state()  # lm-eval seeds these too
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            if generates:
                base.generation_config = GenerationConfig()
            if logits:
                # Passes with a cache see one token, but the mask has all: the balance loss would fail.
                config.output_router_logits = False
            yield
        finally:
            if logits:
                config.output_router_logits = logits
            if generates:
                base.generation_config = generation
            for module, training in modes.items():
                module.training = training
            random.setstate(states[0])
            numpy.random.set_state(states[1])


class LocalModel:
    """A `Subject` in memory. Use it inside `evaluating`.

    Args:
        model: with or without adapters.
        tokenizer: of the model, with a chat template and a padding token.
        limits: sizes.
        ends: further ids that end an answer: those of the generation config that the model came with.
        autocast: dtype of the passes if parameters have several dtypes, as in training; None: the parameters' own.
        progress: called with a set's name, the number of rows that are done (0 at first), and their total.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        ends: Sequence[int],
        autocast: torch.dtype | None,
        progress: Progress,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._limits = limits
        self._ends = sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        self._autocast = autocast
        self._progress = progress
        self._renderer = Renderer(tokenizer)

    def answers(self, name: str, conversations: Sequence[Conversation]) -> list[str]:
        """Greedy answers, without special tokens."""
        prompts = []
        for number, talk in enumerate(conversations, start=1):
            try:
                prompts.append(self._renderer.prompt(talk))
            except Unrenderable as problem:
                raise DataError(f"eval: {name} row {number}: {problem}") from None
        return [self._text(ids, plain=True) for ids in self._generate(name, prompts)]

    def calls(self, name: str, scenarios: Sequence[ScenarioRow]) -> list[list[Call]]:
        """The calls in greedy answers, with special tokens, because several families mark calls by them."""
        prompts = [self._with_tools(name, number, each) for number, each in enumerate(scenarios, start=1)]
        return [tool_calls(self._text(ids, plain=False)) for ids in self._generate(name, prompts)]

    def _with_tools(self, name: str, number: int, scenario: ScenarioRow) -> Rendered:
        try:
            return self._renderer.prompt({"messages": scenario["messages"], "tools": scenario["tools"]})
        except Unrenderable as problem:
            raise DataError(f"eval: {name} row {number}: {problem}") from None

    def _text(self, ids: list[int], plain: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=plain)
        return text.strip()

    @torch.no_grad()
    def _generate(self, name: str, prompts: Sequence[Rendered]) -> list[list[int]]:
        room, encoded = self._limits.max_length, list[list[int]]()
        for number, found_tokens in enumerate(self._renderer.tokens_of_rows([[each] for each in prompts]), start=1):
            if isinstance(found_tokens, Unrenderable):
                raise DataError(f"eval: {name} row {number}: {found_tokens}")
            [tokens] = found_tokens
            ids = tokens.ids
            encoded.append(ids)
            if len(ids) > room:
                raise DataError(
                    f"eval: {name} row {number}: the prompt has {len(ids)} tokens, but options.max_length is {room}"
                )
        # Rows of similar length together; the batches are the same before and after training.
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
        self._progress(name, 0, len(order))
        for first in range(0, len(order), self._limits.batch_size):
            rows = order[first : first + self._limits.batch_size]
            ids_BT, mask_BT = self._padded([encoded[row] for row in rows], left=True)
            with self._precision():
                made_BT = self._model.generate(
                    input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings,
                    stopping_criteria=StoppingCriteriaList([_sign_of_life]),
                )  # fmt: skip
            for row, ids in zip(rows, made_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
                found[row] = self._until_end(ids)
            self._progress(name, len(found), len(order))
        return [found[row] for row in range(len(encoded))]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in self._ends), len(ids))
        return ids[:end]

    def likelihoods(self, name: str, conversations: Sequence[Conversation]) -> tuple[list[float], list[int]]:
        """NLL of the tokens of assistant turns; a text is cut at `max_length` tokens."""
        texts = self.texts(name, conversations)
        nll, counted = [0.0] * len(conversations), [0] * len(conversations)
        for rows, logits_BTV in self.passes(name, texts.ids):
            for at, row in enumerate(rows):
                ids_T = torch.tensor(texts.ids[row], device=logits_BTV.device)
                nll[texts.owners[row]] += _nll(logits_BTV[at], ids_T, texts.said[row])
                counted[texts.owners[row]] += sum(texts.said[row][1:])
        return nll, counted

    def texts(self, name: str, conversations: Sequence[Conversation]) -> Texts:
        """The texts with the answers of each conversation, cut at `max_length` tokens."""
        ids, said, owners = [], [], []
        for number, talk in enumerate(conversations, start=1):
            try:
                made = self._renderer.tokens(self._renderer.row(talk))
            except Unrenderable as problem:
                raise DataError(f"eval: {name} row {number}: {problem}") from None
            ids += [tokens.ids[: self._limits.max_length] for tokens in made]
            said += [tokens.said[: self._limits.max_length] for tokens in made]
            owners += [number - 1] * len(made)
            if not any(any(each[1:]) for each in said[-len(made) :]):  # the first token is never predicted
                raise DataError(f"eval: {name} row {number}: no token of an answer within options.max_length")
        return Texts(ids, said, owners)

    def passes(
        self, name: str, ids: Sequence[list[int]], around: Around = lambda mask_BT: nullcontext()
    ) -> Iterator[tuple[range, Tensor]]:
        """(numbers of the texts, their logits (B, T, V)) of each batch, padded on the right.

        Args:
            name: of the set, for messages.
            ids: of each text.
            around: makes the context of a pass, from its attention mask (B, T).
        """
        self._progress(name, 0, len(ids))
        for first in range(0, len(ids), self._limits.batch_size):
            rows = range(first, min(first + self._limits.batch_size, len(ids)))
            yield rows, self.logits([ids[row] for row in rows], around)
            self._progress(name, rows.stop, len(ids))

    @torch.no_grad()
    def logits(self, ids: Sequence[list[int]], around: Around = lambda mask_BT: nullcontext()) -> Tensor:
        """Logits of one batch of texts, (B, T, V); see `passes`."""
        ids_BT, mask_BT = self._padded(ids, left=False)
        with self._precision(), around(mask_BT):
            made: Tensor = self._model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        return made

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


def _sign_of_life(ids_BT: Tensor, *_: object, **__: object) -> Tensor:
    """A stopping criterion that `generate` calls after each token; it stops no row."""
    liveness.alive()
    return torch.zeros(ids_BT.shape[0], dtype=torch.bool, device=ids_BT.device)


def _nll(logits_TV: Tensor, ids_T: Tensor, counts: list[bool]) -> float:
    """NLL of the tokens that count, in nats; one row at a time, because fp32 logits of a batch take the most memory."""
    length = len(counts)
    log_probs_TV = logits_TV[: length - 1].float().log_softmax(-1)
    picked_T = log_probs_TV.gather(-1, ids_T[1:length, None])[:, 0]
    return -picked_T[torch.tensor(counts[1:], device=picked_T.device)].double().sum().item()


def ends_of(model: PreTrainedModel | PeftModel) -> list[int]:
    """Ids that end an answer by the generation config that the model came with; call it before `evaluating`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return generation_ends.ends_of(base)
