"""FSDP2 with and without weights in the CPU's memory, in two processes.

    python -m tests.support.tiny_offload MODEL OUT

transformers asks for memory that a GPU can read, which needs a GPU; here it is ordinary memory.
Everything else is as in a job: loading, a few steps of AdamW, state gathered and restored.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.worker.process_group import End, ProcessGroup, Report


def trained(peers: Peers, report: Report) -> int:
    """The same steps with and without offloading."""
    import torch
    from torch.distributed import fsdp
    from transformers.distributed import fsdp as of_transformers

    from llama_stack_provider_moe.compute.distributed.full_state import model_state, optimizer_state, restore_optimizer

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
        if offloaded:  # as a resumed job does
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

    from llama_stack_provider_moe.compute.models.loader import load_sharded
    from llama_stack_provider_moe.spec import JOB_SPEC

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
        verdict = ProcessGroup(2, partial(trained), output).run()
    sys.exit(0 if verdict.end is not None and verdict.end.kind == "completed" else f"{verdict}")
