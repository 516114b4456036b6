"""How a job's routers used their experts over its steps, thinned to a number of columns that a picture can show.

A long job of a large model has hundreds of megabytes of routing tables. One pass finds where each table is, without
parsing it; only the tables that are shown are parsed.
"""

import re
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.control.server import timeline
from llama_stack_provider_moe.control.server.wire_overview import RoutingSeries
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.small_files import open_regular
from llama_stack_provider_moe.jobdir.events import LayerRouting, Routing

# Our own writer puts the step before the tables; `"step":` inside a table can't be, for tables hold no text.
_STEP = re.compile(rb'"type":\s*"(routing|resumed)"\s*,\s*"step":\s*(\d{1,18})')
_HEAD_BYTES = 256


class _Place(NamedTuple):
    step: int
    start: int
    length: int


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
    found = _tables(path, _thinned(_places(path), limit))
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


def _places(path: Path) -> list[_Place]:
    """Where the tables are that count: a resumption undoes the steps after it."""
    places: list[_Place] = []
    offset = 0
    for line in timeline.lines(path):
        head = _STEP.search(line[:_HEAD_BYTES])
        if head is not None:
            step = int(head[2])
            kept = step if head[1] == b"resumed" else step - 1
            while places and places[-1].step > kept:
                places.pop()
            if head[1] == b"routing":
                places.append(_Place(step, offset, len(line)))
        offset += len(line)
    return places


def _thinned(places: list[_Place], limit: int) -> list[_Place]:
    if len(places) <= limit:
        return places
    if limit == 1:
        return places[-1:]
    return [places[round(index * (len(places) - 1) / (limit - 1))] for index in range(limit)]


def _tables(path: Path, places: list[_Place]) -> list[Routing]:
    if not places:
        return []
    found = []
    with open_regular(path) as file:
        for place in places:
            file.seek(place.start)
            try:
                table = Routing.model_validate_json(file.read(place.length))
            except ValueError:  # a line that a full disk cut short
                continue
            if table.layers:
                found.append(table)
    return found
