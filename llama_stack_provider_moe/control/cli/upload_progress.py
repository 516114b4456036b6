"""What a user sees during an upload: a bar on a terminal, a line every ten seconds elsewhere, nothing with JSON."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from llama_stack_provider_moe.client.upload import Upload
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.control.cli.show import size

LINE_S = 10.0


@contextmanager
def shown(screen: Screen, upload: Upload) -> Iterator[Callable[[], None]]:
    """Show how far `upload` is; call the function that this yields after each piece."""
    if not screen.live:
        yield _Lines(screen, upload).tick
        return
    columns = [TextColumn("sending"), BarColumn(bar_width=None), TextColumn("{task.fields[told]}"), TimeElapsedColumn()]
    progress = Progress(*columns, console=screen.out, transient=True, expand=True)
    task = progress.add_task("", total=upload.total, told="")

    def tick() -> None:
        progress.update(task, completed=upload.done, told=told(upload))

    with screen.drawing(), progress:
        yield tick


class _Lines:
    def __init__(self, screen: Screen, upload: Upload) -> None:
        self._screen = screen
        self._upload = upload
        self._last = time.monotonic()

    def tick(self) -> None:
        if time.monotonic() - self._last >= LINE_S:
            self._last = time.monotonic()
            self._screen.note(f"sent {told(self._upload)}")


def told(upload: Upload) -> str:
    """Return how far an upload is, in words."""
    share = "" if upload.total is None else f" ({min(1.0, upload.done / upload.total):.0%})"
    whole = "" if upload.total is None or upload.counts_rows else f" of {size(upload.total)}"
    rows = "" if upload.rows is None else f", {upload.rows:,} rows"
    return f"{size(upload.sent_bytes)}{whole}{share}{rows}"
