"""How a job's routers used their experts over its steps, thinned to a number of columns that a picture can show.

A long job of a large model has hundreds of megabytes of routing tables; only the tables that are shown are parsed.
"""

from pathlib import Path

from llama_stack_provider_moe.control.server.event_index import events_at, index_of
from llama_stack_provider_moe.control.server.wire_overview import RoutingSeries
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.events import LayerRouting, Routing


def series(job_id: str, path: Path, layer: int | None, limit: int) -> RoutingSeries:
    """Return the balance of every layer, and the shares of the experts of one layer.

    Args:
        job_id: the job.
        path: the file with its events.
        layer: the layer whose experts are shown; None: the first one.
        limit: largest number of steps; the last one is always included.

    Raises:
        InvalidInput: the model has no experts in that layer.
    """
    with index_of(path) as (index, _):
        places = index.routing.thinned(-1, limit)
    found = [each for each in events_at(path, places, Routing) if each.layers]
    numbers = [each.layer for each in found[0].layers] if found else []
    if found and numbers and layer is not None and layer not in numbers:
        raise InvalidInput("layer", layer, f"a layer with experts: {', '.join(map(str, numbers))}")
    row = 0 if layer is None or layer not in numbers else numbers.index(layer)
    # A job that was resumed with another layout would have rows of other lengths.
    found = [each for each in found if [one.layer for one in each.layers] == numbers]
    by_layer: list[list[LayerRouting]] = [[each.layers[index] for each in found] for index in range(len(numbers))]
    experts = len(by_layer[row][0].share) if by_layer else 0
    return RoutingSeries(
        job_uuid=job_id,
        steps=[each.step for each in found],
        layers=numbers,
        experts=experts,
        cv=[[one.cv for one in line] for line in by_layer],
        dead=[[one.dead for one in line] for line in by_layer],
        largest=[[one.max for one in line] for line in by_layer],
        layer=numbers[row] if numbers else None,
        share=[[one.share[expert] for one in by_layer[row]] for expert in range(experts)] if by_layer else [],
    )
