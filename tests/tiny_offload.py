"""FSDP2 with weights in the CPU's memory, and without: `python -m tests.tiny_offload MODEL OUT`, in two processes.

What transformers asks for is memory that a GPU can read, which can't be had without one; here it is memory like any
other. All else is what a job does: loading, a few steps of AdamW, state made whole and taken up again.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.training.launch import End, Group, Report
from llama_stack_provider_moe.training.peers import Peers


def trained(peers: Peers, report: Report) -> int:
    """The same steps both ways."""
    import torch
    from torch.distributed import fsdp
    from transformers.distributed import fsdp as of_transformers

    from llama_stack_provider_moe.training.distributed_state import model_state, optimizer_state, restore_optimizer

    made: list[Any] = []

    def unpinned() -> Any:
        made.append(fsdp.CPUOffloadPolicy(pin_memory=False))
        return made[-1]

    of_transformers.CPUOffloadPolicy = unpinned
    found = []
    for offloaded in (False, True):
        made.clear()
        model = _loaded(offloaded)
        assert bool(made) is offloaded
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        _step(model, optimizer)
        if offloaded:  # as a job that goes on does
            written = peers.agreed(optimizer_state(model, optimizer))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            restore_optimizer(model, optimizer, written)
        for _ in range(2):
            _step(model, optimizer)
        found.append((model_state(model), optimizer_state(model, optimizer)))
    if peers.leads:
        (weights, state), (other_weights, other_state) = found
        moved = max(state["state"][0]["exp_avg"].abs().max().item(), 0.0)
        equal = all(torch.equal(other_weights[name], tensor) for name, tensor in weights.items())
        equal &= all(torch.equal(other_state["state"][number][key], value) for number, entry in state["state"].items()
                     for key, value in entry.items())  # fmt: skip
        Path(sys.argv[2]).write_text(json.dumps({"equal": equal, "tensors": len(weights), "moved": moved}))
    report(End(peers.rank, "completed"))
    return 0


def _loaded(offloaded: bool) -> Any:
    from transformers import AutoConfig

    from llama_stack_provider_moe.spec import JOB_SPEC
    from llama_stack_provider_moe.training.loader import load_sharded

    spec: Any = JOB_SPEC.validate_python({
        "recipe": "sft", "model": sys.argv[1], "data": {"dataset_id": "d"}, "adapter": None,
        "training": {"dtype": "bf16"}, "resources": {"gpus": 2, "strategy": "fsdp", "cpu_offload": offloaded},
    })  # fmt: skip
    return load_sharded(spec, AutoConfig.from_pretrained(sys.argv[1]), in_fp32=True)


def _step(model: Any, optimizer: Any) -> None:
    import torch

    optimizer.zero_grad()
    model(torch.arange(3, 23).unsqueeze(0)).logits.float().square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


if __name__ == "__main__":
    import transformers  # noqa: F401  once, for both

    with open(1, "wb", buffering=0, closefd=False) as output:
        verdict = Group(2, partial(trained), output).run()
    sys.exit(0 if verdict.end is not None and verdict.end.kind == "completed" else f"{verdict}")
