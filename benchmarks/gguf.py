"""GGUF files against transformers: differences of logits for a tiny model of each family, and for SmolLM2-135M.

    $ OMP_NUM_THREADS=1 python -m benchmarks.gguf             # some 10 minutes; --families and --types change that

Tiny models are random, 2 to 4 layers, fp32, with GPT-2's tokenizer. The logits at every position of one prompt of 160
tokens are compared. A file that verification refuses gets a row that says so.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from examples.smollm2 import smollm2
from llama_stack_provider_moe.compute.export import gguf
from llama_stack_provider_moe.compute.export.reference import read_reference
from llama_stack_provider_moe.compute.export.verify import verify
from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.llama_cpp import Toolchain
from llama_stack_provider_moe.spec.gguf_types import GGUF_TYPES, GgufType
from tests.support import llama_support

FAMILIES = ("granitemoe", "mixtral", "qwen3_moe", "olmoe", "llama4_text", "gpt_oss", "llama")
# gpt-oss' YaRN is not computed alike (see `compute.export.reference`); without it, the rest of the model is.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss, plain RoPE": ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
}
SMOLLM2 = "SmolLM2-135M-Instruct"
TYPES: tuple[GgufType, ...] = ("f32", "f16", "q8_0", "q4_k_m")


def measure(model: Path, types: tuple[GgufType, ...], tools: Toolchain) -> Iterator[dict[str, Any]]:
    """One row for each type."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        exact = Path(folder) / "f32.gguf"
        reference = read_reference(model, say=lambda line: None)
        for kind in dict.fromkeys(("f32", *types)):
            out = exact if kind == "f32" else Path(folder) / f"{kind}.gguf"
            began = time.monotonic()
            if kind in gguf.CONVERTED:
                gguf.convert(model, out, kind, tools)
            else:
                gguf.quantize(exact, out, kind, tools)
            seconds = time.monotonic() - began
            row: dict[str, Any] = {"type": kind, "bytes": out.stat().st_size, "seconds_to_write": round(seconds, 1)}
            try:
                check = verify(out, model, tools, reference, kind)
            except MoeError as error:
                yield row | {"refused": str(error)}
            else:
                found = check.model_dump(mode="json")
                yield row | found["logits"] | {key: found[key] for key in ("tensor_types", "notes", "continuation")}
            if kind != "f32":
                out.unlink()


def families(names: list[str], types: tuple[GgufType, ...], tools: Toolchain) -> Iterator[dict[str, Any]]:
    """Rows of the tiny models, then of SmolLM2, where they are named."""
    for name in names:
        if name == SMOLLM2:
            rows = measure(smollm2(), types, tools)
            yield from (row | {"model": name} for row in rows)
            continue
        family, changes = VARIANTS.get(name, (name, {}))
        with tempfile.TemporaryDirectory() as folder:
            model = llama_support.build(family, Path(folder) / "model", **changes)
            yield from (row | {"model": f"tiny {name}"} for row in measure(model, types, tools))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person."""
    lines = [f"{'model':28}{'type':8}{'largest':>10}{'/ spread':>10}{'median':>10}{'mean KL':>10}{'same top':>9}"]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['model']:28}{row['type']:8}refused: {row['refused'][:60]}")
            continue
        lines.append(
            f"{row['model']:28}{row['type']:8}{row['max_difference']:10.1e}{row['relative_difference']:10.1e}"
            f"{row['median_relative_difference']:10.1e}{row['mean_kl']:10.1e}{row['same_top_token']:9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, *VARIANTS, SMOLLM2], help="models to measure")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=GGUF_TYPES, help="types of files")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"gguf_{datetime.now(UTC):%Y-%m-%d}.json", help="result file"
    )
    options = parser.parse_args()
    tools = llama_support.toolchain()
    rows = []
    for row in families(options.families, tuple(options.types), tools):
        rows.append(row)
        print(table([row]).splitlines()[1], flush=True)
    result = {
        "what": "logits of GGUF files by llama.cpp (fp32 keys and values, no flash attention) against transformers",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.gguf",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "llama_cpp": {"version": tools.version, "library": tools.libraries_from},
        "load_average": [round(each, 1) for each in os.getloadavg()],
        "rows": rows,
        "packages": versions("torch", "transformers", "tokenizers"),
        "machine": machine(),
    }
    print(table(rows))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
