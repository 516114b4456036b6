"""Work on the next item while the caller uses the one before."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager


@contextmanager
def ahead[T, Made](make: Callable[[T], Made], items: Iterable[T]) -> Iterator[Iterator[Made]]:
    """Give make(item) of each item, in order; while the caller has one, a thread makes the next.

    At most two results exist at a time, so `make` may use two buffers in turns. An error of `make` is raised where its
    result would be. The thread has ended when the `with` ends.
    """
    with closing(_made(make, items)) as made:
        yield made


def _made[T, Made](make: Callable[[T], Made], items: Iterable[T]) -> Generator[Made]:
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        before: Future[Made] | None = None
        for item in items:
            started = thread.submit(make, item)
            if before is not None:
                yield before.result()
            before = started
        if before is not None:
            yield before.result()
