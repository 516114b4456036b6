"""control/server/route_table.py: what a host's start asks of our routes, made from the routes themselves.

python -m tests.contracts.route_table
"""

import subprocess
import sys
from pathlib import Path

from llama_stack_provider_moe.control.server import routes as server_routes
from llama_stack_provider_moe.control.server.late_routes import Row, rows_of
from llama_stack_provider_moe.control.server.routes import OLDER_PREFIX, PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.contracts.rooms import PACKAGE, ROOT

FILE = ROOT / PACKAGE / "control" / "server" / "route_table.py"
HEAD = '''"""What a host's start asks of our routes (`late_routes`), made by `python -m tests.contracts.route_table`."""

from llama_stack_provider_moe.control.server.late_routes import Row

# One of them begins each path. The routes of the first two are the same.
PREFIXES = {prefixes!r}
_TWICE = PREFIXES[:2]
_UNDER_BOTH = (
{under}
)
_PROMETHEUS = {prometheus}
_OTHERS = (
{others}
)


def rows(prometheus: bool) -> list[Row]:
    """Return the table.

    Args:
        prometheus: whether the server has the route for Prometheus.
    """
    under = (*_UNDER_BOTH, _PROMETHEUS) if prometheus else _UNDER_BOTH
    return [*(row._replace(path=prefix + row.path) for prefix in _TWICE for row in under), *_OTHERS]
'''


def real(prometheus: bool) -> list[Row]:
    """The rows of the routes themselves."""
    return rows_of(server_routes.create_router(PostTrainingService(ProviderConfig(prometheus=prometheus), {})))


def text() -> str:
    """What the file must be."""
    everything, usual = real(prometheus=True), real(prometheus=False)
    under = [row._replace(path=row.path.removeprefix(PREFIX)) for row in usual if row.path.startswith(PREFIX + "/")]
    others = [row for row in usual if not row.path.startswith((PREFIX + "/", OLDER_PREFIX + "/"))]
    (measured,) = [row for row in everything if row not in usual and row.path.startswith(PREFIX + "/")]
    prefixes = (PREFIX, OLDER_PREFIX, *dict.fromkeys(_beginning(row.path) for row in others))
    written = HEAD.format(
        prefixes=prefixes,
        under="\n".join(f"        {_written(row)}," for row in under),
        prometheus=_written(measured._replace(path=measured.path.removeprefix(PREFIX))),
        others="\n".join(f"        {_written(row)}," for row in others),
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("ruff"), "format", "--stdin-filename", FILE, "-"],
        input=written, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def _beginning(path: str) -> str:
    return "/".join(path.split("/")[: 3 if path.startswith("/v1/") else 2])


def _written(row: Row) -> str:
    public = ", is_public=True" if row.is_public else ""
    return f"Row({row.path!r}, {row.methods!r}, {row.name!r}{public})"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
