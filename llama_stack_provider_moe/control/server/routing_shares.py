"""The share of every expert of every layer over a job's last steps: what two jobs are compared by.

One step routes few tokens, so its shares vary by chance. The mean of some steps varies less.
"""

import os
import re
from pathlib import Path

from llama_stack_provider_moe.control.server.wire_overview import RoutingShares
from llama_stack_provider_moe.ground.small_files import open_regular
from llama_stack_provider_moe.jobdir.events import Routing

STEPS = 16  # whose mean is taken
WINDOW_BYTES = 16 << 20  # of the end of the file; 16 steps of 48 layers with 128 experts take 3 MB
_TYPE = re.compile(rb'"type":\s*"(routing|resumed)"\s*,\s*"step":\s*(\d{1,18})')
_HEAD_BYTES = 256  # our own writer puts type and step before the tables


def shares(job_id: str, path: Path) -> RoutingShares:
    """Return the mean shares of the last steps that have routing tables; without any, lists are empty.

    Args:
        job_id: the job.
        path: the file with its events; a missing one has none.
    """
    tables = _last(path)
    layers = [each.layer for each in tables[0].layers] if tables else []
    widths = [len(each.share) for each in tables[0].layers] if tables else []
    # A job that was resumed with another layout has tables of other sizes before it.
    alike = [
        each
        for each in tables
        if [(one.layer, len(one.share)) for one in each.layers] == list(zip(layers, widths, strict=True))
    ]
    means = [
        [sum(table.layers[row].share[expert] for table in alike) / len(alike) for expert in range(width)]
        for row, width in enumerate(widths)
    ]
    return RoutingShares(job_uuid=job_id, steps=[each.step for each in reversed(alike)], layers=layers, share=means)


def _last(path: Path) -> list[Routing]:
    """The last tables, the newest first, without those that a resumption has undone."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return []
    with file:
        start = max(0, file.seek(0, os.SEEK_END) - WINDOW_BYTES)
        file.seek(start)
        # The last piece is still being written; the first one may have begun before the window.
        lines = file.read(WINDOW_BYTES).split(b"\n")[1 if start else 0 : -1]
    found: list[Routing] = []
    below: float = float("inf")  # only steps before this one count
    for line in reversed(lines):
        head = _TYPE.search(line[:_HEAD_BYTES])
        if head is None or len(found) == STEPS:
            continue
        step = int(head[2])
        if head[1] == b"resumed":
            below = min(below, step + 1)
        elif step < below:
            try:
                table = Routing.model_validate_json(line)
            except ValueError:  # a line that a full disk cut short
                continue
            below = step
            if table.layers:
                found.append(table)
    return found
