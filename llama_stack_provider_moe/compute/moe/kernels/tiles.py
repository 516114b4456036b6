"""Tile sizes of the Triton kernels: candidates, and the fastest one, timed once and kept on disk.

Each kernel is timed with the first rows it gets, per shape, dtype, device and version of this code. The result is kept
in Triton's cache folder (`TRITON_CACHE_DIR`), next to the compiled kernels. The number of rows per expert is rounded to
a power of two, because it differs from step to step.

With `torch.use_deterministic_algorithms` nothing is timed and the first candidate is used: other tiles add up in
another order, and a choice by timing may differ between machines.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton
from triton import TritonError
from triton.runtime.cache import get_cache_manager
from triton.testing import do_bench

INTERPRETED = bool(triton.knobs.runtime.interpret)
_FILE = "tiles.json"
_CHOSEN: dict[tuple[object, ...], "Tiles"] = {}  # in this process


@dataclass(frozen=True)
class Tiles:
    """One way to split a product into tiles.

    Attributes:
        rows: rows per tile, or per loop step if the loop sums over rows.
        outputs: outputs per tile.
        inputs: inputs per loop step, or per tile.
        warps: warps per program.
        stages: pipeline stages.
        descriptors: load through tensor descriptors (TMA, Hopper and newer).
    """

    rows: int
    outputs: int
    inputs: int
    warps: int = 8
    stages: int = 3
    descriptors: bool = False


def has_descriptors(device: torch.device) -> bool:
    """Whether the device can load tiles from a tensor descriptor (TMA: sm_90 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def for_products(
    rows_per_expert: int, outputs: int, dtype: torch.dtype, device: torch.device, describable: bool
) -> list[Tiles]:
    """Candidates for rows times weights, the safest first.

    Args:
        rows_per_expert: a tile belongs to one expert, so few rows need small tiles.
        outputs: the largest useful width of a tile.
        dtype: fp32 gets half the depth.
        device: the device that runs the kernel.
        describable: the weights can be loaded through descriptors.

    >>> [tile.rows for tile in for_products(20, 4096, torch.bfloat16, torch.device("cpu"), False)][:1]
    [32]
    """
    if INTERPRETED:
        fitting = min(64, _power_of_two(rows_per_expert))
        return [Tiles(fitting, min(128, _power_of_two(outputs)), 32, descriptors=describable)]
    depth = 32 if dtype == torch.float32 else 64
    tall, wide = min(128, _power_of_two(rows_per_expert)), min(128, _power_of_two(outputs))
    found = [Tiles(tall, wide, depth, 8 if tall * wide >= 128 * 128 else 4)]
    described = describable and has_descriptors(device)
    if dtype != torch.float32:
        broad = min(256, _power_of_two(outputs))
        found += [Tiles(tall, wide, depth, 4, 4), Tiles(tall, broad, depth, 8, 3), Tiles(tall, wide, 32, 4, 5)]
        if tall > 32:
            found.append(Tiles(tall // 2, wide, depth, 4, 4))
        if described:
            found += [
                Tiles(tall, wide, depth, 8, 4, True),
                Tiles(tall, broad, depth, 8, 3, True),
                Tiles(tall, broad, depth, 8, 4, True),
            ]
    return list(dict.fromkeys(found))


def for_outers(outputs: int, inputs: int, dtype: torch.dtype) -> list[Tiles]:
    """Candidates for sums of outer products, the safest first."""
    high, wide = min(128, _power_of_two(outputs)), min(128, _power_of_two(inputs))
    if INTERPRETED:
        return [Tiles(32 if dtype == torch.float32 else 64, high, wide)]
    depth = 32 if dtype == torch.float32 else 64
    warps = 8 if high * wide >= 128 * 128 else 4
    found = [Tiles(depth, high, wide, warps), Tiles(depth, high, wide, 4, 4), Tiles(32, high, wide, 4, 5)]
    if dtype != torch.float32 and min(high, wide) < 64:  # a thin side: the loop over rows dominates
        found.append(Tiles(128, high, wide, 4, 3))
    return list(dict.fromkeys(found))


def best(
    kernel: str,
    shape: tuple[int | str, ...],
    candidates: list[Tiles],
    device: torch.device,
    run: Callable[[Tiles], None],
) -> Tiles:
    """The fastest candidate on this device: known, kept on disk, or timed now.

    Args:
        kernel: the kernel's name.
        shape: everything else that the choice may depend on.
        candidates: without timing the first one is used.
        device: the device that `run` uses.
        run: runs the kernel once.

    Raises:
        RuntimeError: no candidate runs on the device.
    """
    if INTERPRETED or len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    key = (kernel, shape, tuple(candidates), device)
    if key not in _CHOSEN:
        name = torch.cuda.get_device_name(device)
        _CHOSEN[key] = cached(name, kernel, shape, tuple(candidates), lambda tiles: _time(run, tiles))
    return _CHOSEN[key]


def cached(
    device_name: str,
    kernel: str,
    shape: tuple[int | str, ...],
    candidates: tuple[Tiles, ...],
    time: Callable[[Tiles], float],
) -> Tiles:
    """The fastest candidate by `time`, measured once for all processes that share Triton's cache folder.

    A file that is truncated or for other candidates is ignored.

    Args:
        device_name: the device's name.
        kernel: the kernel's name.
        shape: everything else that the choice may depend on.
        candidates: tiles to choose from.
        time: milliseconds of one candidate; infinite if it does not run.

    Raises:
        RuntimeError: no candidate runs on the device.
    """
    known = [asdict(tiles) for tiles in candidates]
    key = json.dumps([_version(), device_name, kernel, shape, known])
    kept = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    path = kept.get_file(_FILE)
    if path is not None:
        try:
            return candidates[known.index(json.loads(Path(path).read_text())["tiles"])]
        except (ValueError, KeyError, TypeError):
            pass
    times = [time(tiles) for tiles in candidates]
    if min(times) == float("inf"):
        raise RuntimeError(f"{kernel} {shape}: none of {len(candidates)} tile sizes runs on {device_name}")
    found = times.index(min(times))
    kept.put(
        json.dumps({"tiles": known[found], "key": key, "ms": [None if t == float("inf") else t for t in times]}), _FILE
    )
    return candidates[found]


def _time(run: Callable[[Tiles], None], tiles: Tiles) -> float:
    try:
        ms: float = do_bench(lambda: run(tiles), warmup=5, rep=30, return_mode="median")
    # Too large for the device, or this Triton can't compile it (its passes fail with a plain RuntimeError).
    except (TritonError, RuntimeError):
        return float("inf")
    return ms


@lru_cache(maxsize=1)
def _version() -> str:
    """Version of Triton and hash of the kernels' source."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return f"{triton.__version__}-{hashlib.sha256(b''.join(texts)).hexdigest()}"


def _power_of_two(size: int) -> int:
    """The next power of two, at least 16, the smallest side of a tile for tensor cores."""
    return max(16, int(triton.next_power_of_2(max(1, size))))
