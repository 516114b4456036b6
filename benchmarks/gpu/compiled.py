"""Every Triton kernel with every candidate of its tiles, compiled for a GPU that need not be there.

What ptxas says of each: registers, and bytes of the stack, where it counts spills (in `LOCAL` it counts none).
"""

import json
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from llama_stack_provider_moe.compute.moe.kernels import ragged, tiles
from llama_stack_provider_moe.compute.moe.kernels.tiles import Tiles, for_outers, for_products
from tests.support.triton_cases import DTYPES, compiled, variants

ARCHITECTURES = (90, 100, 80)  # the most likely first
RANKS = (16, 64)
ROWS = (128, 64, 32, 16)  # per expert: tiles differ up to 128
SIDES = (4096, 16)  # of outer products: a weight's, and a rank's
Compiled = tuple[str, Any, dict[str, Any], dict[str, int]]


def candidates(arch: int, dtype: str) -> Iterator[Compiled]:
    """(what it is, kernel, constants, options), each once."""
    seen: set[str] = set()
    for each in _all(arch, dtype):
        key = json.dumps([each[0].split(":")[0], each[2], each[3]], sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield each


def _all(arch: int, dtype: str) -> Iterator[Compiled]:
    plain = {kind: (kernel, constants) for kind, kernel, constants, _ in variants(arch, dtype)}
    for (kind, (kernel, constants)), rank, rows in product(plain.items(), RANKS, ROWS):
        if kernel is not ragged.times or kind.endswith("TMA"):
            continue
        has_lora, turned = constants["HAS_LORA"] or constants["GIVEN"], constants["WEIGHT_TURNED"]
        outputs = rank if constants["MASK_IN"] else 4096  # the thin product's outputs are the rank
        separate = arch >= 100 or constants["MASK_OUT"]
        for each in for_products(rows, outputs, rank if has_lora else 0, DTYPES[dtype], arch >= 90, turned, separate):
            sizes = _sizes(each) | {"BLOCK_R": rank if has_lora else 16} | _described(each, constants)
            named = f"r{rank} {_spelled(each)}" if has_lora else _spelled(each)
            yield f"{kind}: {named}", kernel, constants | sizes, _options(each)
    for kind, (kernel, constants) in plain.items():
        if kernel is not ragged.outer:
            continue
        for outputs, inputs in product(SIDES[1:] if constants["DROPS"] else SIDES, SIDES):
            for each in for_outers(outputs, inputs, DTYPES[dtype], arch >= 90):
                yield f"{kind}: {_spelled(each)}", kernel, constants | _sizes(each), _options(each)
    for kind, kernel, constants, options in variants(arch, dtype):
        if kernel not in (ragged.times, ragged.outer):
            yield kind, kernel, constants, options


def _sizes(each: Tiles) -> dict[str, int]:
    return {"BLOCK_S": each.rows, "BLOCK_O": each.outputs, "BLOCK_I": each.inputs}


def _options(each: Tiles) -> dict[str, int]:
    return {"num_warps": each.warps, "num_stages": each.stages}


def _described(each: Tiles, constants: dict[str, Any]) -> dict[str, bool]:
    return {"WEIGHT_DESCRIBED": each.descriptors, "ROWS_DESCRIBED": each.descriptors and not constants["HAS_INDEX"]}


def _spelled(each: Tiles) -> str:
    return f"{each.rows}x{each.outputs}x{each.inputs} w{each.warps} s{each.stages}{' TMA' if each.descriptors else ''}"


def main() -> None:
    """One line of JSON for each candidate of the architectures and dtypes that the command line names."""
    assert not tiles.INTERPRETED, "compiling and interpreting need separate processes"
    architectures = [int(each) for each in sys.argv[1:] if each.isdigit()] or list(ARCHITECTURES)
    dtypes = [each for each in sys.argv[1:] if each in DTYPES] or ["bf16"]
    for arch, dtype in product(architectures, dtypes):
        for name, kernel, constants, options in candidates(arch, dtype):
            told: dict[str, Any] = {"arch": f"sm_{arch}", "dtype": dtype, "candidate": name}
            print(json.dumps(told | compiled(kernel, arch, dtype, constants, options)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
