"""Results come in order, the next one is made meanwhile, and the thread ends with the `with`."""

import threading
from collections.abc import Iterator

import pytest

from llama_stack_provider_moe.compute.export.ahead import ahead


def test_the_next_result_is_made_while_the_caller_has_one() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(item: int) -> int:
        made.append(item)
        if item == 1:
            second.set()
        return 10 * item

    with ahead(make, range(4)) as results:
        assert next(results) == 0
        assert second.wait(60)
        assert made == [0, 1], "and not the one after it, whose buffer the caller still has"
        assert list(results) == [10, 20, 30]
    assert made == [0, 1, 2, 3]


def test_an_error_is_raised_where_its_result_would_be() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    with ahead(make, range(9)) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="two"):
            next(results)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_no_thread_is_left(taken: int) -> None:
    def items() -> Iterator[int]:
        yield from range(3)

    before = threading.active_count()
    with ahead(str, items()) as results:
        for _ in range(taken):
            next(results)
    assert threading.active_count() == before
