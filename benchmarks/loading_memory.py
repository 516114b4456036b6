"""Main memory while a 4-bit base is loaded, and while it is decoded and merged with an adapter at a job's end.

Loading: quantised as it is read, against read whole and then quantised.

A random Qwen3-MoE of some 1.2 GB in bf16, in shards of at most 200 MB, is loaded on the CPU, each way in a process of
its own. The figure is the high-water mark of the process's resident set (VmHWM, reset before loading) less the set
before loading. It counts pages of mapped files too, which the system could drop, from their first use until the file is
closed. The bound is the codes and other weights, and two shards.

Merging: `options.save_merged` of an adapter on all experts; the set before is that before loading, too. Run

    python -m benchmarks.loading_memory [--out FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions

SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 48, "num_local_experts": 48,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 2048, "vocab_size": 32000,
}  # fmt: skip
SHARD = "200MB"
# Way of loading -> bits, nested scales, and whether the model is quantised as it is read.
WAYS: dict[str, tuple[int, bool, bool]] = {
    "4 bits, read whole": (4, False, False),
    "4 bits": (4, False, True),
    "4 bits, 8-bit scales": (4, True, True),
    "8 bits": (8, False, True),
}


def status(name: str) -> int:
    """Bytes of a line of this process's status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def build(folder: Path) -> None:
    """Write the model."""
    import torch

    from tests.support import tiny_models

    config = tiny_models.config("qwen3_moe", **SHAPE)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)


def load(folder: Path, way: str) -> None:
    """Load the model one way, and print what it took."""
    import torch

    from llama_stack_provider_moe.compute.models.loader import load_weights, model_config
    from llama_stack_provider_moe.compute.models.quantized_loading import read_quantized
    from llama_stack_provider_moe.compute.moe.codes import Code, Coding
    from llama_stack_provider_moe.compute.moe.derive import find_layout
    from llama_stack_provider_moe.compute.moe.quantize import quantize
    from llama_stack_provider_moe.compute.planning.meta_model import bare

    torch.set_num_threads(1)
    bits, nested, as_read = WAYS[way]
    coding, cpu = Coding(4 if bits == 4 else 8, nested), torch.device("cpu")
    config = model_config(str(folder))
    find_layout(bare(config, torch.bfloat16))  # imports
    Code(torch.zeros(1, 64, 64), coding).whole()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if as_read:
        report = read_quantized(str(folder), config, torch.bfloat16, cpu, coding).report
    else:
        model = load_weights(str(folder), config, torch.bfloat16, cpu)
        report = quantize(model, find_layout(model), coding, cpu)
    print(json.dumps({"peak": status("VmHWM") - before} | report.as_json()))


def merge_once(folder: Path) -> None:
    """Load the model in 4 bits, decode it, merge an adapter, and print what that took at most."""
    import torch

    from llama_stack_provider_moe.compute.models.loader import model_config
    from llama_stack_provider_moe.compute.models.quantized_loading import read_quantized
    from llama_stack_provider_moe.compute.moe.adapters import add_lora
    from llama_stack_provider_moe.compute.moe.codes import Coding
    from llama_stack_provider_moe.compute.moe.derive import find_layout
    from llama_stack_provider_moe.compute.moe.quantize import dequantize
    from llama_stack_provider_moe.compute.moe.resolve_settings import resolve_moe
    from llama_stack_provider_moe.compute.planning.meta_model import bare, blank
    from llama_stack_provider_moe.compute.train.checkpoints import merge
    from llama_stack_provider_moe.spec import Adapter, Moe

    torch.set_num_threads(1)
    adapter, config, cpu = Adapter(quantize_base=True, plan="all_experts", rank=16), model_config(str(folder)), "cpu"
    blank(config, adapter, Moe(), 4)  # imports
    find_layout(bare(config, torch.bfloat16))
    before = status("VmRSS")
    model = read_quantized(str(folder), config, torch.bfloat16, torch.device(cpu), Coding(4, nested=False)).model
    layout = find_layout(model)
    adapted = add_lora(model, adapter, layout, resolve_moe(Moe(), layout, full=False)).model
    loaded = status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    dequantize(adapted, layout)
    merge(adapted)
    print(json.dumps({"peak": status("VmHWM") - before, "bytes_before_merging": loaded}))


def estimated_merge(folder: Path) -> int:
    """The planner's figure for the same model."""
    from llama_stack_provider_moe.compute.models.loader import model_config
    from llama_stack_provider_moe.compute.planning.merging import merging_bytes
    from llama_stack_provider_moe.compute.planning.meta_model import blank
    from llama_stack_provider_moe.spec import Adapter, Moe

    adapter = Adapter(quantize_base=True, plan="all_experts", rank=16)
    return merging_bytes(blank(model_config(str(folder)), adapter, Moe(), 4))


def run(*words: str) -> dict[str, Any]:
    """What this module prints last, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading_memory", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def estimated(folder: Path, way: str) -> dict[str, int]:
    """The planner's figures for the same model."""
    from llama_stack_provider_moe.compute.models.loader import model_config
    from llama_stack_provider_moe.compute.planning.loading import loading_memory
    from llama_stack_provider_moe.compute.planning.meta_model import blank
    from llama_stack_provider_moe.spec import Adapter, Moe

    bits, nested, _ = WAYS[way]
    adapter = Adapter(quantize_base=True, quantize_bits=4 if bits == 4 else 8, quantize_scales=nested)
    made = blank(model_config(str(folder)), adapter, Moe(), 4 if bits == 4 else 8)
    return asdict(loading_memory(made, "cpu"))


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "WAY"), help="load once, in this process")
    parser.add_argument("--merge", metavar="FOLDER", help="load and merge once, in this process")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"loading_memory_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    arguments = parser.parse_args()
    if arguments.load:
        load(Path(arguments.load[0]), arguments.load[1])
        return
    if arguments.merge:
        merge_once(Path(arguments.merge))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        build(folder)
        shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
        for way, (_, _, as_read) in WAYS.items():
            one = run("--load", str(folder), way)
            one["bound"] = one["bytes_after"] + 2 * max(shards)
            if as_read:
                one["estimated"] = estimated(folder, way)["host_bytes"]
                one["estimate_to_measured"] = round(one["estimated"] / one["peak"], 3)
            found[way] = one
            print(way, json.dumps(one), flush=True)
        merged = run("--merge", str(folder))
        merged["estimated"] = estimated_merge(folder)
        merged["estimate_to_measured"] = round(merged["estimated"] / merged["peak"], 3)
        print("merged", json.dumps(merged), flush=True)
    result = {
        "what": "high-water mark of the resident set while a random Qwen3-MoE loads, and while it is merged, on a CPU, "
        "less the set before loading",
        "command": "python -m benchmarks.loading_memory",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": SHAPE,
        "shards": {"count": len(shards), "largest": max(shards), "bytes": sum(shards)},
        "peak_to_16_bits": {way: round(each["peak"] / each["bytes_before"], 3) for way, each in found.items()},
        "found": found,
        "merged": merged,
        "machine": machine(),
        "versions": versions("torch", "transformers", "safetensors", "bitsandbytes"),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["peak_to_16_bits"]))


if __name__ == "__main__":
    main()
