"""Tokens sorted by expert, and which rows belong to which expert.

oneDNN computes torch's half-precision products on a CPU and generates code for each shape. The number of rows of an
expert differs from step to step, so nearly every product has a new shape: as measured (AMX, torch 2.15), a product of
576 x 3072 took 75 to 140 ms with a new shape, and 1 to 2 ms with a known one. So there each expert's rows are padded to
one of a few counts (`bucket`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

SMALLEST = 16  # rows, the size of oneDNN's tiles
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Groups:
    """The rows of expert e are those from `ends_E[e - 1]` (0 for the first) up to `ends_E[e]`.

    Attributes:
        ends_E: int32, on the device of the rows.
        partial: there may be rows after the last end; they belong to no expert, and products are zero for them.
        schedules: (rows, rows per tile) -> result of `grouped.schedule`, which forward and backward share.
    """

    ends_E: Tensor
    partial: bool = False
    schedules: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row after the last) for each expert that has rows; waits for the device."""
        ends: list[int] = self.ends_E.tolist()
        pairs = zip([0, *ends[:-1]], ends, strict=True)
        return [(expert, begin, end) for expert, (begin, end) in enumerate(pairs) if end > begin]

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        """Views of the rows of each expert in `spans`.

        >>> [part.tolist() for part in Groups(torch.tensor([1, 1, 3])).parts(torch.tensor([5, 6, 7]))]
        [[5], [6, 7]]
        """
        sizes = [end - begin for _, begin, end in self.spans]
        return rows.split_with_sizes([*sizes, rows.shape[0] - sum(sizes)])[:-1]


@dataclass(frozen=True)
class Sorted:
    """Tokens in the order of their experts.

    Attributes:
        order_S: position of each row in the flattened (T, K) choices; position // K is the token. Padding rows have
            any position: their results are never read.
        places_TK: row of each choice; S for a choice of no expert, which has no row.
        groups: which rows belong to which expert.
        some_without_row: some choices have no row.
        filled_S: True for padding rows; None: there are none.
    """

    order_S: Tensor
    places_TK: Tensor
    groups: Groups
    some_without_row: bool = False
    filled_S: Tensor | None = None

    @cached_property
    def tokens_S(self) -> Tensor:
        """The token of each row."""
        return self.order_S // self.places_TK.shape[1]

    def cut(self, rows: int) -> "Sorted":
        """Drop the rows that belong to no expert; the host knows that `rows` belong to one.

        >>> found = sort_by_expert(torch.tensor([[1, 2], [2, 0]]), 2, torch.float32, partial=True)
        >>> found.cut(2).order_S.tolist(), found.cut(2).places_TK.tolist()
        ([3, 0], [[1, 2], [2, 0]])
        """
        if not self.groups.partial:  # on a CPU there are none to drop
            return self
        whole = self.order_S.shape[0]
        groups = Groups(self.groups.ends_E)
        return Sorted(self.order_S[:rows], self.places_TK.clamp(max=rows), groups, rows < whole)

    def of_rows(self, choices_TK: Tensor) -> Tensor:
        """(S,): the value of each row's choice; 0 for padding rows and rows of no expert."""
        found_S = choices_TK.reshape(-1)[self.order_S]
        if self.filled_S is not None:
            found_S = found_S.masked_fill(self.filled_S, 0)
        if self.groups.partial:
            places_S = torch.arange(found_S.shape[0], device=found_S.device)
            found_S = found_S.masked_fill(places_S >= self.groups.ends_E[-1], 0)
        return found_S

    def of_choices(self, rows: Tensor) -> Tensor:
        """(T, K, ...) from (S, ...): the value of each choice's row; 0 for a choice without a row."""
        if self.some_without_row:  # an added row of zeros represents them
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return rows[self.places_TK]


def bucket(rows: Tensor) -> Tensor:
    """Round counts up to a multiple of 16, or of 1/16 to 1/32 of the count: at most 16 values between powers of two.

    >>> bucket(torch.tensor([0, 1, 16, 17, 100, 300, 1000])).tolist()
    [0, 16, 16, 32, 112, 304, 1024]
    """
    bits = torch.frexp(rows.float()).exponent  # as `int.bit_length`
    granule = (2.0 ** (bits - 5)).clamp(min=SMALLEST).long()
    return (rows + granule - 1).div(granule, rounding_mode="floor") * granule


def sort_by_expert(index_TK: Tensor, num_experts: int, dtype: torch.dtype, *, partial: bool = False) -> Sorted:
    """Sort (token, choice) pairs by expert.

    Args:
        index_TK: experts of each token; with `partial`, `num_experts` means none.
        num_experts: E.
        dtype: dtype of the products; in half precision on a CPU the rows of each expert are padded.
        partial: some choices may be of no expert.

    >>> found = sort_by_expert(torch.tensor([[2, 0], [0, 1]]), 3, torch.float32)
    >>> found.order_S.tolist(), found.places_TK.tolist(), found.groups.ends_E.tolist()
    ([1, 2, 3, 0], [[3, 0], [1, 2]], [2, 3, 4])
    """
    flat_S = index_TK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    # Not `bincount`, which waits for the device.
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=flat_S.device)
    counts = counts.scatter_add(0, flat_S, torch.ones_like(flat_S))
    on_cpu = flat_S.device.type == "cpu"
    if not on_cpu or not (partial or dtype in HALVES):
        places_S = torch.empty_like(order_S)
        places_S[order_S] = torch.arange(order_S.shape[0], device=order_S.device)
        ends_E = counts[:num_experts].cumsum(0).int()
        return Sorted(order_S, places_S.view_as(index_TK), Groups(ends_E, partial))
    kept_E = counts[:num_experts]
    roomy_E = bucket(kept_E) if dtype in HALVES else kept_E
    ends_E = roomy_E.cumsum(0)
    total, kept = int(ends_E[-1]), int(kept_E.sum())
    # Position of a row: start of its expert plus the number of rows of that expert before it.
    shift_E = (ends_E - roomy_E) - (kept_E.cumsum(0) - kept_E)
    rows_S = torch.arange(kept) + shift_E[flat_S[order_S[:kept]]]
    roomy_order = torch.zeros(total, dtype=torch.long)
    roomy_order[rows_S] = order_S[:kept]
    places_S = torch.full_like(order_S, total)
    places_S[order_S[:kept]] = rows_S
    filled_S = torch.ones(total, dtype=torch.bool)
    filled_S[rows_S] = False
    return Sorted(
        roomy_order, places_S.view_as(index_TK), Groups(ends_E.int()), kept < order_S.shape[0],
        filled_S if total > kept else None,
    )  # fmt: skip
