"""A mix holds a few tensors at a time, whatever the number of branches and the size of the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from llama_stack_provider_moe.compute.mixing.mix import mix
from tests.compute.mixing.branches import plan

HIDDEN, INNER, VOCABULARY = 1024, 1536, 2048
BRANCHES = 4


def write(folder: Path, layers: int, seed: int) -> Path:
    """A Llama of random weights in fp32; those of all seeds are near those of seed 0."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, vocab_size=VOCABULARY, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(layers):
        parts = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (256, HIDDEN), "self_attn.v_proj": (256, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=own)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def mix_all(folder: Path, name: str) -> None:
    branches = {f"b{at}": folder / name / str(at + 1) for at in range(BRANCHES)}
    mix(str(folder / name / "0"), plan("btx", branches), folder / f"{name}-out")


def main(folder: Path) -> None:
    """Mix the tiny model, then the full one; print the bytes that the second needed in addition."""
    from benchmarks.against_copy import forget_peak, peak_bytes

    mix_all(folder, "tiny")
    forget_peak()
    before = peak_bytes()
    mix_all(folder, "full")
    print(json.dumps(peak_bytes() - before))


@pytest.mark.wide
def test_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    total = 0
    for name, layers in (("tiny", 1), ("full", 3)):
        files = [write(tmp_path / name / str(at), layers, at) for at in range(BRANCHES + 1)]
        total = sum(file.stat().st_size for file in files)
    command = [sys.executable, "-m", "tests.compute.mixing.test_memory", str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    above = json.loads(done.stdout.splitlines()[-1])
    largest = VOCABULARY * HIDDEN * 4
    # The base, a branch, their difference, the sum and a copy while it is written; and what allocators keep.
    assert above < 8 * largest + 16e6 < total / 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
