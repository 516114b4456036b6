"""Memory of a circuit-breaker step, ours against `output_hidden_states=True`; and both losses on one batch.

A narrow dense model of 48 blocks with rank-4 LoRA, where 3 of its blocks are targets. Memory is that of all tensors
that exist, counted at each operation as it makes and frees them (without the allocator's rounding and parameters).

    $ python -m benchmarks.breaker_memory [--out FILE]
"""

import argparse
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_stack_provider_moe.compute.methods.breaker import reroute_loss, retain_loss
from llama_stack_provider_moe.compute.methods.schedules import paper
from llama_stack_provider_moe.compute.models.hidden_states import Blocks
from tests.support import official_breaker, tiny_models

BLOCKS, WIDTH, ROWS, LENGTH = 48, 64, 4, 256
TARGETS = (11, 23, 35)  # hidden_states 12, 24 and 36
STEPS = 150


class Alive(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and their peak; by storage, so that views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.bytes -= self._seen.pop(key)


def model_of(checkpointing: bool) -> PeftModel:
    """The narrow model, with LoRA up to the last target; its start is the same each time."""
    torch.manual_seed(0)
    base = tiny_models.model("llama", num_hidden_layers=BLOCKS, hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    if checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=list(range(TARGETS[-1] + 1)))
    return get_peft_model(base, lora).train()


def batch() -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, length); the first half of the rows is broken, and a fifth of each row is filled."""
    ids = torch.randint(3, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    mask[:, : LENGTH // 5] = 1
    return ids, mask


def held_by_all(model: PeftModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """All hidden states, as the official code takes them."""
    states: tuple[Tensor, ...] = model(
        ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return states


def step(model: PeftModel, states: Callable[[], Any], pick: Callable[[Any], list[Tensor]], mask: Tensor) -> None:
    """Reference pass, own pass, both losses, backward."""
    half = ROWS // 2
    with torch.no_grad(), model.disable_adapter():
        base = states()
    mine = states()
    here, there = pick(mine), pick(base)
    broken = reroute_loss([h[:half] for h in here], [h[:half] for h in there], mask[:half])
    kept = retain_loss([h[half:] for h in here], [h[half:] for h in there], mask[half:])
    (broken + kept).backward()


def measure(checkpointing: bool) -> dict[str, float]:
    """Bytes of hidden states that the reference's pass leaves, and the peak of a whole step."""
    ids, mask = batch()
    found: dict[str, float] = {}
    for name in ("all_hidden_states", "target_blocks"):
        model = model_of(checkpointing)
        blocks = Blocks(model)

        def states(name: str = name, model: PeftModel = model, blocks: Blocks = blocks) -> Any:
            return held_by_all(model, ids, mask) if name == "all_hidden_states" else blocks.states(TARGETS, ids, mask)

        def pick(given: Any, name: str = name) -> list[Tensor]:
            return [given[block + 1] if name == "all_hidden_states" else given[block] for block in TARGETS]

        with torch.no_grad(), model.disable_adapter():
            given = states()
        tensors = given if isinstance(given, tuple) else tuple(given.values())
        found[f"{name}_held_bytes"] = sum(
            {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values()
        )
        del given, tensors
        with Alive() as alive:
            step(model, states, pick, mask)
        found[f"{name}_peak_bytes"] = alive.peak
    for what in ("held", "peak"):
        found[f"{what}_less"] = 1 - found[f"target_blocks_{what}_bytes"] / found[f"all_hidden_states_{what}_bytes"]
    return found


def differences() -> dict[str, float]:
    """The official loss and ours on one batch: padding, layer numbers, schedule."""
    ids, mask = batch()
    model = model_of(checkpointing=False).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        blocks = Blocks(model)
        mine, hidden = blocks.states(range(BLOCKS), ids, mask), held_by_all(model, ids, mask)
        with model.disable_adapter():
            base, was = blocks.states(range(BLOCKS), ids, mask), held_by_all(model, ids, mask)
    numbers = [block + 1 for block in TARGETS]
    ours = paper(STEPS, STEPS, 10.0)
    return {
        "fill": mask.float().mean().item(),
        "retain_ours": retain_loss(hidden, was, mask).item(),
        "retain_official": official_breaker.retain_loss(hidden, was, mask).item(),
        "reroute_ours": reroute_loss([mine[b] for b in TARGETS], [base[b] for b in TARGETS], mask).item(),
        "reroute_official": official_breaker.reroute_loss(
            [hidden[i] for i in numbers], [was[i] for i in numbers], mask
        ).item(),
        "reroute_ours_at_their_numbers": reroute_loss(
            [mine[i] for i in numbers], [base[i] for i in numbers], mask
        ).item(),
        "coefficient_ours_at_the_end": ours.reroute,
        "coefficient_official_at_accumulation_1": official_breaker.coefficients(STEPS, 10.0)[0],
        "coefficient_official_at_accumulation_4": official_breaker.coefficients(4 * STEPS, 10.0)[0],
    }


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file")
    out = parser.parse_args().out
    results: dict[str, Any] = {
        "blocks": BLOCKS, "width": WIDTH, "rows": ROWS, "length": LENGTH, "targets": TARGETS,
        "plain": measure(checkpointing=False), "checkpointed": measure(checkpointing=True),
        "official_and_ours": differences(),
    }  # fmt: skip
    text = json.dumps(results, indent=2)
    print(text)
    for name, figures in {"plain": results["plain"], "checkpointed": results["checkpointed"]}.items():
        held, peak = figures["held_less"], figures["peak_less"]
        print(f"{name}: hidden states held {held:.1%} less, peak of a step {peak:.1%} less")
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
