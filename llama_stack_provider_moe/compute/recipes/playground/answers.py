"""Answers of a playground: tokens, text and experts, written as they come."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from llama_stack_provider_moe.compute.data.positions import positions_of
from llama_stack_provider_moe.compute.data.rendering import Renderer, Unrenderable
from llama_stack_provider_moe.compute.evaluation.generate import ends_of, evaluating
from llama_stack_provider_moe.compute.models.adapted import Adapted
from llama_stack_provider_moe.compute.models.generation_ends import FILE
from llama_stack_provider_moe.compute.models.loader import DTYPES
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.compute.recipes.playground.inbox import Inbox
from llama_stack_provider_moe.compute.recipes.playground.writing import Writing
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.ground.small_files import check_ids, read_object
from llama_stack_provider_moe.jobdir.prompts import AnswerLog, Begun, Ended
from llama_stack_provider_moe.spec import PlaygroundSpec
from llama_stack_provider_moe.spec.playground import AdapterSide, PromptRequest
from llama_stack_provider_moe.spec.rows import Conversation

STOPPED = "the playground was cancelled while it answered"
_SHOWN = 1000  # characters of an error


class Answers:
    """Answers prompts with one loaded model.

    Args:
        session: the job.
        loaded: the model.
        tokenizer: for prompts and answers.

    Attributes:
        tokens: number of tokens of all answers.
    """

    def __init__(self, session: Session[PlaygroundSpec], loaded: Adapted, tokenizer: PreTrainedTokenizerBase) -> None:
        self._session = session
        self._loaded = loaded
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)
        self._positions = positions_of(loaded.model)
        self._ends = _ends(session.spec, loaded, tokenizer)
        self._recorder = None if loaded.layout is None else RoutingRecorder(loaded.model, loaded.layout)
        self.tokens = 0

    def close(self) -> None:
        """Remove the hooks from the model."""
        if self._recorder is not None:
            self._recorder.close()

    def answer(self, inbox: Inbox, number: int) -> None:
        """Answer a prompt; a prompt that can't be answered gets an error, and the playground goes on.

        Raises:
            torch.AcceleratorError: the GPU failed, and computes nothing more in this process.
        """
        try:
            asked = inbox.files.read_prompt(number)
        except FileNotFoundError:  # withdrawn a moment ago
            return
        except ValueError as error:
            asked, problem = None, f"the prompt can't be read: {error}"
        with closing(AnswerLog(inbox.files.answer(number))) as log:
            if asked is None:
                log.append(Ended(error=problem[:_SHOWN]))
                return
            try:
                self._answer(asked, log, inbox.files.stop(number))
            except DataError as error:
                log.append(Ended(error=str(error)[:_SHOWN]))
            except torch.AcceleratorError:
                raise
            except (RuntimeError, ValueError) as error:  # out of memory, too
                log.append(Ended(error=f"no answer: {type(error).__name__}: {error}"[:_SHOWN]))
            else:
                log.append(Ended(error=STOPPED if self._session.stop.requested else None))
        inbox.files.forget_old()
        self._session.show(f"prompt {number}: {self.tokens} tokens so far")

    def _answer(self, asked: PromptRequest, log: AnswerLog, stop: Path) -> None:
        ids = self._ids(asked)
        sides: tuple[AdapterSide, ...] = ("on", "off") if asked.adapter == "both" else (asked.adapter,)
        for side in sides:
            log.append(Begun(side=side, prompt_tokens=len(ids)))
            recorder = self._recorder if asked.routing else None
            room = asked.max_tokens if self._positions is None else self._positions.most - len(ids)
            writing = Writing(
                log, side, self._tokenizer, len(ids), recorder, lambda: self._session.stop.requested or stop.exists()
            )
            self._generate(asked, side, ids, writing, min(asked.max_tokens, room))
            self.tokens += writing.end(self._ends, "positions" if room < asked.max_tokens else "length")
            if self._session.stop.requested or stop.exists():
                return

    def _ids(self, asked: PromptRequest) -> list[int]:
        """The tokens of a prompt.

        Raises:
            DataError: it can't be rendered, has no token, or leaves no room for an answer.
        """
        if asked.prompt is not None:
            ids: list[int] = self._tokenizer(asked.prompt)["input_ids"]
        elif self._tokenizer.chat_template is None:
            raise DataError("messages: the model has no chat template; send `prompt`, or start the playground with "
                            "options.chat_template")  # fmt: skip
        else:
            ids = self._rendered(asked)
        longest = self._session.spec.options.max_length
        if not 0 < len(ids) <= longest:
            raise DataError(f"the prompt has {len(ids)} tokens; expected 1 to {longest} (options.max_length)")
        found = self._positions
        if found is not None and len(ids) >= found.most:
            limit = f"the model has {found.most:,} positions for prompt and answer ({found.source})"
            raise DataError(
                f"the prompt has {len(ids):,} tokens, but {limit}; expected at most {found.most - 1:,} tokens"
            )
        return ids

    def _rendered(self, asked: PromptRequest) -> list[int]:
        assert asked.messages is not None
        talk: Conversation = {"messages": [{"role": each.role, "content": each.content} for each in asked.messages]}
        try:
            [tokens] = self._renderer.tokens([self._renderer.prompt(talk)])
        except Unrenderable as problem:
            raise DataError(f"messages: {problem}") from None
        return tokens.ids

    def _generate(
        self, asked: PromptRequest, side: AdapterSide, ids: Sequence[int], writing: Writing, most: int
    ) -> None:
        settings = GenerationConfig(
            do_sample=asked.temperature > 0,
            temperature=asked.temperature if asked.temperature > 0 else None,
            top_p=asked.top_p if asked.temperature > 0 else None,
            top_k=0 if asked.temperature > 0 else None,
            num_beams=1,
            max_new_tokens=most,
            eos_token_id=self._ends or None,
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
        )
        model = self._loaded.model
        ids_BT = torch.tensor([list(ids)], device=model.device)
        recording = self._recorder.recording(None) if writing.recorder is not None and self._recorder else nullcontext()
        with evaluating(model), self._side(side), torch.no_grad(), recording, self._precision():
            torch.manual_seed(asked.seed)  # `evaluating` puts the random state back
            model.generate(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings,
                stopping_criteria=StoppingCriteriaList([writing.token]),
            )  # fmt: skip

    def _side(self, side: AdapterSide) -> AbstractContextManager[None]:
        return self._loaded.without_adapter() if side == "off" else nullcontext()

    def _precision(self) -> AbstractContextManager[object]:
        # As in a job and in its evaluation.
        dtype = self._session.spec.training.dtype
        return nullcontext() if dtype == "fp32" else torch.autocast(self._loaded.model.device.type, DTYPES[dtype])


def _ends(spec: PlaygroundSpec, loaded: Adapted, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the model's, the tokenizer's, and those that the adapter learnt."""
    found = {*ends_of(loaded.model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    beside = None if spec.adapter_folder is None else Path(spec.adapter_folder) / FILE
    if beside is not None and beside.is_file():
        found |= {*check_ids(beside, read_object(beside), "eos_token_id")}
    return sorted(found)
