"""What the routing telemetry of a step costs: bytes of events, processor time, and reads of the device.

    OMP_NUM_THREADS=1 python -m benchmarks.telemetry [--steps N] [--out FILE]

A Qwen3 MoE with 48 layers of 128 experts, top-8, whose weights are tiny, runs 512 tokens a step. `before` writes the
share of every expert at each step with all digits, and reads each layer by itself, as this package did until 0.1.0. The
passes of the model do not count, and the order of the two alternates.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.compute.moe.routing_sums import ALL, RoutingSums
from llama_stack_provider_moe.compute.train.routing_events import RoutingEvents, steps_between_tables
from llama_stack_provider_moe.jobdir.events import EventLog, Routing, Step
from llama_stack_provider_moe.jobdir.routing_figures import LayerRouting
from llama_stack_provider_moe.spec import Moe
from tests.support import tiny_models

LAYERS, EXPERTS, TOP_K, TOKENS = 48, 128, 8, 512
PACKAGES = ("torch", "transformers", "pydantic")
FIGURES = (
    "loss", "ce", "aux_loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "tokens", "tokens_per_s",
    "tokens_per_s_per_device", "tflops_per_device", "memory_bytes",
)  # fmt: skip

type Event = Callable[[RoutingSums, int], Routing]


def before(sums: RoutingSums, step: int) -> Routing:
    """The event of a step as it was: four reads of the device for each layer."""
    layers = []
    for row, (_, layer) in enumerate(sums.keys):
        counts_E, probs_E = sums.packed_KS[row, :EXPERTS].float(), sums.packed_KS[row, EXPERTS : 2 * EXPERTS].float()
        counts, tokens = counts_E.tolist(), sums.packed_KS[row, -1].item()
        share = [count / sum(counts) for count in counts]
        mean = 1 / len(share)
        layers.append(LayerRouting(
            layer=layer, share=share, min=min(share), max=max(share),
            cv=math.sqrt(sum((part - mean) ** 2 for part in share) / len(share)) / mean, dead=counts.count(0.0),
            load_entropy=torch.special.entr(probs_E / tokens).sum().item(),
            token_entropy=sums.packed_KS[row, -2].item() / tokens,
        ))  # fmt: skip
    return Routing(step=step, layers=layers)


@contextmanager
def reads() -> Iterator[list[str]]:
    """The reads of tensors inside; on a GPU each waits for it."""
    found: list[str] = []
    real = {name: getattr(Tensor, name) for name in ("tolist", "item")}

    def counting(name: str) -> Callable[..., Any]:
        def counted(tensor: Tensor) -> Any:
            found.append(name)
            return real[name](tensor)

        return counted

    for name in real:
        setattr(Tensor, name, counting(name))
    try:
        yield found
    finally:
        for name, method in real.items():
            setattr(Tensor, name, method)


def passes(steps: int) -> Iterator[RoutingSums]:
    """What the routers did in each step."""
    model = tiny_models.model("qwen3_moe", num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
    layout = find_layout(model)
    assert layout is not None
    recorder, generator = RoutingRecorder(model, layout), torch.Generator().manual_seed(0)
    for _ in range(steps):
        with torch.no_grad(), recorder.recording(None):
            model(torch.randint(3, 300, (4, TOKENS // 4), generator=generator))
        yield recorder.take_sums(())


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Bytes, milliseconds and reads of a step, before and after."""
    first = next(passes(1))
    layout = find_layout(tiny_models.model(
        "qwen3_moe", num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    ))  # fmt: skip
    assert layout is not None
    assert {part for part, _ in first.keys} == {ALL}
    every = steps_between_tables(Moe(), layout, 0)
    events = RoutingEvents(every)
    after: Event = lambda sums, step: events.of_step(sums, step, is_kept=step == steps)  # noqa: E731
    ways: dict[str, Event] = {"before": before, "after": after}
    logs = {name: EventLog(folder / name) for name in ways}
    cpu_ms: dict[str, list[float]] = {name: [] for name in ways}
    read: dict[str, list[int]] = {name: [] for name in ways}
    for step, sums in enumerate(passes(steps), 1):
        for name in sorted(ways, reverse=bool(step % 2)):
            logs[name].append(Step(
                step=step, max_steps=steps, epoch=step / 7, metrics=dict.fromkeys(FIGURES, 1.2345678901234567),
                eta_s=123.45678901234567,
            ))  # fmt: skip
            with reads() as found:
                began = time.process_time()
                logs[name].append(ways[name](sums, step))
                cpu_ms[name].append(1000 * (time.process_time() - began))
            read[name].append(len(found))
    size = {name: (folder / name).stat().st_size / steps for name in ways}
    return {
        "steps": steps,
        "steps_between_tables": every,
        "bytes_a_step": {name: round(each) for name, each in size.items()},
        "cpu_ms_a_step": {
            name: {"median": round(statistics.median(each), 3), "mean": round(statistics.mean(each), 3)}
            for name, each in cpu_ms.items()
        },
        "reads_a_step": {name: {"median": statistics.median(each), "most": max(each)} for name, each in read.items()},
        "before_to_after": {
            "bytes": round(size["before"] / size["after"], 1),
            "cpu": round(statistics.mean(cpu_ms["before"]) / statistics.mean(cpu_ms["after"]), 1),
        },
    }


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps (default: 100)")
    parser.add_argument("--out", type=Path, default=RESULTS / f"telemetry_{date.today()}.json", help="result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), arguments.steps)
    shape = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "tokens": TOKENS}
    written = {"command": "python -m benchmarks.telemetry", **shape, **found, "machine": machine(),
               "versions": versions(*PACKAGES)}  # fmt: skip
    arguments.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
