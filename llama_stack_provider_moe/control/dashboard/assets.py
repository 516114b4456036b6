"""The files that pages load: ours from this package, and Plotly.js from the `plotly` wheel if that is installed."""

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

_STATIC = files("llama_stack_provider_moe.control.dashboard").joinpath("static")
PLOTLY = "plotly.min.js"
MEDIA_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_LEAST_ZIPPED_BYTES = 1024


@dataclass(frozen=True)
class Asset:
    """A file, ready to send.

    Attributes:
        content: its bytes.
        zipped: the same with gzip; None where that saves nothing.
        media_type: value of Content-Type.
        etag: quoted checksum, for `If-None-Match`.
    """

    content: bytes
    zipped: bytes | None
    media_type: str
    etag: str


def has_plotly() -> bool:
    """Return whether the charts' library is installed."""
    return _plotly_file() is not None


@lru_cache(64)
def asset(name: str) -> Asset | None:
    """Return a file by its name; None if pages have no such file. The first call for Plotly.js zips for a second."""
    suffix = Path(name).suffix
    # The name is looked up in a list, so that no path leads elsewhere.
    if name == PLOTLY:
        found = _plotly_file()
        content = None if found is None else found.read_bytes()
    elif suffix in MEDIA_TYPES and name in {each.name for each in _STATIC.iterdir()}:
        content = _STATIC.joinpath(name).read_bytes()
    else:
        content = None
    if content is None:
        return None
    zipped = gzip.compress(content, 6, mtime=0) if len(content) >= _LEAST_ZIPPED_BYTES else None
    return Asset(content, zipped, MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _plotly_file() -> Path | None:
    # Without importing it: that would take a second and pull in what only Python charts need.
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "package_data" / PLOTLY
    return path if path.is_file() else None
