"""The optimisers that a job can name: torch's, and bitsandbytes' AdamW with its moments in 8 bits or in paged memory.

`BoundedAdamW` adds to bitsandbytes 0.50 what LoRA on experts and weights in bf16 need:

- A block of 256 numbers shares a scale, and in LoRA's B a block holds all experts of a layer. Beside busy experts the
  second moment of a quiet one is nearest to code 0 when the first is not yet, and its next step would be m / eps:
  thousands of learning rates. No step of Adam with exact moments is longer than
  lr (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) (Cauchy-Schwarz on its two sums), so longer ones are cut to that.
- On a CPU its codec has no code for 0 in a block of larger numbers, so weights without a gradient would drift. One
  that is 0 and has no gradient stays 0, as the unused ranks of experts must.
- A bf16 weight has 8 bits, and most steps are smaller than its last one. It is stepped as an fp32 copy and rounded up
  or down at random, so that the mean is right (stochastic rounding, Gupta et al. 2015, arXiv 1502.02551). The noise
  depends on the job's seed, the step and the weight alone: a resumed job and every process draw the same.
- It loads paged state as plain tensors on the GPU; here these are paged again.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.optim import AdamW
from torch import Tensor, nn

from llama_stack_provider_moe.compute.planning.optimizer_memory import in_8_bits, is_paged, state_bytes
from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.spec import Optimizer
from llama_stack_provider_moe.spec.blocks import IN_8_BITS, OF_BITSANDBYTES, PAGED
from llama_stack_provider_moe.spec.optimizer_limits import instead_of_paged

_OF_TORCH: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
_MOMENTS = ("state1", "state2")  # bitsandbytes' names


def class_of(optimizer: Optimizer) -> type[torch.optim.Optimizer]:
    """The class that a job names."""
    return BoundedAdamW if optimizer.optimizer_type in OF_BITSANDBYTES else _OF_TORCH[optimizer.optimizer_type]


def arguments_of(optimizer: Optimizer, model: nn.Module, seed: int, fused: bool) -> dict[str, object]:
    """The arguments of `class_of` besides the weights.

    Args:
        optimizer: the job's.
        model: that trains.
        seed: the job's.
        fused: whether torch's optimisers step in one kernel.
    """
    if optimizer.optimizer_type not in OF_BITSANDBYTES:
        return {"lr": optimizer.lr, "fused": fused}
    return {"lr": optimizer.lr, "settings": optimizer, "seed": seed, "looked_up": looked_up(model)}


def require_device(optimizer: Optimizer, device: str) -> None:
    """Refuse paged memory where there is no CUDA device: bitsandbytes would warn, and not page.

    Raises:
        TrainingError: the optimiser is paged, and the device is not a CUDA device.
    """
    kind = optimizer.optimizer_type
    if kind in PAGED and device != "cuda":
        raise TrainingError(f"optimizer.optimizer_type: {kind!r} is not valid on a CPU, and this machine has no CUDA "
                            f"device; expected {instead_of_paged(kind)!r}")  # fmt: skip


def looked_up(model: nn.Module) -> frozenset[int]:
    """The ids of the embeddings' weights, whose moments stay in 32 bits."""
    return frozenset(id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding))


class BoundedAdamW(AdamW):
    """bitsandbytes' AdamW with the additions of the module's docstring.

    Args:
        params: weights, or groups of them.
        lr: learning rate.
        settings: the job's optimiser.
        seed: the job's.
        looked_up: ids of the weights whose moments stay in 32 bits.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, settings: Optimizer, seed: int, looked_up: frozenset[int]
    ) -> None:
        bits = 8 if settings.optimizer_type in IN_8_BITS else 32
        super().__init__(
            params, lr=lr, weight_decay=0.0, optim_bits=bits, min_8bit_size=settings.min_8bit_size,
            is_paged=settings.optimizer_type in PAGED,
        )  # fmt: skip
        self._seed, self._looked_up = seed, looked_up

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """bitsandbytes' settings of one weight, with 32 bits for embeddings."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)
        wide = id(group["params"][pindex]) in self._looked_up
        return {**config, "optim_bits": 32} if wide else config

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Step one weight."""
        coded, narrow = self.state[p]["state1"].dtype == torch.uint8, p.dtype == torch.bfloat16
        if not coded and not narrow:
            super().update_step(group, p, gindex, pindex)
            return
        stored, gradient = p.data, p.grad
        assert gradient is not None
        before = stored if narrow else stored.clone()
        still = (before == 0) & (gradient == 0) if coded else None
        if narrow:  # a gradient must have the type of its weight
            p.grad = None
            p.data, p.grad = stored.float(), gradient.float()
        super().update_step(group, p, gindex, pindex)
        stepped = p.data
        p.grad = None
        if coded:
            self._bound(stepped, before, group)
        if still is not None:
            stepped.masked_fill_(still, 0)
        if narrow:
            p.data = stored.copy_(rounded(stepped, self._noise(p, gindex, pindex)))
        p.grad = gradient

    def _bound(self, stepped: Tensor, before: Tensor, group: dict[str, Any]) -> None:
        """Cut steps that no exact moments would give, in place."""
        most = group["lr"] * longest_step(*group["betas"])
        start = before * (1 - group["lr"] * group["weight_decay"])
        stepped.sub_(start).clamp_(-most, most).add_(start)

    def _noise(self, p: nn.Parameter, gindex: int, pindex: int) -> torch.Generator:
        key = ((self._seed * 1_000_003 + int(self.state[p]["step"])) * 1_000_003 + gindex) * 1_000_003 + pindex
        return torch.Generator(device=p.device).manual_seed(key % 2**63)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state; what was paged is paged again."""
        super().load_state_dict(state_dict, move_to_device=move_to_device and not self.is_paged)
        if self.is_paged:
            for p, state in self.state.items():
                for key, value in list(state.items()):
                    if isinstance(value, Tensor):
                        state[key] = self._again(p, value) if key in _MOMENTS else value.to(p.device)

    def _again(self, p: nn.Parameter, value: Tensor) -> Tensor:
        buffer: Tensor = self.get_state_buffer(p, dtype=value.dtype)
        return buffer.copy_(value)


def longest_step(beta1: float, beta2: float) -> float:
    """The longest step of Adam, in learning rates.

    >>> round(longest_step(0.9, 0.999), 2)
    7.27
    """
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


def rounded(wide: Tensor, noise: torch.Generator) -> Tensor:
    """fp32 as bf16, each number rounded up or down at random, in proportion to the distances.

    >>> third = torch.full((30_000,), 1 + 2**-7 / 3)
    >>> found = rounded(third, torch.Generator().manual_seed(0)).float()
    >>> sorted(set(found.tolist())), abs(found.mean().item() - third[0].item()) < 1e-4
    ([1.0, 1.0078125], True)
    """
    bits = torch.randint(0, 1 << 16, wide.shape, generator=noise, dtype=torch.int32, device=wide.device)
    bits.add_(wide.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(wide.isfinite(), bits.view(torch.float32), wide).to(torch.bfloat16)


@dataclass(frozen=True)
class StateReport:
    """What an optimiser keeps.

    Attributes:
        coded: weights with moments in 8 bits.
        whole: the others with moments.
        paged: weights whose moments CUDA may move to the machine's memory.
        bytes: of all.
    """

    coded: int
    whole: int
    paged: int
    bytes: int

    def text(self) -> str:
        """The report as one line of a job's log."""
        paged = f", {self.paged:,} of them paged" if self.paged else ""
        return f"{self.bytes / 1e6:,.2f} MB of moments: {self.coded:,} weights in 8 bits, {self.whole:,} wider{paged}"


def foreseen(optimizer: Optimizer, model: nn.Module) -> StateReport:
    """What the optimiser will keep from its first step on."""
    wide = looked_up(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    coded = [in_8_bits(optimizer, each.numel(), id(each) in wide) for each in trained]
    return StateReport(
        coded=sum(coded),
        whole=0 if optimizer.optimizer_type == "sgd" else len(coded) - sum(coded),
        paged=sum(is_paged(optimizer, each.numel()) for each in trained),
        bytes=sum(state_bytes(optimizer, each.numel(), each.nbytes, id(each) in wide) for each in trained),
    )


def found(optimizer: torch.optim.Optimizer) -> StateReport:
    """What an optimiser of bitsandbytes keeps, by its tensors; a table of codes is shared, and not counted."""
    states = [state for state in optimizer.state.values() if state]
    moments = [[state[key] for key in _MOMENTS] for state in states]
    scales = [state[key] for state in states for key in ("absmax1", "absmax2") if key in state]
    coded = sum(first.dtype == torch.uint8 for first, _ in moments)
    return StateReport(
        coded=coded,
        whole=len(states) - coded,
        paged=sum(getattr(first, "is_paged", False) for first, _ in moments),
        bytes=sum(each.nbytes for pair in moments for each in pair) + sum(each.nbytes for each in scales),
    )
