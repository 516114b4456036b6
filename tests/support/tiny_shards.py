"""A tiny model sharded over two processes, and its twin in one: `shares_out` is work for `tiny_group`."""

import sys
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.compute.worker.process_group import End, Report


def shares_out(peers: Peers, report: Report) -> int:
    """Gather state and restore it in parts, with another number of processes and in other groups."""
    import torch
    from torch.distributed.tensor import DTensor

    from llama_stack_provider_moe.compute.distributed.full_state import model_state, optimizer_state, restore_optimizer

    file = Path(sys.argv[1]) / "whole.pt"
    alone, optimizer_alone = _twin(shared=False)
    shared, optimizer = _twin(shared=True)
    assert sum(isinstance(parameter, DTensor) for parameter in shared.parameters()) == 5, "and one is in no part"
    for _ in range(2):
        _step(alone, optimizer_alone)
        _step(shared, optimizer)
    weights, state = model_state(shared), optimizer_state(shared, optimizer)
    if peers.leads:
        expected = alone.state_dict()
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr(), "tied as in the model"
        torch.save(state, file)
    else:
        assert not weights
    peers.wait()
    # In one process: bitwise the same as what was written, although the groups differ.
    again, optimizer_again = _twin(shared=False)
    saved = torch.load(file, mmap=True, weights_only=True)
    restore_optimizer(again, optimizer_again, saved)
    found = optimizer_state(again, optimizer_again)
    if peers.leads:
        assert _by_name(found).keys() == _by_name(saved).keys()
        for name, (entry, rate) in _by_name(saved).items():
            mine, my_rate = _by_name(found)[name]
            assert my_rate == rate
            assert all(torch.equal(mine[key], value) for key, value in entry.items())
    # And back: a file from one process, without names, as in earlier versions.
    plain = optimizer_alone.state_dict()
    same_groups = torch.optim.AdamW([{"params": list(shared.parameters())}])
    for group in plain["param_groups"]:
        group["params"] = list(range(6))
    restore_optimizer(shared, same_groups, {**plain, "param_groups": plain["param_groups"][:1]})
    back = optimizer_state(shared, same_groups)
    if peers.leads:
        for number, entry in plain["state"].items():
            assert all(torch.equal(back["state"][number][key], value) for key, value in entry.items())
    _refuses(shared, same_groups, saved)
    report(End(peers.rank, "completed"))
    return 0


def _twin(shared: bool) -> tuple[Any, Any]:
    """The tied model and its optimiser, sharded (FSDP2, except one weight) or not."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.inner = nn.Linear(5, 5)
            self.norm = nn.LayerNorm(5)
            self.gain = nn.Parameter(torch.ones(5))
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Any) -> Any:
            return self.head(self.norm(self.inner(self.embed(ids))) * self.gain)

    torch.manual_seed(0)
    model = Tiny()
    if shared:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.gain})
    named = dict(model.named_parameters())
    assert len(named) == 6
    # Groups differ from those in one process, as with transformers if some weights are not sharded.
    members = [[named[name]] for name in sorted(named)] if shared else [list(named.values())]
    return model, torch.optim.AdamW([{"params": each} for each in members], lr=1e-2)


def _step(model: Any, optimizer: Any) -> None:
    """One step, the same in both processes, whose gradients are averaged."""
    import torch

    optimizer.zero_grad()
    model(torch.tensor([0, 3, 6])).square().sum().backward()
    optimizer.step()


def _by_name(saved: Any) -> dict[str, Any]:
    return {
        name: (saved["state"][number], group["lr"])
        for group in saved["param_groups"]
        for name, number in zip(group["names"], group["params"], strict=True)
    }


def _refuses(model: Any, optimizer: Any, saved: Any) -> None:
    """Check that state of other weights or of other shapes is refused."""
    import pytest

    from llama_stack_provider_moe.compute.distributed.full_state import restore_optimizer
    from llama_stack_provider_moe.errors import CheckpointError

    group, *others = saved["param_groups"]
    renamed = {**saved, "param_groups": [{**group, "names": ["another"]}, *others]}
    (number,) = group["params"]
    entry = saved["state"][number]
    reshaped = {**saved["state"], number: {**entry, "exp_avg": entry["exp_avg"][1:]}}
    for wrong, told in ((renamed, "another"), ({**saved, "state": reshaped}, group["names"][0])):
        with pytest.raises(CheckpointError, match=told):
            restore_optimizer(model, optimizer, wrong)
