"""The share of every expert of every layer over a job's last steps: what two jobs are compared by.

One step routes few tokens, so its shares vary by chance. The mean of some steps varies less.
"""

from pathlib import Path

from llama_stack_provider_moe.control.server.event_index import events_at, index_of
from llama_stack_provider_moe.control.server.wire_overview import RoutingShares
from llama_stack_provider_moe.jobdir.events import Routing

STEPS = 16  # whose mean is taken, at least; one table may cover more


def shares(job_id: str, path: Path) -> RoutingShares:
    """Return the mean shares of the last steps that have routing tables; without any, lists are empty.

    Args:
        job_id: the job.
        path: the file with its events; a missing one has none.
    """
    tables = _last(path)
    covered = sum(each.steps for each in tables)
    means = [
        [sum(table.steps * table.layers[row].share[expert] for table in tables) / covered for expert in range(width)]
        for row, (_, width) in enumerate(_layout(tables[0]) if tables else [])
    ]
    return RoutingShares(
        job_uuid=job_id,
        steps=[each.step for each in reversed(tables)],
        covered=covered,
        layers=[each.layer for each in tables[0].layers] if tables else [],
        share=means,
    )


def _last(path: Path) -> list[Routing]:
    """The last tables, the newest first, until they cover enough steps."""
    with index_of(path) as (index, _):
        places = index.tables.newest(STEPS)
    found: list[Routing] = []
    for table in events_at(path, places, Routing):
        # A job that was resumed with another layout has tables of other sizes before it.
        if not found or _layout(table) == _layout(found[0]):
            found.append(table)
        if sum(each.steps for each in found) >= STEPS:
            break
    return found


def _layout(table: Routing) -> list[tuple[int, int]]:
    return [(each.layer, len(each.share)) for each in table.layers]
