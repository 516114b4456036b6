"""A job's first and last evaluation, without reading its events again and again.

Pages ask how a running job stands every few seconds, and its evaluations may be far apart in a long file. What was read
once is remembered, so that later calls read what was appended since.
"""

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from llama_stack_provider_moe.jobdir.events import Evaluation
from llama_stack_provider_moe.jobdir.scan import scan

# The first evaluation is near the beginning of the file, unless the untrained model was not evaluated; the last one is
# among the events of the last epoch. Only these windows of a file that is new here are searched.
HEAD_BYTES = 4 << 20
TAIL_BYTES = 16 << 20
OVERLAP_BYTES = 64 << 10  # longer than an evaluation, whose line may not have been complete
_KEPT = 512
_lock = Lock()
_known: "OrderedDict[Path, _Scanned]" = OrderedDict()


class _Scanned(NamedTuple):
    """What was found in the first `size_bytes` of a file."""

    inode: int
    size_bytes: int
    first: Evaluation | None
    last: Evaluation | None


def first_and_last(path: Path) -> tuple[Evaluation | None, Evaluation | None]:
    """Return the first and the last evaluation in a file of events; None where there is none, or it is not found."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None, None
    with _lock:
        before = _known.get(path)
    if before is None or before.inode != found.st_ino or before.size_bytes > found.st_size:
        first = next(scan(path, Evaluation, limit_bytes=HEAD_BYTES), None)
        start = max(0, found.st_size - TAIL_BYTES)
    else:
        first = before.first
        start = max(0, before.size_bytes - OVERLAP_BYTES, found.st_size - TAIL_BYTES)
    last = before.last if before is not None and before.inode == found.st_ino else None
    for event in scan(path, Evaluation, start=start, limit_bytes=TAIL_BYTES):
        first, last = first or event, event
    last = last or first
    with _lock:
        _known[path] = _Scanned(found.st_ino, found.st_size, first, last)
        _known.move_to_end(path)
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return first, last
