"""Tile sizes of the Triton kernels: candidates, and the fastest correct one, measured once and kept on disk.

Each candidate runs on the first rows that a kernel gets, per shape, dtype, device and version of this code; its time
counts only if its results are those of the plain-torch twin. The choice is kept in Triton's cache folder
(`TRITON_CACHE_DIR`), next to the compiled kernels. A job's trial (`kernel_trial`) chooses all tiles before the first
step and hands them to every process of the job (`install`), so no process times anything between steps.

With `torch.use_deterministic_algorithms` nothing is timed and the first candidate is used: other tiles add up in
another order, and a choice by timing may differ between machines.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import TritonError
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager
from triton.testing import do_bench

from llama_stack_provider_moe.compute.moe.kernels.agreement import disagreement
from llama_stack_provider_moe.ground import liveness

INTERPRETED = bool(triton.knobs.runtime.interpret)
_FILE = "tiles.json"
LARGEST_BUCKET = 1024  # rows per expert

Asked = tuple[int | str, ...]
_CHOSEN: dict[tuple[str, Asked], "Tiles"] = {}  # in this process
_AHEAD: set[tuple[str, Asked]] = set()  # kernel and shapes, without rows, whose tiles were tuned ahead


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


class Choice(NamedTuple):
    """The tiles of a kernel for one kind of call (see `best`)."""

    kernel: str
    asked: Asked
    tiles: Tiles


@dataclass(frozen=True)
class Measured:
    """What came of one candidate: its median in ms, or the reason for rejecting it; and how many registers spill."""

    ms: float | None
    reason: str = ""
    spills: int = 0


@lru_cache(maxsize=8)
def has_descriptors(device: torch.device) -> bool:
    """Whether the device can load tiles from a tensor descriptor (TMA: sm_90 and newer; the interpreter, too)."""
    return INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))


@lru_cache(maxsize=1024)  # it is asked at every call of a kernel
def for_products(
    rows_per_expert: int,
    outputs: int,
    rank: int,
    dtype: torch.dtype,
    described: bool,
    turned: bool = False,
    separate: bool = False,
) -> tuple[Tiles, ...]:
    """Candidates for rows times weights, the safest first; few, because compiling one takes 2 to 8 s.

    Args:
        rows_per_expert: a tile belongs to one expert, so few rows need small tiles.
        outputs: the largest useful width of a tile.
        rank: rank of LoRA in the same pass; its accumulator takes registers of the tile's own.
        dtype: fp32 gets one candidate.
        described: the weights can be loaded through descriptors, and the device has them.
        turned: the weights' outputs are contiguous, as in a gradient of rows; their loads take more registers.
        separate: LoRA's product has an accumulator of its own.

    >>> [tile.rows for tile in for_products(20, 4096, 16, torch.bfloat16, False)][:1]
    [32]
    """
    if INTERPRETED:
        fitting = min(64, _power_of_two(rows_per_expert))
        return (Tiles(fitting, min(128, _power_of_two(outputs)), 32, descriptors=described),)
    tall, wide = min(128, _power_of_two(rows_per_expert)), min(128, _power_of_two(outputs))
    if dtype == torch.float32:  # without tensor cores: 128 x 128 would spill
        return (Tiles(min(64, tall), wide, 32),)
    depth = 64
    if wide <= 64:  # a thin product, such as LoRA's first: bound by reading its rows once, whatever the tile
        halves = max(16, tall // 2)
        # On sm_100 two accumulators of 64 x 64 spill in four stages.
        return tuple(dict.fromkeys(
            Tiles(rows, wide, depth, 4, 3 if separate and rows == wide == 64 else 4) for rows in (tall, halves)
        ))  # fmt: skip
    if turned and (tall <= 32 or rank > 32 or separate):
        return _turned(tall, wide, depth, described, separate)
    if rank > 32 and tall > 32 and not described:  # sm_80 has room for a thin accumulator beside a narrow one only
        return Tiles(tall, 64, depth, 8 if tall > 64 else 4, 3), Tiles(32, wide, depth, 8, 3)
    found = [Tiles(tall, wide, depth, 8 if tall * wide >= 128 * 128 else 4)]
    roomy = rank <= 32  # beside a wider thin accumulator the tiles with the most numbers per thread spill
    two = rank > 0 and separate
    if tall * wide < 128 * 128 or (roomy and described and not turned and not two):
        found.append(Tiles(tall, wide, depth, 4, 4))
    # With few rows a broad tile is computed without wgmma, and spills; on sm_80 all broad ones do. Two broad
    # accumulators and a thin one are more than the 512 columns of tensor memory of sm_100.
    fits = roomy and tall > 32 and described and not two
    broads = [min(256, _power_of_two(outputs))] if fits else []
    found += [Tiles(tall, broad, depth, 8, 3) for broad in broads if not turned]
    if tall > (64 if turned else 32):
        found.append(Tiles(tall // 2, wide, depth, 4, 4))
    if described:
        found.append(Tiles(tall, wide, depth, 8, 4, True))
        found += [Tiles(tall, broad, depth, 8, 3, True) for broad in broads]
    return tuple(dict.fromkeys(found))


def _turned(tall: int, wide: int, depth: int, described: bool, separate: bool) -> tuple[Tiles, ...]:
    """For turned weights and few rows, or large accumulators.

    With four warps these spill; so do 16 rows in four stages, 32 in three, and two accumulators of few rows.
    """
    wide = min(wide, 64) if separate and tall <= 32 else wide
    narrow = separate and not described and tall > 64  # 128 x 128 with two accumulators spill on sm_80
    found = [Tiles(tall, min(wide, 64) if narrow else wide, depth, 8, 4 if tall == 32 else 3)]
    found += [Tiles(tall // 2, wide, depth, 8, 4)] if tall > 64 else []
    if described and tall == 16:
        found.append(Tiles(tall, wide, depth, 4 if separate else 8, 3, True))
    elif described:
        found.append(Tiles(tall, wide, depth, 8, 4, True))
    return tuple(found)


@lru_cache(maxsize=1024)
def for_outers(outputs: int, inputs: int, dtype: torch.dtype, newer: bool = True) -> tuple[Tiles, ...]:
    """Candidates for sums of outer products, the safest first.

    Args:
        outputs: the largest useful height of a tile.
        inputs: its largest useful width.
        dtype: of what is multiplied.
        newer: the device is of sm_90 or newer; on sm_80 four warps with 128 x 128 sums spill.
    """
    high, wide = min(128, _power_of_two(outputs)), min(128, _power_of_two(inputs))
    if INTERPRETED:
        return (Tiles(32 if dtype == torch.float32 else 64, high, wide),)
    depth = 32 if dtype == torch.float32 else 64
    warps = 8 if high * wide >= 128 * 128 else 4
    few = wide if newer else min(wide, 64)
    found = [Tiles(depth, high, wide, warps), Tiles(depth, high, few if high == 128 else wide, 4, 4)]
    if dtype != torch.float32 and min(high, wide) < 64:  # a thin side: the loop over rows dominates
        found.append(Tiles(128, high, wide, 4, 3))
    return tuple(dict.fromkeys(found))


def rows_bucket(rows: int, experts: int) -> int:
    """Rows per expert as tuning counts them: a power of two, because the number differs from step to step.

    From 16 rows down and from 1,024 up the same tiles win.

    >>> [rows_bucket(rows, 8) for rows in (1, 500, 65536)]
    [16, 64, 1024]
    """
    return min(LARGEST_BUCKET, _power_of_two(rows // experts))


@dataclass(frozen=True)
class Call:
    """One call of a kernel, as tuning sees it.

    Attributes:
        run: runs it once; returns the compiled kernel, or None if Triton interprets.
        results: the tensors that it writes.
        expected: the same by the plain-torch twin.
        rows: rows of `results` that belong to an expert (others are never written); None: all.
    """

    run: Callable[[Tiles], CompiledKernel | None]
    results: tuple[Tensor, ...]
    expected: Callable[[], tuple[Tensor, ...]]
    rows: Callable[[], int] | None = None

    def measured(self, tiles: Tiles, expected: tuple[Tensor, ...]) -> Measured:
        """Run it on results that are NaN, compare them with the twin's, and only then time it."""
        rows = None if self.rows is None else self.rows()
        for each in self.results:
            each[:rows].fill_(torch.nan)
        try:
            compiled = self.run(tiles)
            reason = disagreement(self.results, expected)
            if reason is not None:
                return Measured(None, reason)
            ms: float = do_bench(lambda: self.run(tiles), warmup=5, rep=30, return_mode="median")
        # Too large for the device, or this Triton can't compile it (its passes fail with a plain RuntimeError).
        except (TritonError, RuntimeError) as error:
            return Measured(None, f"does not run ({type(error).__name__})")
        return Measured(ms, spills=0 if compiled is None else compiled.n_spills)


def best(kernel: str, asked: Asked, candidates: tuple[Tiles, ...], device: torch.device, call: Call) -> Tiles:
    """The fastest candidate on this device: known, kept on disk, or checked and timed now.

    If tiles were tuned ahead (`install`), nothing is timed: the nearest size's are used, which were checked too.

    Args:
        kernel: the kernel's name.
        asked: everything else that the choice may depend on; the rows per expert (`rows_bucket`) are the first.
        candidates: without timing the first one is used.
        device: the device that `call` uses.
        call: the kernel's call with the first rows it gets.

    Raises:
        RuntimeError: no candidate gives correct results on the device.
    """
    if INTERPRETED or len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    found = _CHOSEN.get((kernel, asked))
    if found is None:
        found = _nearest(kernel, asked) if _AHEAD else None
        if found is None:
            twins: list[tuple[Tensor, ...]] = []

            def measure(tiles: Tiles) -> Measured:
                if not twins:  # not if the choice is kept on disk
                    twins.append(call.expected())
                liveness.alive()
                return call.measured(tiles, twins[0])

            found = cached(torch.cuda.get_device_name(device), kernel, asked, candidates, measure)
        _CHOSEN[kernel, asked] = found
    return found


def chosen() -> list[Choice]:
    """The tiles that this process has chosen, for `install` in another."""
    return [Choice(kernel, asked, tiles) for (kernel, asked), tiles in _CHOSEN.items()]


def install(choices: Iterable[Choice]) -> None:
    """Use tiles that another process chose on the same kind of device; from now on no size of theirs is timed."""
    for each in choices:
        _CHOSEN[each.kernel, each.asked] = each.tiles
        _AHEAD.add((each.kernel, each.asked[1:]))


def _nearest(kernel: str, asked: Asked) -> Tiles | None:
    """The tiles for the next larger number of rows, else for the largest; None if there are none for these shapes."""
    if (kernel, asked[1:]) not in _AHEAD:
        return None
    known = {int(at[0]): tiles for (name, at), tiles in _CHOSEN.items() if name == kernel and at[1:] == asked[1:]}
    larger = [rows for rows in known if rows >= int(asked[0])]
    return known[min(larger) if larger else max(known)]


def cached(
    device_name: str,
    kernel: str,
    asked: Asked,
    candidates: tuple[Tiles, ...],
    measure: Callable[[Tiles], Measured],
) -> Tiles:
    """The fastest correct candidate, measured once for all processes that share Triton's cache folder.

    Candidates that spill registers are used only where no other is correct. A file that is truncated or for other
    candidates is ignored.

    Args:
        device_name: the device's name.
        kernel: the kernel's name.
        asked: everything else that the choice may depend on.
        candidates: tiles to choose from.
        measure: what came of one candidate.

    Raises:
        RuntimeError: no candidate gives correct results on the device.
    """
    known = [asdict(tiles) for tiles in candidates]
    key = json.dumps([_version(), device_name, kernel, asked, known])
    kept = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    path = kept.get_file(_FILE)
    if path is not None:
        try:
            return candidates[known.index(json.loads(Path(path).read_text())["tiles"])]
        except (ValueError, KeyError, TypeError):
            pass
    found = [measure(tiles) for tiles in candidates]
    times = {number: each.ms for number, each in enumerate(found) if each.ms is not None}
    if not times:
        reasons = "; ".join(dict.fromkeys(each.reason for each in found))
        raise RuntimeError(
            f"{kernel} {asked}: none of {len(candidates)} tile sizes is correct on {device_name}: {reasons}"
        )
    without_spills = {number: ms for number, ms in times.items() if not found[number].spills} or times
    winner = min(without_spills, key=lambda number: without_spills[number])
    for tiles, each in zip(candidates, found, strict=True):
        if each.ms is None:
            print(f"{kernel} {asked}: {tiles} {each.reason}, so it is not used", file=sys.stderr, flush=True)
    kept.put(json.dumps({"tiles": known[winner], "key": key, "measured": [asdict(each) for each in found]}), _FILE)
    return candidates[winner]


@lru_cache(maxsize=1)
def _version() -> str:
    """Version of Triton and hash of the kernels' source."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return f"{triton.__version__}-{hashlib.sha256(b''.join(texts)).hexdigest()}"


def _power_of_two(size: int) -> int:
    """The next power of two, at least 16, the smallest side of a tile for tensor cores."""
    return max(16, int(triton.next_power_of_2(max(1, size))))
