"""What a quarter fewer experts cost a small trained model: pruned or merged, by each way to choose them.

    $ OMP_NUM_THREADS=1 python -m benchmarks.pruning     # some two minutes on one core

A Qwen3-MoE of 2 layers, 16 experts and top-2 learns bytes of this project's own pages and code from nothing. Experts
are then chosen on some held-out texts, and the loss is measured on others, with and without the chosen ones (a masked
expert is a pruned one; `tests/compute/surgery/test_prune.py`). Chance is a list drawn at random; `worst` removes the
experts with the highest REAP score, which shows how far apart experts are at all. A merged model is measured in memory
(`compute.surgery.twin`).
"""

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.methods.surgery import highest
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.surgery.actions import choose, prepare
from llama_stack_provider_moe.compute.surgery.calibrate import calibrate, losses, losses_of
from llama_stack_provider_moe.compute.surgery.prepared import Rows
from llama_stack_provider_moe.compute.surgery.twin import twin_of
from llama_stack_provider_moe.spec.surgery import LIKENESSES, Surgery

ROOT = Path(__file__).parents[1]
EXPERTS, KEPT, LENGTH, BATCH = 16, 12, 64, 16
CHANCE_DRAWS = 3


def texts() -> Tensor:
    """Rows (N, LENGTH) of bytes, of pages and code in turn; byte b is token b + 1."""
    sources = []
    for pattern in ("docs/**/*.md", "llama_stack_provider_moe/**/*.py"):
        joined = b"".join(path.read_bytes() for path in sorted(ROOT.glob(pattern)))
        count = min(len(joined) // LENGTH, 6000)
        sources.append(torch.frombuffer(bytearray(joined[: count * LENGTH]), dtype=torch.uint8).view(count, LENGTH))
    count = min(map(len, sources))
    return torch.stack([each[:count] for each in sources], dim=1).reshape(-1, LENGTH).long() + 1


def trained(rows: Tensor, steps: int, seed: int) -> PreTrainedModel:
    """The model after some steps of AdamW, with transformers' balance loss."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=257, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True,
        output_router_logits=True, router_aux_loss_coef=0.001, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (BATCH,), generator=drawn)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def prompts(rows: Tensor) -> list[Prompt]:
    """The rows as an analysis takes them."""
    return [Prompt(row.tolist(), [True] * LENGTH) for row in rows]


def merged(model: PreTrainedModel, calibration: list[Prompt], measured: list[Prompt]) -> dict[str, float]:
    """Loss in nats a byte of the merged models, by the likeness of their experts."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for by in LIKENESSES:
            prepared = prepare(Path(folder), Surgery.model_validate({"action": "merge", "keep": KEPT, "by": by}))
            decision = choose(prepared, Rows(model, calibration, 32))
            twin = twin_of(model, prepared.resized, decision.experts)
            found[f"merge-{by}"] = losses_of(model, twin, measured, 32).after
    return found


def one_seed(rows: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Loss in nats a byte: of the whole model, and with a quarter fewer experts by each way to choose."""
    held_out = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    calibration, measured, learnt = prompts(held_out[:64]), prompts(held_out[64:192]), held_out[192:]
    model = trained(learnt, steps, seed)
    layout = find_layout(model)
    assert layout is not None
    found = calibrate(model, layout, calibration, 32)
    drawn = torch.Generator().manual_seed(seed)
    ways = {"reap": found.scores("reap"), "usage": found.scores("usage"), "worst": -found.scores("reap")}
    shape = found.count_LE.shape
    ways |= {f"chance-{draw}": torch.rand(shape, generator=drawn) for draw in range(CHANCE_DRAWS)}
    figures: dict[str, float] = {}
    for way, score_LE in ways.items():
        kept = highest(score_LE, KEPT)
        masked = {
            layer: sorted(set(range(EXPERTS)) - set(each)) for layer, each in zip(layout.moe_layers, kept, strict=True)
        }
        loss = losses(model, layout, measured, masked, 32)
        figures |= {"before": loss.before, way: loss.after}
    figures |= merged(model, calibration, measured)
    figures["chance"] = mean(figures.pop(f"chance-{draw}") for draw in range(CHANCE_DRAWS))
    return figures


def measure(steps: int, seeds: int) -> dict[str, Any]:
    """Figures of each seed, and their means."""
    rows = texts()
    by_seed = [one_seed(rows, steps, seed) for seed in range(seeds)]
    return {"by_seed": by_seed, "mean": {name: mean(each[name] for each in by_seed) for name in by_seed[0]}}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "versions": versions("torch", "transformers"),
        "shape": {"experts": EXPERTS, "kept": KEPT, "steps": given.steps, "seeds": given.seeds},
        **measure(given.steps, given.seeds),
    }  # fmt: skip
    print(json.dumps(found["mean"], indent=2))
    path = RESULTS / f"pruning_{found['date']}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
