"""Scaling to 8 and 64 H100 on paper: bytes moved per micro-batch, and the time for them beside that for computing.

Every number is calculated, none is measured: no machine with several GPUs was available. `NOTES.md` has the output of

    python -m benchmarks.scaling_on_paper [--write]

Bytes are those that one GPU receives (it sends as many), with n GPUs of which 8 are in a node (rings):

    ddp   all-reduce of the gradients G              2 (n - 1) / n x G, once a step
    fsdp  all-gather of the base W, forward and
          backward of each micro-batch               2 (n - 1) / n x W
          LoRA: all-reduce of its gradients          as ddp
          all weights: reduce-scatter in fp32        (n - 1) / n x 2 W (W in bf16)
    ep    tokens to other processes that hold one of
          their experts, once each, and back; for each
          layer with experts, in forward, its repetition
          (checkpointing) and backward               3 x 2 x tokens x others x hidden x 2
          with random routing, E experts             others = (n - 1) (1 - C(E - E/n, k) / C(E, k))

From other nodes, gathers and reductions fetch one copy per node, over all 8 of its InfiniBand ports together, and pass
it on by NVLink; each token goes to one GPU, by that GPU's port. Computing is 2 operations per token and active weight
in forward, 2 for what checkpointing repeats, 2 for gradients of inputs, and 2 for gradients of weights that train; the
attention's products of tokens are left out.
"""

import argparse
import json
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTES = ROOT / "benchmarks" / "NOTES.md"
BEGIN, END = "<!-- begin of scaling -->", "<!-- end of scaling -->"
NODE = 8
# H100 SXM, each way. NVIDIA's H100 data sheet: NVLink 900 GB/s for both directions together; dense bf16 989.4 TFLOP/s.
# DGX H100 user guide: a ConnectX-7 port of 400 Gb/s for each GPU.
NVLINK, PORT, FLOPS = 450e9, 50e9, 989.4e12
# Assumed: of a link's rate what collectives reach, and of the operations what training does beside no communication.
REACHED, MFU = 0.8, 0.4
BF16, FP32 = 2, 4
TOKENS = 4 * 4096  # of one GPU's micro-batch
RANK = 16


@dataclass(frozen=True)
class Model:
    """Parameters of a published config (`tests/configs`), and of LoRA on experts and attention."""

    name: str
    hidden: int
    moe_layers: int
    experts: int
    top_k: int
    total: int
    active: int
    lora: int

    def others(self, gpus: int) -> float:
        """Of n processes, those but its own that a token is sent to, on average."""
        missed = comb(self.experts - self.experts // gpus, self.top_k) / comb(self.experts, self.top_k)
        return (gpus - 1) * (1 - missed)


@dataclass(frozen=True)
class Case:
    """A model, what of it trains, and how it is divided."""

    model: Model
    trains: str
    strategy: str

    @property
    def flops(self) -> float:
        """Of a micro-batch of one GPU."""
        passes = 4 if self.trains == "all weights" else 3
        return passes * 2.0 * self.model.active * TOKENS

    def received(self, gpus: int) -> dict[str, float]:
        """Bytes that one GPU receives in a micro-batch, by what they are."""
        part, weights, grads = (gpus - 1) / gpus, BF16 * self.model.total, FP32 * self.model.lora
        if self.strategy == "ddp":
            return {"reduced": 2 * part * grads}
        if self.strategy == "ep":
            rows = TOKENS * self.model.others(gpus) * self.model.moe_layers
            return {"tokens": 3 * 2 * rows * self.model.hidden * BF16}
        if self.trains == "all weights":
            return {"gathered": 2 * part * weights, "reduced": part * FP32 * self.model.total}
        return {"gathered": 2 * part * weights, "reduced": 2 * part * grads}

    def seconds(self, gpus: int) -> tuple[float, float]:
        """(computing, communicating) of a micro-batch."""
        moved = self.received(gpus)
        inside = sum(moved.values()) / NVLINK
        # Of n GPUs, n - 8 are elsewhere.
        elsewhere = (gpus - NODE) / (gpus - 1) * sum(moved.values())
        outside = elsewhere / (PORT if self.strategy == "ep" else NODE * PORT)
        return self.flops / (MFU * FLOPS), max(inside, outside) / REACHED


def model(stem: str, name: str) -> Model:
    """Of a config with one kind of layer that has experts, and perhaps dense ones first."""
    found: dict[str, Any] = json.loads((ROOT / "tests" / "configs" / f"{stem}.json").read_text(encoding="utf-8"))
    hidden, layers, vocabulary = found["hidden_size"], found["num_hidden_layers"], found["vocab_size"]
    head = found.get("head_dim", hidden // found["num_attention_heads"])
    queries, keys = found["num_attention_heads"] * head, found["num_key_value_heads"] * head
    experts = found.get("num_local_experts") or found.get("num_experts") or found["n_routed_experts"]
    top_k, dense = found["num_experts_per_tok"], found.get("first_k_dense_replace", 0)
    inner = found.get("moe_intermediate_size", found["intermediate_size"])
    moe = layers - dense
    attention = layers * (2 * hidden * queries + 2 * hidden * keys)
    one = 3 * hidden * inner
    beside = moe * (hidden * experts + found.get("n_shared_experts", 0) * one)
    beside += dense * 3 * hidden * found["intermediate_size"]
    ends = vocabulary * hidden * (1 if found["tie_word_embeddings"] else 2)
    lora = layers * RANK * (2 * (hidden + queries) + 2 * (hidden + keys))
    lora += moe * experts * RANK * (2 * hidden + 3 * inner)
    return Model(
        name, hidden, moe, experts, top_k,
        total=attention + moe * experts * one + beside + ends,
        active=attention + moe * top_k * one + beside + vocabulary * hidden,
        lora=lora,
    )  # fmt: skip


def cases() -> list[Case]:
    """The rows of the table."""
    qwen, glm = model("qwen3-30b-a3b", "Qwen3-30B-A3B"), model("glm-4.5-air", "GLM-4.5-Air")
    granite = model("granite-3.0-1b-a400m", "Granite-3.0-1b-a400m")
    return [
        Case(granite, "LoRA", "ddp"), Case(qwen, "LoRA", "fsdp"), Case(qwen, "LoRA", "ep"),
        Case(qwen, "all weights", "fsdp"), Case(glm, "LoRA", "fsdp"),
    ]  # fmt: skip


def table() -> str:
    """The table in `NOTES.md`."""
    lines = [
        f"All calculated by `benchmarks/scaling_on_paper.py`; micro-batches of {TOKENS:,} tokens per GPU, "
        f"checkpointing, bf16, LoRA r={RANK} on experts and",
        f"attention; NVLink {NVLINK / 1e9:.0f} GB/s and InfiniBand {PORT / 1e9:.0f} GB/s each way per GPU, of which "
        f"{REACHED:.0%} are reached; {MFU:.0%} of {FLOPS / 1e12:.0f} TFLOP/s. Both shares are",
        "assumed. *Kept* is computing / time: the share of one GPU's rate that each of n keeps; without overlap both",
        "times add up, with full overlap the longer one counts. FSDP2 fetches the next layer while one runs, and the",
        "gradients of one are sent while the next ones are made: near full overlap. Experts wait for their tokens:",
        "near none.",
        "",
        "| Job | GPUs | received per GPU, GB | computing, s | moving, s | kept, no overlap | kept, full overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        for gpus in (8, 64):
            moved = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in case.received(gpus).items())
            computing, moving = case.seconds(gpus)
            lines.append(
                f"| {case.model.name}, {case.trains}, {case.strategy} | {gpus} | {moved} | {computing:.3f} "
                f"| {moving:.3f} | {computing / (computing + moving):.0%} | {min(1.0, computing / moving):.0%} |"
            )
    return "\n".join(lines)


def embedded(text: str) -> str:
    """The notes with the current table."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Print the table, or write it into the notes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into NOTES.md")
    if parser.parse_args().write:
        NOTES.write_text(embedded(NOTES.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
