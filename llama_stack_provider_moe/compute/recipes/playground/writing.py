"""One answer while it is generated: `generate` calls `token` after each token, which writes what is new."""

import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.prompts import Answered, AnswerLog, EndReason, Routed, Text
from llama_stack_provider_moe.spec.playground import ROUTED_TOKENS, AdapterSide

CHECK_S = 0.1  # between two looks at whether somebody stopped the answer
_INCOMPLETE = "\ufffd"  # stands for the first bytes of a character whose other bytes are in the next token


class Writing:
    """One side's answer to one prompt.

    Args:
        log: receives the pieces.
        side: whether the adapter is on.
        tokenizer: turns ids into text.
        prompt_tokens: number of the prompt's tokens.
        recorder: records the routers' choices; None: nobody asked for them.
        is_stopped: whether the answer is to end now.

    Attributes:
        recorder: as above.
    """

    def __init__(
        self,
        log: AnswerLog,
        side: AdapterSide,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        recorder: RoutingRecorder | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self.recorder = recorder
        self._log = log
        self._side: AdapterSide = side
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._is_stopped = is_stopped
        self._ids: list[int] = []
        self._text = ""
        self._began_s = self._checked_s = time.monotonic()
        self._stopped = False

    def token(self, ids_BT: Tensor, *_: object, **__: object) -> Tensor:
        """A stopping criterion of `generate`: write the newest token; true once somebody has stopped the answer."""
        liveness.alive()
        self._ids = ids_BT[0, self._prompt_tokens :].tolist()
        self._write_text(is_last=False)
        if self.recorder is not None:
            self._write_experts(self.recorder)
        if time.monotonic() - self._checked_s >= CHECK_S:
            self._checked_s = time.monotonic()
            self._stopped = self._is_stopped()
        return torch.full((1,), self._stopped, dtype=torch.bool, device=ids_BT.device)

    def end(self, ends: Collection[int], limit: EndReason) -> int:
        """Write that the answer has ended, and return the number of its tokens.

        Args:
            ends: ids that end an answer.
            limit: the reason if nothing else has ended it.
        """
        reason = limit
        if self._ids and self._ids[-1] in ends:
            reason = "stop"
        elif self._stopped:
            reason = "stopped"
        self._write_text(is_last=True)
        seconds = round(time.monotonic() - self._began_s, 3)
        count = len(self._ids)
        self._log.append(Answered(side=self._side, text=self._decoded(), tokens=count, reason=reason, seconds=seconds))
        return count

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text

    def _write_text(self, is_last: bool) -> None:
        text = self._decoded()
        # Some tokenizers change earlier text when a token follows; the end of the answer has all of it.
        if (is_last or not text.endswith(_INCOMPLETE)) and text.startswith(self._text) and len(text) > len(self._text):
            self._log.append(Text(side=self._side, text=text[len(self._text) :]))
            self._text = text

    def _write_experts(self, recorder: RoutingRecorder) -> None:
        if len(self._ids) <= ROUTED_TOKENS:
            choices = [recorder.last_choice(layer) for layer in recorder.layout.moe_layers]
            experts, weights = ([each.tolist() for each in column] for column in zip(*choices, strict=True))
            self._log.append(
                Routed(
                    side=self._side,
                    id=self._ids[-1],
                    token=self._tokenizer.decode(self._ids[-1:]),
                    experts=experts,
                    weights=[[round(weight, 3) for weight in layer] for layer in weights],
                )
            )
        recorder.forget_passes()
