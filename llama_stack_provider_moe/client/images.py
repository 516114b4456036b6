"""Image files that rows name -> `data:` URLs in the rows, as the server takes them.

A folder, or a tar file that is not compressed. A row names a file by its path in it:

    {"type": "image_file", "image_file": "cats/1.png"}     or {"path": "cats/1.png"} instead of the text
    {"type": "image", "image": "cats/1.png"}               or "path" instead of "image"
    {"type": "image_url", "image_url": {"url": "cats/1.png"}}
    {"images": ["cats/1.png", ...]}                        a column, for parts {"type": "image"}; or "image"

Parquet files have the bytes themselves, in values {"bytes": ..., "path": ...} or alone in such a column.
"""

import base64
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from llama_stack_provider_moe.errors import InvalidBody, InvalidInput, shorten

OPTION = "--images"
_COLUMNS = ("images", "image")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_WEBP = slice(8, 12)
_MOST_BYTES = 100_000_000  # no server takes larger files

Read = Callable[[str, int], bytes]  # path of a file and number of its row -> its bytes


@contextmanager
def image_files(images: str | None) -> Iterator[Read | None]:
    """Open the files that rows name; None where there are none.

    Args:
        images: a folder or a tar file; None: rows name no files.

    Raises:
        InvalidInput: it is neither, or has entries other than plain files inside it.
    """
    if images is None:
        yield None
        return
    root = Path(images).expanduser()
    if root.is_dir():
        yield _of_folder(root.resolve())
        return
    if root.exists() and not root.is_file():  # a pipe would wait for its writer
        raise InvalidInput(OPTION, images, "a folder, or a tar file that is not compressed")
    try:
        with tarfile.open(root, "r:") as tar:
            yield _of_tar(tar, _members(tar, images))
    except (OSError, tarfile.TarError) as error:
        raise InvalidInput(OPTION, images, f"a folder, or a tar file that is not compressed ({error})") from None


def inlined(row: Mapping[str, object], number: int, read: Read | None) -> dict[str, object]:
    """Return a row with its images as `data:` URLs.

    Args:
        row: the row.
        number: its number from 1, for errors.
        read: reads the files that it names; None: only bytes become URLs.

    Raises:
        InvalidInput: the file is missing or isn't an image.
    """
    row_of = _Row(number, read)
    return {name: row_of.column(name, value) for name, value in row.items()}


class Faults:
    """What is wrong with rows' images: several are named at once, because each try sends the rows again.

    A file that is wrong in several rows is named once, with its first row.
    """

    MOST = 10

    def __init__(self) -> None:
        self._found: dict[object, InvalidInput] = {}  # by the file's name

    def __len__(self) -> int:
        return len(self._found)

    def inlined(self, row: Mapping[str, object], number: int, read: Read | None) -> dict[str, object] | None:
        """`inlined`, or None for a row with a fault and for each row after it.

        Raises:
            InvalidInput: this fault makes `MOST`.
        """
        try:
            done = inlined(row, number, read)
        except InvalidInput as error:
            self._found.setdefault(error.value, error)
            if len(self._found) == self.MOST:
                raise self._all(f"{self.MOST} faults; later rows were not read") from None
        return None if self._found else done

    def check(self) -> None:
        """Raise what was found, once all rows are read.

        Raises:
            InvalidInput: there are faults.
        """
        if self._found:
            raise self._all()

    def _all(self, *more: str) -> InvalidInput:
        first, *others = self._found.values()
        return InvalidBody([str(first), *map(str, others), *more]) if others else first


class _Row:
    def __init__(self, number: int, read: Read | None) -> None:
        self._number = number
        self._read = read

    def column(self, name: str, value: object) -> object:
        if name not in _COLUMNS:
            return self._walk(value)
        if isinstance(value, list):
            return [self._value(each) for each in value]
        return self._value(value)

    def _walk(self, value: object) -> object:
        if isinstance(value, list):
            return [self._walk(each) for each in value]
        if not isinstance(value, dict):
            return value
        if value.get("type") in ("image_file", "image_url", "image"):
            return self._part(value)
        return {key: self._walk(each) for key, each in value.items()}

    def _part(self, part: dict[str, object]) -> object:
        given = {key: value for key, value in part.items() if key != "type" and value is not None}
        value = given.get(str(part["type"]), given.get("path"))
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return {"type": "image_url", "image_url": self._value(value)}
        named = (value.get("path") or value.get("url")) if isinstance(value, dict) else value
        if not isinstance(named, str) or self._read is None or _ADDRESS.match(named):
            return part
        return {"type": "image_url", "image_url": {"url": self._url(self._read(named, self._number), named)}}

    def _value(self, value: object) -> object:
        """An item of a column of images."""
        if isinstance(value, bytes):
            return {"url": self._url(value, "its bytes")}
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
            if isinstance(content, bytes):
                return {"url": self._url(content, str(path or "its bytes"))}
            value = path if isinstance(path, str) else value
        if not isinstance(value, str) or self._read is None or _ADDRESS.match(value):
            return value
        return {"url": self._url(self._read(value, self._number), value)}

    def _url(self, content: bytes, name: str) -> str:
        if content.startswith(b"\x89PNG"):
            kind = "png"
        elif content.startswith(b"\xff\xd8"):
            kind = "jpeg"
        elif content[_WEBP] == b"WEBP":
            kind = "webp"
        else:
            place = "FILE" if self._read is None else OPTION
            raise InvalidInput(place, name, f"a PNG, JPEG or WebP image (row {self._number})")
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _checked(name: str, number: int) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise InvalidInput(OPTION, name, f"a path below the folder or in the tar file (row {number})")
    return path


def _of_folder(root: Path) -> Read:
    def read(name: str, number: int) -> bytes:
        path = root / _checked(name, number)
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(root) or not real.is_file():
                raise InvalidInput(OPTION, name, f"a file inside {root}, with no link out of it (row {number})")
            with real.open("rb") as file:
                return _whole(file, name, number)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or error
            raise InvalidInput(OPTION, name, f"a file in {root} that row {number} can name ({why})") from None

    return read


def _of_tar(tar: tarfile.TarFile, members: Mapping[PurePosixPath, tarfile.TarInfo]) -> Read:
    def read(name: str, number: int) -> bytes:
        member = members.get(_checked(name, number))
        file = None if member is None else tar.extractfile(member)
        if file is None:
            raise InvalidInput(OPTION, name, f"a file of the tar file (row {number})")
        with file:
            return _whole(file, name, number)

    return read


def _members(tar: tarfile.TarFile, images: str) -> dict[PurePosixPath, tarfile.TarInfo]:
    found = {}
    for member in tar:
        path = PurePosixPath(member.name)
        if not (member.isreg() or member.isdir()) or path.is_absolute() or ".." in path.parts:
            raise InvalidInput(OPTION, images, "a tar file of plain files and folders below its own; it has "
                               f"{shorten(member.name)}, a link, a device or a path out of it")  # fmt: skip
        if member.isreg():
            if path in found:
                raise InvalidInput(OPTION, images, "a tar file with each name once; it has "
                                   f"{shorten(member.name)} twice")  # fmt: skip
            found[path] = member
    return found


def _whole(file: IO[bytes], name: str, number: int) -> bytes:
    content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise InvalidInput(OPTION, name, f"an image of at most {_MOST_BYTES:,} bytes (row {number})")
    return content
