"""Images as people write them -> canonical parts, in the messages of a row of any format.

In user messages: OpenAI's `image_url` with a `data:` URL and `image_file` with the id of an uploaded file; parts
`{"type": "image"}` that take the row's `images` (or `image`) in order, as TRL's and Hugging Face's data sets have them.
Where all contents are texts, a row's images go before the first user's text, as TRL puts them, or before a prompt that
is a text.
`image_url` may have a `detail`, which is ignored: the model's processor decides the resolution.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Final, cast

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.spec.rows.image_files import BadImage, read_image
from llama_stack_provider_moe.spec.rows.image_urls import FORM, UrlReader, UrlTaker, read_url
from llama_stack_provider_moe.spec.rows.images import ImageLimits, ImagePart, image_part
from llama_stack_provider_moe.spec.rows.values import BadRow, absent, blank

COLUMNS: Final = ("images", "image")  # of a row, in the order of its parts `{"type": "image"}`
_TYPES: Final = ("image_url", "image_file", "image")
_CONVERSATIONS: Final = ("messages", "prompt")  # columns whose first user's text gets the images of the row
_JSON_TEXTS: Final = ("messages", "dialog", "chat_completion_input")  # columns that may be JSON text
_IMAGE_TYPE: Final = re.compile(r'"image(?:_url|_file)?"')
_DETAILS: Final = (None, "auto", "low", "high")
_SEND: Final = "`moe-train data push --images FOLDER` sends the files that rows name"
_REMOTE: Final = re.compile(r"(?:https?|ftp|s3|gs):", re.IGNORECASE)
_NOT_FETCHED: Final = (
    "which this server does not fetch: an address could reach its own network, and may show another image tomorrow; "
    f"download it, and send {FORM}"
)
_OURS: Final = f"is a part that the server makes itself, of an image that came with the rows; send {FORM}"

Keep = Callable[[bytes, ImagePart], None]


class ImageDoor:
    """Takes the images of one data set's rows, and stores each once.

    Args:
        limits: of the server.
        keep: stores an image's bytes; called again for the same image.
        has: whether the data set has the image of a canonical part; None: no row may have such parts.
        fetch: the bytes of an uploaded file by its id; raises `BadImage`. None: nobody has uploaded files.
    """

    def __init__(
        self,
        limits: ImageLimits,
        keep: Keep,
        has: Callable[[ImagePart], bool] | None = None,
        fetch: Callable[[str], bytes] | None = None,
    ) -> None:
        self.limits = limits
        self._keep, self._has, self._fetch = keep, has, fetch
        self._prefix = f"moe-image:{secrets.token_hex(16)}:"
        self._taken: dict[str, ImagePart | str] = {}  # a part, or why it is none
        self._left_over = re.compile(re.escape(self._prefix.encode()) + rb"\d+")
        self._count = 0

    def taker(self) -> UrlTaker:
        """Return what takes the images out of a stream of rows; `converted` then knows what stands for them."""
        return UrlTaker(self.limits, self._refer)

    def converted(self, row: Mapping[str, object]) -> Mapping[str, object]:
        """Return the row with canonical parts; the same row if it has no images.

        Raises:
            BadRow: an image can't be taken.
        """
        for name in _JSON_TEXTS:
            if isinstance(text := row.get(name), str) and _is_text_of_images(text):
                raise BadRow(name, "is JSON text with an image; expected a list of messages, in JSON Lines or Parquet: "
                             "no image is read in a text, such as a cell of CSV")  # fmt: skip
        return _Row(self, row).converted() if _may_have_images(row) else row

    def whole(self, row: Mapping[str, object]) -> Mapping[str, object]:
        """As `converted`, of a row whose images `taker` may have taken; none may stay.

        Raises:
            BadRow: an image can't be taken.
        """
        waiting = bool(self._taken)
        made = self.converted(row)
        problem = self.left_over(json.dumps(made, default=str).encode()) if waiting else None
        if problem is not None:
            raise BadRow("row", problem)
        return made

    def left_over(self, line: bytes) -> str | None:
        """Return the problem of a row, as JSON, that still has an image which `taker` took; None if it has none."""
        found = self._left_over.findall(line)
        if not found:
            return None
        for reference in found:
            self._taken.pop(reference.decode(), None)
        return f"has a data: URL of an image where no image stands; {FORM} is read in parts of user messages"

    def of_url(self, url: str) -> ImagePart:
        """Return the part of a URL, or of what stands for it.

        Raises:
            BadImage: there is none.
        """
        if url.startswith(self._prefix):
            found = self._taken.pop(url, "is there twice")
            if isinstance(found, str):
                raise BadImage(found)
            return found
        if _REMOTE.match(url):
            raise BadImage(f"is {shorten(url)}, {_NOT_FETCHED}")
        if not url[:5].lower() == "data:":
            raise BadImage(f"is {shorten(url)}; expected {FORM}; {_SEND}")
        return self._kept(*read_url(url, self.limits))

    def of_bytes(self, content: bytes) -> ImagePart:
        """Return the part of a file's bytes.

        Raises:
            BadImage: jobs don't take such a file.
        """
        return self._kept(content, read_image(content, self.limits))

    def of_file(self, file_id: str) -> ImagePart:
        """Return the part of an uploaded file.

        Raises:
            BadImage: the file isn't here, or jobs don't take such a file.
        """
        if self._fetch is None:
            raise BadImage(f"is file {shorten(file_id)}, but files are not read here; send {FORM}; {_SEND}")
        return self.of_bytes(self._fetch(file_id))

    def of_ours(self, part: ImagePart) -> ImagePart:
        """Return a canonical part of a row that is stored already.

        Raises:
            BadImage: the data set does not have its image.
        """
        if self._has is None or not self._has(part):
            raise BadImage(_OURS)
        return part

    def _kept(self, content: bytes, part: ImagePart) -> ImagePart:
        self._keep(content, part)
        return part

    def _refer(self, reader: UrlReader) -> str:
        self._count += 1
        name = f"{self._prefix}{self._count}"
        try:
            self._taken[name] = self._kept(*reader.finish())
        except BadImage as bad:
            self._taken[name] = str(bad)
        return name


class _Row:
    """One row on its way through a door."""

    def __init__(self, door: ImageDoor, row: Mapping[str, object]) -> None:
        self._door = door
        self._row = row
        self._images = 0
        columns = [name for name in COLUMNS if not _says_nothing(row.get(name))]
        if len(columns) > 1:
            raise BadRow(columns[1], f"is beside {columns[0]}; keep one of them")
        self._column = columns[0] if columns else None
        self._waiting = self._of_column()

    def converted(self) -> Mapping[str, object]:
        others = {name: value for name, value in self._row.items() if name not in COLUMNS}
        made = {name: self._column_of(name, value) for name, value in others.items()}
        if self._column is not None:
            if not self._images:
                made = self._before_text(made)
            left = sum(1 for _ in self._waiting)
            if left:
                raise BadRow(self._column, f"has {number_of(self._images + left, 'image')}, but the user messages have "
                             f"{number_of(self._images, 'part')} of type image; each image needs its "
                             '{"type": "image"}')  # fmt: skip
        return made if self._images else self._row

    def _before_text(self, row: Mapping[str, object]) -> dict[str, object]:
        """The row with all images of its column before its first user's text, if contents are texts alone."""
        assert self._column is not None
        name = next((each for each in _CONVERSATIONS if isinstance(row.get(each), list)), None)
        messages = cast("list[object]", row[name]) if name is not None else []
        if name is None and isinstance(row.get("prompt"), str) and not any(map(_has_messages, row.values())):
            name, messages = "prompt", [{"role": "user", "content": row["prompt"]}]
        asked = [at for at, each in enumerate(messages) if isinstance(each, Mapping) and each.get("role") == "user"]
        contents = [cast("Mapping[str, object]", messages[at]).get("content") for at in asked]
        if name is None or not asked or not all(isinstance(content, str) for content in contents):
            return dict(row)
        value = self._row[self._column]
        images = len(value) if isinstance(value, list | tuple) else 1
        where = f"{name}[{asked[0]}].content"
        parts = [self._part({"type": "image"}, "user", where) for _ in range(images)]
        first = cast("Mapping[str, object]", messages[asked[0]])
        text = {"type": "text", "text": contents[0]}
        made = [{**first, "content": [*parts, text]} if at == asked[0] else each for at, each in enumerate(messages)]
        return {**row, name: made}

    def _of_column(self) -> Iterator[tuple[str, object]]:
        if self._column is None:
            return iter(())
        value = self._row[self._column]
        if isinstance(value, list | tuple):
            return iter([(f"{self._column}[{index}]", each) for index, each in enumerate(value)])
        return iter([(self._column, value)])

    def _column_of(self, name: str, value: object) -> object:
        if isinstance(value, list | tuple):
            return [self._message(each, f"{name}[{index}]") for index, each in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        if name == "input" and isinstance(said := value.get("messages"), list | tuple):  # OpenAI's preferences
            turns = [self._message(each, f"input.messages[{index}]") for index, each in enumerate(said)]
            return {**value, "messages": turns}
        return self._message(value, name)

    def _message(self, message: object, where: str) -> object:
        if not isinstance(message, Mapping) or "role" not in message:
            return message
        content = message.get("content")
        parts = [content] if isinstance(content, Mapping) else content
        if not isinstance(parts, list | tuple):
            return message
        role = message["role"]
        made = [self._part(part, role, f"{where}.content[{index}]") for index, part in enumerate(parts)]
        return {**message, "content": made}

    def _part(self, part: object, role: object, where: str) -> object:
        if not isinstance(part, Mapping) or part.get("type") not in _TYPES:
            return part
        if role != "user":
            raise BadRow(where, f"is an image in a message of role {shorten(role)}; only user messages have images")
        self._images += 1
        most = self._door.limits.per_row
        if self._images > most:
            raise BadRow(where, f"is image {most + 1} of its row; expected at most {most} (`images.per_row` of this "
                         "server)")  # fmt: skip
        try:
            return self._found(part, where)
        except BadImage as bad:
            raise BadRow(where, str(bad)) from None

    def _found(self, part: Mapping[object, object], where: str) -> ImagePart:
        given = {key: value for key, value in part.items() if key != "type" and not absent(value)}
        if part["type"] == "image_url":
            return self._of_url(given, where)
        if part["type"] == "image_file":
            file = given.get("image_file")
            file_id = file.get("file_id") if isinstance(file, Mapping) else None
            if not isinstance(file_id, str):
                raise BadRow(where, f'names no uploaded file; expected {{"image_file": {{"file_id": ...}}}}; {_SEND}')
            return self._door.of_file(file_id)
        ours = image_part(part)
        if ours is not None:
            return self._door.of_ours(ours)
        if not given:
            place, value = next(self._waiting, (None, None))
            if place is None:
                raise BadRow(where, f"is an image without its bytes; expected {FORM}, or the image in the row's column "
                             "images")  # fmt: skip
            try:
                return self._of_value(value, place)
            except BadImage as bad:
                raise BadRow(place, str(bad)) from None
        if set(given) == {"image"}:
            return self._of_value(given["image"], where)
        raise BadRow(where, f"is an image with {shorten(sorted(map(str, given)))}; expected image_url with {FORM}; "
                     f"{_SEND}")  # fmt: skip

    def _of_url(self, given: Mapping[object, object], where: str) -> ImagePart:
        value = given.get("image_url")
        if isinstance(value, Mapping):
            detail, url = value.get("detail"), value.get("url")
            if detail not in _DETAILS:
                raise BadRow(f"{where}.image_url.detail", f"is {shorten(detail)}; expected auto, low, high (ignored) "
                             "or none")  # fmt: skip
        else:
            url = value
        if not isinstance(url, str):
            raise BadRow(where, f"has no url; expected {FORM}")
        return self._door.of_url(url)

    def _of_value(self, value: object, where: str) -> ImagePart:
        """An image of a column: a URL, or an object with its bytes, as Parquet files have them."""
        if isinstance(value, Mapping):
            content = value.get("bytes")
            if isinstance(content, bytes | bytearray):
                return self._door.of_bytes(bytes(content))
            value = value.get("url") or value.get("path")
        if not isinstance(value, str):
            raise BadRow(where, f"is not text; expected {FORM}; {_SEND}, and the bytes in Parquet files")
        return self._door.of_url(value)


def _says_nothing(value: object) -> bool:
    return absent(value) or blank(value)


def _has_messages(value: object) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(each, Mapping) and "role" in each for each in value)


def _is_text_of_images(text: str) -> bool:
    """Whether a text is a list of messages as JSON, of which one has a part that is an image."""
    if not (text.lstrip().startswith("[") and _IMAGE_TYPE.search(text)):
        return False
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):  # whoever reads the text says what is wrong with it
        return False
    parts = [part for each in messages if isinstance(each, Mapping) and isinstance(each.get("content"), list)
             for part in each["content"]]  # fmt: skip
    return any(isinstance(part, Mapping) and part.get("type") in _TYPES for part in parts)


def _may_have_images(row: Mapping[str, object]) -> bool:
    """Whether a row has a column or a part that `_Row` looks at; most rows have none, and stay as they are."""
    return any(not _says_nothing(row.get(name)) for name in COLUMNS) or any(map(_has_parts, row.values()))


def _has_parts(value: object) -> bool:
    if isinstance(value, Mapping):
        content = value.get("content")
        return isinstance(content, list | tuple | Mapping) or _has_parts(value.get("messages"))
    if not isinstance(value, list | tuple):
        return False
    return any(isinstance(each, Mapping) and isinstance(each.get("content"), list | tuple | Mapping) for each in value)
