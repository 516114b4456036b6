"""Merging an adapter on disk: throughput against a plain copy of the same files, and memory.

    $ OMP_NUM_THREADS=1 python -m benchmarks.merge            # a synthetic Mixture-of-Experts of some 4 GB

The checkpoint is a Mixtral of random bf16 numbers, with one tensor per expert on disk, and LoRA on attention, experts
and routers. `benchmarks.against_copy` says how both are timed; memory is the peak resident set of a fresh process
during the merge, minus its resident set before, with torch imported and one tiny merge done.
"""

import argparse
import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.against_copy import FULL as FULL_FOLDER
from benchmarks.against_copy import OUT, compared, timed
from benchmarks.against_copy import in_another_process as another_process
from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.compute.export.merge import merge


class Shape(NamedTuple):
    """Of a Mixtral."""

    layers: int
    hidden: int
    inner: int
    experts: int
    vocabulary: int = 1024


FULL = Shape(layers=20, hidden=2048, inner=1792, experts=9, vocabulary=32000)
TINY = Shape(layers=1, hidden=32, inner=32, experts=2)


def write_base(folder: Path, shape: Shape) -> int:
    """A checkpoint of one file a layer, and one for the rest; its bytes. Layers hold the same numbers."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=shape.hidden, intermediate_size=shape.inner, num_local_experts=shape.experts,
        num_hidden_layers=shape.layers, vocab_size=shape.vocabulary, num_attention_heads=16, num_key_value_heads=4,
        num_experts_per_tok=2, tie_word_embeddings=False, dtype="bfloat16", architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    key_value = shape.hidden // 4
    below: dict[str, Tensor] = {
        "input_layernorm.weight": _random(shape.hidden),
        "post_attention_layernorm.weight": _random(shape.hidden),
        "self_attn.q_proj.weight": _random(shape.hidden, shape.hidden),
        "self_attn.k_proj.weight": _random(key_value, shape.hidden),
        "self_attn.v_proj.weight": _random(key_value, shape.hidden),
        "self_attn.o_proj.weight": _random(shape.hidden, shape.hidden),
        "block_sparse_moe.gate.weight": _random(shape.experts, shape.hidden),
    }
    for expert in range(shape.experts):
        path = f"block_sparse_moe.experts.{expert}"
        below[f"{path}.w1.weight"] = _random(shape.inner, shape.hidden)
        below[f"{path}.w2.weight"] = _random(shape.hidden, shape.inner)
        below[f"{path}.w3.weight"] = _random(shape.inner, shape.hidden)
    parts = [{f"model.layers.{i}.{name}": tensor for name, tensor in below.items()} for i in range(shape.layers)]
    parts.append({
        "model.embed_tokens.weight": _random(shape.vocabulary, shape.hidden),
        "model.norm.weight": _random(shape.hidden),
        "lm_head.weight": _random(shape.vocabulary, shape.hidden),
    })  # fmt: skip
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for part in parts for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_adapter(base: Path, folder: Path, rank: int = 16) -> None:
    """LoRA of random numbers on attention, all experts and routers."""
    layers = range(AutoConfig.from_pretrained(base).num_hidden_layers)
    below = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        config = LoraConfig(
            r=rank, lora_alpha=rank, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=[f"model.layers.{i}.{name}" for i in layers for name in below],
        )  # fmt: skip
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    config.save_pretrained(folder)
    weights = {
        name.replace(".default", ""): 0.01 * torch.randn(parameter.shape, device="cpu")
        for name, parameter in adapted.named_parameters() if "lora_" in name
    }  # fmt: skip
    save_file(weights, folder / "adapter_model.safetensors")


def write_all(folder: Path, shape: Shape) -> int:
    """A tiny and a full checkpoint with their adapters; bytes of the full one."""
    total = 0
    for name, of in (("tiny", TINY), ("full", shape)):
        (folder / name).mkdir()
        total = write_base(folder / name, of)
        write_adapter(folder / name, folder / f"{name}_adapter")
    return total


def merge_measured(folder: Path) -> dict[str, Any]:
    """Merge what `write_all` wrote; call it in a process that has done nothing before."""
    merge(folder / "tiny", folder / "tiny_adapter", folder / "tiny_out")
    shutil.rmtree(folder / "tiny_out")

    def work() -> dict[str, Any]:
        report = merge(folder / FULL_FOLDER, folder / "full_adapter", folder / OUT)
        return {"merged_tensors": report.merged, "copied_tensors": report.copied}

    return timed(work)


def in_another_process(folder: Path) -> dict[str, Any]:
    """`merge_measured` in a fresh process."""
    return another_process("benchmarks.merge", ["--merge", str(folder)])


def measure(folder: Path, shape: Shape, rounds: int) -> dict[str, Any]:
    """Write a checkpoint and an adapter below `folder`, copy and merge them."""
    total = write_all(folder, shape)
    return {
        "checkpoint_bytes": total,
        "largest_tensor_bytes": max(shape.vocabulary, shape.inner) * shape.hidden * 2,
        "files": len(list((folder / FULL_FOLDER).glob("*.safetensors"))),
        "adapter_bytes": (folder / "full_adapter" / "adapter_model.safetensors").stat().st_size,
        **compared("merge", folder, total, rounds, lambda: in_another_process(folder)),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=FULL.layers, help="number of layers in the checkpoint, some 200 MB each"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of merges, with a copy before and after each")
    # The child process: merge the checkpoint in this folder.
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"merge_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    options = parser.parse_args()
    if options.merge is not None:
        print(json.dumps(merge_measured(options.merge)))
        return
    shape = FULL._replace(layers=options.layers)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), shape, options.rounds)
    result = {
        "what": "an adapter merged into a checkpoint on disk, against shutil.copyfile of the same files, both synced",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.merge",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": shape._asdict(),
        "threads": torch.get_num_threads(),
        "load_average": [round(each, 1) for each in os.getloadavg()],
        **found,
        "packages": versions("torch", "transformers", "peft"),
        "machine": machine(),
    }
    print(json.dumps(result, indent=2))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def _random(*shape: int) -> Tensor:
    return (0.02 * torch.randn(shape)).to(torch.bfloat16)


if __name__ == "__main__":
    main()
