"""The import graph as a drawing, made from the code: `python -m tests.contracts.rooms --write`."""

from collections.abc import Iterator
from html import escape

from tests.contracts.rooms import ROOMS, graph, tower

WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW = 1080, 118, 34, 78
# Left and right edge of each tower, in pixels.
_SPANS = {"compute": (20, 640), "control": (680, 1060), "ground": (20, 1060)}
_TITLES = {"compute": "compute/: training processes", "control": "control/: the server's side, no torch"}
_LEFT_OUT = ("", "provider", "errors")  # doors, and the error tree that every room imports


def rows() -> dict[str, list[list[str]]]:
    """Rooms of each tower by floor, the highest floor first."""
    found: dict[str, list[list[str]]] = {}
    for name in _SPANS:
        mine = [room for room in ROOMS if room not in _LEFT_OUT and tower(room) == name]
        floors = sorted({ROOMS[room].floor for room in mine}, reverse=True)
        found[name] = [[room for room in mine if ROOMS[room].floor == floor] for floor in floors]
    return found


def places() -> dict[str, tuple[float, float]]:
    """Centre of each room's box, in pixels; both towers stand on the same ground."""
    found: dict[str, tuple[float, float]] = {}
    all_rows = rows()
    highest = max(len(all_rows["compute"]), len(all_rows["control"]))
    for name, (left, right) in _SPANS.items():
        first = highest if name == "ground" else highest - len(all_rows[name])
        for number, row in enumerate(all_rows[name]):
            y = 70 + (first + number) * ROW
            for position, room in enumerate(row):
                found[room] = (left + (right - left) * (position + 0.5) / len(row), y)
    return found


def next_below(room: str) -> list[str]:
    """The rooms that `room` imports, without those that another of them imports too."""
    others = set(graph()[room])
    return sorted(other for other in others if not any(other in _below(one) for one in others - {other}))


def _below(room: str) -> set[str]:
    return {each for other in graph()[room] for each in {other, *_below(other)}}


def _lines() -> Iterator[str]:
    centres = places()
    height = round(max(y for _, y in centres.values()) + BOX_HEIGHT + 16)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">'
    )
    yield "<title>Rooms of the package, and which room imports which</title>"
    yield f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>'
    yield '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    yield '<path d="M0 0 8 4 0 8z" fill="#64748b"/></marker></defs>'
    for name, title in _TITLES.items():
        left, right = _SPANS[name]
        yield f'<text x="{(left + right) / 2}" y="28" text-anchor="middle" font-weight="600">{title}</text>'
    for room, (x, y) in centres.items():
        for other in next_below(room):
            if other in centres:
                to_x, to_y = centres[other]
                yield (
                    f'<path d="M{x:.0f} {y + BOX_HEIGHT / 2:.0f} C{x:.0f} {y + ROW * 0.6:.0f} {to_x:.0f} '
                    f'{to_y - ROW * 0.6:.0f} {to_x:.0f} {to_y - BOX_HEIGHT / 2 - 1:.0f}" fill="none" '
                    'stroke="#64748b" stroke-opacity="0.55" marker-end="url(#tip)"/>'
                )
    fills = {"compute": "#e0f2fe", "control": "#fef3c7", "ground": "#e2e8f0"}
    for room, (x, y) in centres.items():
        yield (
            f'<rect x="{x - BOX_WIDTH / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{BOX_WIDTH}" '
            f'height="{BOX_HEIGHT}" rx="6" fill="{fills[tower(room)]}" stroke="#475569"/>'
        )
        label = room.removeprefix(f"{tower(room)}.")
        yield f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" fill="#0f172a">{escape(label)}</text>'
    yield "</svg>"


def svg() -> str:
    """The drawing as the text of an SVG file."""
    return "\n".join(_lines()) + "\n"
