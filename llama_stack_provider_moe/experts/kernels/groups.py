"""Which rows are whose: tokens sorted by their experts.

oneDNN, which computes torch's half-precision products on a CPU, generates code for each shape. How many rows an
expert gets differs from step to step, so nearly every product is of a new shape: where this was found (AMX, torch
2.15) one of 576 x 3072 took 75 to 140 ms when its shape was new, and 1 to 2 ms when it was not. There each expert's
rows are filled up to one of few counts, `bucket`.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

SMALLEST = 16  # rows; oneDNN's tiles hold as many
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Groups:
    """Expert e's rows are those from `ends_E[e - 1]` (0 for the first) up to `ends_E[e]`.

    Attributes:
        ends_E: int32, on the device of the rows.
        partial: there may be rows after the last end, which belong to no expert; products give zeros for them.
        schedules: by (rows, rows of a tile), what `grouped.schedule` made; forward and backward cut rows up alike.
    """

    ends_E: Tensor
    partial: bool = False
    schedules: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, one after its last) of each expert that has rows; waits for the device."""
        ends: list[int] = self.ends_E.tolist()
        pairs = zip([0, *ends[:-1]], ends, strict=True)
        return [(expert, begin, end) for expert, (begin, end) in enumerate(pairs) if end > begin]


@dataclass(frozen=True)
class Sorted:
    """Tokens in the order of their experts.

    Attributes:
        order_S: of each row, its position in the flattened (T, K) choices; position // K is the token. Of rows that
            fill up, any: nobody reads what becomes of them.
        places_TK: of each choice, its row; S for a choice of no expert, which has none.
        some_without_row: there are such choices.
        filled_S: True in rows that fill up; None: there are none.
    """

    order_S: Tensor
    places_TK: Tensor
    groups: Groups
    some_without_row: bool = False
    filled_S: Tensor | None = None

    @cached_property
    def tokens_S(self) -> Tensor:
        """Of each row, its token."""
        return self.order_S // self.places_TK.shape[1]

    def cut(self, rows: int) -> "Sorted":
        """Without the rows that belong to no expert, where the host knows how many belong to one.

        >>> found = sort_by_expert(torch.tensor([[1, 2], [2, 0]]), 2, torch.float32, partial=True)
        >>> found.cut(2).order_S.tolist(), found.cut(2).places_TK.tolist()
        ([3, 0], [[1, 2], [2, 0]])
        """
        if not self.groups.partial:  # on a CPU they have none to begin with
            return self
        whole = self.order_S.shape[0]
        groups = Groups(self.groups.ends_E)
        return Sorted(self.order_S[:rows], self.places_TK.clamp(max=rows), groups, rows < whole)

    def of_rows(self, choices_TK: Tensor) -> Tensor:
        """(S,): of each row, what its choice has; 0 in rows that fill up or are of no expert."""
        found_S = choices_TK.reshape(-1)[self.order_S]
        if self.filled_S is not None:
            found_S = found_S.masked_fill(self.filled_S, 0)
        if self.groups.partial:
            places_S = torch.arange(found_S.shape[0], device=found_S.device)
            found_S = found_S.masked_fill(places_S >= self.groups.ends_E[-1], 0)
        return found_S

    def of_choices(self, rows: Tensor) -> Tensor:
        """(T, K, ...) of (S, ...): what each choice's row has; 0 for a choice that has none."""
        if self.some_without_row:  # a row of zeros stands for them
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return rows[self.places_TK]


def bucket(rows: Tensor) -> Tensor:
    """Counts rounded up to a multiple of 16, or of a sixteenth to a 32nd of it: at most 16 between powers of two.

    >>> bucket(torch.tensor([0, 1, 16, 17, 100, 300, 1000])).tolist()
    [0, 16, 16, 32, 112, 304, 1024]
    """
    bits = torch.frexp(rows.float()).exponent  # as `int.bit_length`
    granule = (2.0 ** (bits - 5)).clamp(min=SMALLEST).long()
    return (rows + granule - 1).div(granule, rounding_mode="floor") * granule


def sort_by_expert(index_TK: Tensor, num_experts: int, dtype: torch.dtype, *, partial: bool = False) -> Sorted:
    """Put every (token, choice) pair beside the others of its expert.

    Args:
        index_TK: of each token, its experts; `num_experts` stands for none, where `partial` says that there are such.
        dtype: of the products to come; in half precision on a CPU each expert's rows are filled up.

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
    # A row's place: where its expert begins, and how many of its expert's are before it.
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
