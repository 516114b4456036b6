"""`data/<part>.domains` in a job's folder: the domain of each row, where a column of the rows names it.

The first line is a JSON list with the domains' names; after it, there is one byte for each row, the index of its
domain. While the server reads rows, it does not know all names yet: it writes the bytes to a file of their own, and
joins both in the end.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.errors import DataError

_CHUNK = 1 << 20


class DomainsOfRows(NamedTuple):
    """The domain of each row of a part.

    Attributes:
        names: of the domains.
        numbers: for each row, the index of its domain.
    """

    names: tuple[str, ...]
    numbers: bytes


def join(numbers: Path, names: tuple[str, ...], path: Path) -> None:
    """Write the file from the bytes in `numbers`, which is deleted.

    Args:
        numbers: file with one byte for each row.
        names: of the domains.
        path: the file to write.
    """
    with path.open("xb") as out, numbers.open("rb") as rows:
        out.write(json.dumps(names).encode() + b"\n")
        shutil.copyfileobj(rows, out, _CHUNK)
    path.chmod(numbers.stat().st_mode & 0o777)
    numbers.unlink()


def read(path: Path) -> DomainsOfRows:
    """Read the file.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        head, _, numbers = path.read_bytes().partition(b"\n")
        names = json.loads(head)
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name}: the domains of the rows can't be read ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path.name}: expected a list of domains in its first line")
    if numbers and max(numbers) >= len(names):
        raise DataError(f"{path.name}: a row has domain {max(numbers)}; expected 0 to {len(names) - 1}")
    return DomainsOfRows(tuple(names), numbers)
