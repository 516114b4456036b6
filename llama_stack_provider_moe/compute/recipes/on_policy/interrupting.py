"""Generating that shows signs of life, and that ends soon after a request to stop."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from peft import PeftModel
from torch import nn

from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.saver import Interrupted
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import WritingSpec


def end_if_asked(session: Session[WritingSpec]) -> None:
    """End a wait inside `interruptible`.

    Raises:
        Interrupted: the job was asked to stop.
    """
    if session.stop.requested:
        raise Interrupted


@contextmanager
def interruptible(model: nn.Module, session: Session[WritingSpec], device: torch.device) -> Iterator[None]:
    """Around a generation: report each token, and end with the first token after a request to stop.

    Processes write answers of unequal lengths, and meet after them: all go on, or none.

    Args:
        model: writes the answers.
        session: its request to stop counts in all processes.
        device: of the model.

    Raises:
        Interrupted: a process was asked to stop. The random state is that of before.
    """
    devices = [device] if device.type == "cuda" else []
    # Generation runs the model below an adapter, whose own forward is not called.
    spoken = model.get_base_model() if isinstance(model, PeftModel) else model
    state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(each) for each in devices]
    with liveness.stage(
        "generating", session.spec.generating.max_completion_length, "tokens of each answer"
    ) as counter:

        def at_token(*_: object) -> None:
            counter.advance()
            end_if_asked(session)

        hook = spoken.register_forward_pre_hook(at_token)
        try:
            with suppress(Interrupted):
                yield
        finally:
            hook.remove()
    if session.peers.any(session.stop.requested):
        torch.set_rng_state(state)
        for each, kept in zip(devices, states, strict=True):
            torch.cuda.set_rng_state(kept, each)
        raise Interrupted
