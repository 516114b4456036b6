"""Dropout by formula: the same bits as a plain loop, the laws of independent draws, and who draws seeds when."""

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import drop as drop_module
from llama_stack_provider_moe.compute.moe.kernels.drop import DOWN, INNER, UP, Drop, Dropout, draw_seed, scale_of

WORD = 2**32 - 1


def mix(word: int) -> int:
    word = (word ^ word >> 16) * 0x21F0AAAD & WORD
    word = (word ^ word >> 15) * 0x735A2D97 & WORD
    return word ^ word >> 15


def kept(share: float, seed: int, stream: int, row: int, column: int) -> bool:
    """The formula of the module's docstring, in Python's numbers, which don't overflow."""
    a = mix((seed % 2**32 + stream * 0x61C88647) & WORD)
    b = mix(seed >> 32 ^ a)
    first = mix((row + a) & WORD)
    second = mix(first ^ b)
    word = (first + column * 0x61C88647) & WORD
    word = (word ^ word >> 16) * 0x21F0AAAD & WORD
    word ^= second
    word = (word ^ word >> 15) * 0x735A2D97 & WORD
    return word % 2**31 >= round(share * 2**31)


def masks(share: float, rows: int, columns: int, seed: int = 1, stream: int = UP) -> Tensor:
    """1 where a number is dropped, in double precision."""
    return (~Drop(share, seed, stream, torch.arange(rows)).keep(columns)).double()


def test_example() -> None:
    assert doctest.testmod(drop_module).failed == 0


@pytest.mark.parametrize(("share", "seed", "stream"), [(0.5, 0, UP), (0.05, 2**62 - 1, DOWN), (0.9, 2**40 + 3, INNER)])
def test_the_mask_is_the_formulas(share: float, seed: int, stream: int) -> None:
    """Also of rows beyond what is computed at once, and of widths that no vector register divides."""
    ids = torch.cat([torch.arange(2000), torch.tensor([2**31 - 1, 70_000_000])])
    for columns in (1, 67, 200):
        found = Drop(share, seed, stream, ids).keep(columns)
        for row in (*range(0, 2002, 101), 2000, 2001):
            expected = [kept(share, seed, stream, int(ids[row]), column) for column in range(columns)]
            assert found[row].tolist() == expected, (columns, row)


def test_a_row_keeps_its_mask_wherever_it_is() -> None:
    """Order, other rows, padding and width of a tile change nothing."""
    ids = torch.arange(40)
    whole = Drop(0.3, 9, UP, ids).keep(50)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([order, torch.zeros(24, dtype=torch.long)])
    assert torch.equal(Drop(0.3, 9, UP, padded).keep(50)[:40], whole[order])
    assert torch.equal(Drop(0.3, 9, UP, ids[7:8]).keep(20), whole[7:8, :20])


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_the_share_is_dropped(share: float) -> None:
    """Overall, in each row, in each column and for each seed, to the standard error of independent draws."""
    found = masks(share, 4096, 512)
    variance = share * (1 - share)
    assert abs(float(found.mean()) - share) < 4.5 * (variance / found.numel()) ** 0.5
    for axis in (0, 1):
        scores = (found.mean(dim=axis) - share) / (variance / found.shape[axis]) ** 0.5
        assert 0.85 < float(scores.std()) < 1.15, axis  # measured: 0.95 to 1.04
        few = share * (1 - share) * found.shape[axis] < 3  # then counts have a longer tail than a normal variable
        assert float(scores.abs().max()) < (8 if few else 6), axis
    seeds = torch.stack([masks(share, 64, 64, seed=seed).mean() for seed in range(300)])
    assert 0.85 < float(((seeds - share) / (variance / 4096) ** 0.5).std()) < 1.15


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_no_two_draws_are_correlated(share: float) -> None:
    """Neighbouring columns, rows, choices of a token, streams and seeds."""
    found = masks(share, 2048, 512)
    pairs = {
        "next column": (found[:, 1:], found[:, :-1]), "column at 16": (found[:, 16:], found[:, :-16]),
        "next row": (found[1:], found[:-1]), "choice of the next token": (found[8:], found[:-8]),
        "diagonal": (found[1:, 1:], found[:-1, :-1]), "row at 1024": (found[1024:], found[:1024]),
        "stream": (found, masks(share, 2048, 512, stream=INNER)), "other streams": (
            masks(share, 2048, 512, stream=INNER), masks(share, 2048, 512, stream=DOWN)
        ),
        "next seed": (found, masks(share, 2048, 512, seed=2)),
        "high bits of the seed": (found, masks(share, 2048, 512, seed=1 + 2**32)),
    }  # fmt: skip
    for what, (one, other) in pairs.items():
        correlation = float(((one - share) * (other - share)).mean()) / (share * (1 - share))
        assert abs(correlation) < 5 / one.numel() ** 0.5, what


def test_any_two_rows_are_independent() -> None:
    """The correlations of 512 rows with each other have the spread of independent ones."""
    found = masks(0.5, 512, 4096) - 0.5
    correlations = (found @ found.T / (0.25 * 4096))[torch.triu_indices(512, 512, 1).unbind()]
    assert 0.97 < float(correlations.std()) * 4096**0.5 < 1.03
    assert float(correlations.abs().max()) < 6 / 4096**0.5


def test_words_of_two_bits_are_uniform() -> None:
    """Chi-square of the 16 patterns of a 2 x 2 block, at half: 15 degrees of freedom."""
    found = masks(0.5, 2048, 1024).long()
    patterns = found[::2, ::2] + 2 * found[1::2, ::2] + 4 * found[::2, 1::2] + 8 * found[1::2, 1::2]
    counts = torch.bincount(patterns.flatten(), minlength=16).double()
    expected = patterns.numel() / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 40  # 1 in 2,000


def test_dropped_rows_keep_their_mean() -> None:
    drop = Drop(0.25, 3, UP, torch.arange(300))
    rows = torch.ones(300, 200, dtype=torch.float64)
    assert float((drop.of(rows) * drop.scale).mean()) == pytest.approx(1, abs=0.01)
    assert drop.scale == scale_of(0.25) == 4 / 3
    assert torch.equal(drop.of(rows) != 0, drop.keep(200))


def test_seeds_come_from_torchs_generator() -> None:
    """So that a restored state (a checkpoint's, or that of gradient checkpointing) repeats the masks."""
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = [draw_seed() for _ in range(50)]
    assert len(set(first)) == 50
    assert all(0 <= seed < 2**62 for seed in first)
    torch.set_rng_state(state)
    assert [draw_seed() for _ in range(50)] == first
    with torch.device("meta"):
        assert draw_seed() not in first


def test_a_share_of_nothing_has_no_mask() -> None:
    ids: Any = torch.arange(3)
    assert Dropout(1).drop(UP, 0.0, ids) is None
    assert Dropout(1, exact=True).drop(DOWN, 0.5, ids) == Drop(0.5, 1, DOWN, ids, exact=True)
