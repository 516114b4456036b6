"""`RowParts`: the part of each row of a file, in one byte a row."""

from collections.abc import Iterator, Mapping


class RowParts(Mapping[int, str]):
    """Index of a row -> the name of its part.

    >>> dict(RowParts(("train-code", "train-chat"), bytes([0, 1, 1]), first=7))
    {7: 'train-code', 8: 'train-chat', 9: 'train-chat'}

    Args:
        names: of the parts, at most 256.
        numbers: for each row, the index of its part.
        first: index of the first row.
    """

    def __init__(self, names: tuple[str, ...], numbers: bytes, first: int = 0) -> None:
        self._names = names
        self._numbers = numbers
        self._first = first

    def __getitem__(self, index: int) -> str:
        if index not in self._indices:
            raise KeyError(index)
        return self._names[self._numbers[index - self._first]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._numbers)

    def within(self, indices: range) -> "RowParts":
        """The parts of these rows alone."""
        begin = indices.start - self._first
        return RowParts(self._names, self._numbers[begin : begin + len(indices)], indices.start)

    @property
    def _indices(self) -> range:
        return range(self._first, self._first + len(self._numbers))
