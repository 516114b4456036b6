"""Make a model's training passes comparable with its reference's: no module may use random numbers.

DPO and circuit breakers compare two passes over the same rows. In training mode some models use random numbers besides
dropout: Phi-MoE samples its experts (arXiv 2409.12136), others multiply router inputs by noise. This module finds such
modules by the random state, in any family, and runs them in evaluation mode from then on: the same formula without the
noise. Two passes then show whether that was all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from llama_stack_provider_moe.compute.distributed.full_state import reshard
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.models.loader import pick_device
from llama_stack_provider_moe.compute.moe.layout import text_config, without_adapters
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.errors import ModelError

Passes = Callable[[int], Tensor]
TOKENS = 64
# Of the logits, as a share of their norm. On a CPU two equal passes are bitwise equal. On a GPU sums may run in another
# order; two passes with the same seed show by how much, and the check allows that.
TOLERANCE = 1e-4


def without_dropout(model: nn.Module) -> None:
    """Turn dropout off: with TRL's function, and where modules keep the rate as a number (`attention_dropout`)."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and value > 0 and "dropout" in name:
                setattr(module, name, 0.0)


def require_determinism(session: AnySession, model: PreTrainedModel | PeftModel) -> list[str]:
    """Stop modules from using random numbers in training mode, and check that two passes of the reference are equal.

    Call this when the adapter is in place, in all of a job's processes. The random state does not change. A backend
    without this check (`Backend.has_determinism_check`) checks its models itself.

    Returns:
        The names of the modules that used random numbers and now run in evaluation mode.

    Raises:
        ModelError: two passes still differ.
    """
    if not backend_of(session.spec).has_determinism_check:
        return []
    base = without_adapters(model)
    held: list[str] = []
    # Not the model's device: weights that FSDP2 offloads are in the CPU's memory, but the GPU computes with them.
    device = pick_device(session.spec.training.dtype, session.peers.local_rank)
    with _trial_passes(model, device) as passes:
        while found := [name for name in _random_modules(base, passes, device) if name not in held]:
            for name in found:
                _keep_in_eval_mode(base.get_submodule(name))
            held += found
        gap, rounding = _gap(passes(1), passes(2)), _gap(passes(1), passes(1))
    gap = session.peers.maximum(gap)
    if not gap <= max(TOLERANCE, 4 * session.peers.maximum(rounding)):
        raise ModelError(
            f"model: two passes of {type(base).__name__} in training mode over the same tokens differ by {gap:.2g} of "
            "the norm of their logits, without any dropout: the model uses random numbers. "
            f"recipe '{session.spec.recipe}' compares a model with its reference, which must not differ by chance"
        )
    if held:
        kinds = sorted({type(base.get_submodule(name)).__name__ for name in held})
        session.say(
            f"{len(held)} modules ({', '.join(kinds)}) use random numbers in training mode; this job runs them in "
            "evaluation mode, because policy and reference must not differ by chance"
        )
    return held


@contextmanager
def _trial_passes(model: PreTrainedModel | PeftModel, device: torch.device) -> Iterator[Passes]:
    """A function from a seed to the model's logits in training mode without its adapter; restores modes at the end."""
    vocabulary, config = int(model.get_input_embeddings().weight.shape[0]), text_config(model)
    ids = torch.tensor([[(7919 * (index + 1)) % vocabulary for index in range(TOKENS)]], device=model.device)
    modes = {module: module.training for module in model.modules()}
    logits = getattr(config, "output_router_logits", None)
    devices = [device] if device.type == "cuda" else []
    off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()

    def passes(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = model(input_ids=ids, use_cache=False).logits.float()
        return found

    with torch.random.fork_rng(devices=devices), torch.no_grad(), off:
        if logits:
            config.output_router_logits = False
        try:
            model.train()
            yield passes
        finally:
            if logits:
                config.output_router_logits = logits
            for module, training in modes.items():
                if "train" not in vars(module):  # else it stays in evaluation mode
                    module.training = training
            reshard(model)


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


def _random_modules(model: nn.Module, passes: Passes, device: torch.device) -> list[str]:
    """The names of the innermost modules that change the random state in a training pass."""
    found: list[str] = []
    open_calls: list[tuple[Tensor, int]] = []  # at a call's start: the random state, and how many were found by then

    def before(module: nn.Module, *_: object) -> None:
        open_calls.append((_random_state(device), len(found)))

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: object) -> None:
            state, known = open_calls.pop()
            if len(found) == known and not torch.equal(state, _random_state(device)):
                found.append(name)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(name))]
    try:
        passes(1)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(found))


def _random_state(device: torch.device) -> Tensor:
    on_cpu = torch.get_rng_state()
    return on_cpu if device.type != "cuda" else torch.cat([on_cpu, torch.cuda.get_rng_state(device)])


def _keep_in_eval_mode(module: nn.Module) -> None:
    """Keep a module, but not the modules inside it, in evaluation mode whatever mode its model gets."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        for child in self.children():
            child.train(mode)
        return self

    module.training = False
    module.train = MethodType(train, module)  # type: ignore[method-assign]
