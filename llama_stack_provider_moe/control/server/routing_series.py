"""How a job's routers used their experts over its steps, thinned to a number of columns that a picture can show.

A long job of a large model has hundreds of megabytes of routing events; only those that are shown are parsed.
"""

from pathlib import Path

from llama_stack_provider_moe.control.server.event_index import index_of, placed_events
from llama_stack_provider_moe.control.server.wire_overview import RoutingSeries
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.events import Routing


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
        places, tables = index.routing.thinned(-1, limit), index.tables.thinned(-1, limit)
    events = dict(placed_events(path, sorted({*places, *tables}), Routing))
    in_steps = [(events[each].step, found) for each in places if each in events and (found := events[each].in_step())]
    numbers = in_steps[0][1].layer if in_steps else []
    if numbers and layer is not None and layer not in numbers:
        raise InvalidInput("layer", layer, f"a layer with experts: {', '.join(map(str, numbers))}")
    row = 0 if layer is None or layer not in numbers else numbers.index(layer)
    # A job that was resumed with another layout would have rows of other lengths.
    in_steps = [(step, found) for step, found in in_steps if found.layer == numbers]
    experts = in_steps[0][1].experts if in_steps else 0
    shown = [events[each] for each in tables if each in events and _layers(events[each]) == numbers]
    shown = [each for each in shown if numbers and len(each.layers[row].share) == experts]
    return RoutingSeries(
        job_uuid=job_id,
        steps=[step for step, _ in in_steps],
        layers=numbers,
        experts=experts,
        cv=[[found.cv[at] for _, found in in_steps] for at in range(len(numbers))],
        dead=[[found.dead[at] for _, found in in_steps] for at in range(len(numbers))],
        largest=[[found.max[at] for _, found in in_steps] for at in range(len(numbers))],
        layer=numbers[row] if numbers else None,
        share_steps=[each.step for each in shown],
        share=[[each.layers[row].share[expert] for each in shown] for expert in range(experts)],
    )


def _layers(event: Routing) -> list[int]:
    return [each.layer for each in event.layers]
