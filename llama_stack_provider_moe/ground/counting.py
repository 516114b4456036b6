"""Numbers of things in text: `1 thread`, `2 threads`."""


def number_of(count: int, one: str, several: str | None = None) -> str:
    """Return how many of something there are.

    >>> number_of(1, "process", "processes"), number_of(2000, "thread")
    ('1 process', '2,000 threads')

    Args:
        count: how many.
        one: the word for one.
        several: the word for more than one or none; left out: `one` with an s.
    """
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"
