"""The real forkserver, whose children do the parallel work of training for a second instead of a whole job.

A child named `group-N` forks two processes, which do the same and sum their gradients.
"""

import json
import os
import socket
import sys
from pathlib import Path

from llama_stack_provider_moe.compute.runtime.peers import ALONE, Peers
from llama_stack_provider_moe.compute.runtime.threads import other_threads
from llama_stack_provider_moe.compute.worker.forkserver import serve
from llama_stack_provider_moe.compute.worker.preload import preload
from llama_stack_provider_moe.compute.worker.process_group import End, ProcessGroup, Report

SIDE = 384  # threads divide a product of this size
TEXTS = [f"text {number} of those that are tokenised together" for number in range(512)]


def train(peers: Peers) -> dict[str, object]:
    """Run a parallel region of every library that training uses; returns the threads that they have started."""
    import numpy
    import pyarrow
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=["?"], show_progress=False))
    lengths = [len(each.ids) for each in tokenizer.encode_batch(TEXTS)]
    rows = Dataset.from_dict({"length": lengths}).map(lambda row: {"twice": 2 * row["length"]})
    assert sum(rows["twice"]) == 2 * sum(lengths)
    table = pyarrow.table({f"column-{number}": list(range(2000)) for number in range(8)})
    assert table.to_pandas(use_threads=True).shape == (2000, 8)
    square = numpy.ones((SIDE, SIDE), dtype=numpy.float32)
    assert (square @ square)[0, 0] == SIDE

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # MKL would not use more threads than there are cores
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(SIDE, SIDE), torch.nn.GELU(), torch.nn.Linear(SIDE, SIDE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(torch.randn(SIDE, SIDE)).square().mean()
        loss.backward()
        if peers.size > 1:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.copy_(peers.sum(parameter.grad) / peers.size)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return {"threads": len(other_threads()), "parallel": torch.get_num_threads()}


def of_a_group(peers: Peers, report: Report) -> int:
    """One of the two processes."""
    train(peers)
    report(End(peers.rank, "completed"))
    return 0


def work(arguments: list[str]) -> int:
    """The work of a child, instead of a job."""
    folder = Path(arguments[0])
    if folder.name.startswith("group"):
        with (folder / "group.log").open("wb", buffering=0) as output:
            end = ProcessGroup(2, of_a_group, output).run().end
        return 0 if end is not None and end.kind == "completed" else 1
    (folder / "found.json").write_text(json.dumps(train(ALONE)))
    return 0


if __name__ == "__main__":
    preload()
    with socket.socket(fileno=int(sys.argv[1])) as door:
        serve(door, work)
    os._exit(0)
