"""Images of rows: taken from the stream, checked by their structure, and named by hash; hostile ones are refused."""

import hashlib
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidRows, RowProblem
from llama_stack_provider_moe.spec import Recipe
from llama_stack_provider_moe.spec.recipes import RECIPES
from llama_stack_provider_moe.spec.row_files import MAX_ROW_BYTES, RowFile
from llama_stack_provider_moe.spec.row_sources import PAIRED
from llama_stack_provider_moe.spec.rows import canonical, conversation
from llama_stack_provider_moe.spec.rows.image_files import header
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.rows.images import ImageLimits, ImagePart, file_name, images_in
from tests.support.image_bytes import asked, chunk, jpeg, lossless, part, png, riff, segment, url, webp

Row = Mapping[str, Any]


class Store(dict[str, bytes]):
    """What a door kept, by the name of its file."""

    def keep(self, content: bytes, found: ImagePart) -> None:
        self[file_name(found["sha256"], found["format"])] = content

    def door(self, **limits: int) -> ImageDoor:
        return ImageDoor(ImageLimits(**limits), self.keep)


def read(text: bytes, store: Store, piece: int = 1 << 20, **limits: int) -> list[Row]:
    file = RowFile("mine", images=store.door(**limits))
    rows = [row for at in range(0, len(text), piece) for row in file.feed(text[at : at + piece])]
    return [row.content for row in [*rows, *file.finish()]]


def lines(*rows: Row) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parts_of(row: Row) -> list[Any]:
    return [each for each in row["messages"][0]["content"] if each["type"] == "image"]


KINDS = {"png": (png(5, 6), 5, 6), "jpeg": (jpeg(7, 8), 7, 8), "webp": (webp(9, 10), 9, 10)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_an_image_becomes_its_hash_and_its_bytes_are_kept(kind: str, piece: int) -> None:
    content, width, height = KINDS[kind]
    store = Store()
    (row,) = read(lines(asked(part(content, kind))), store, piece)
    sha256 = hashlib.sha256(content).hexdigest()
    expected = {"type": "image", "sha256": sha256, "format": kind, "width": width, "height": height}
    assert parts_of(row) == [expected]
    assert store == {f"{sha256}.{'jpg' if kind == 'jpeg' else kind}": content}
    made = canonical(row, 1, "sft", "auto")
    assert not isinstance(made, RowProblem)
    assert images_in(made) == [expected]


def test_the_same_image_is_kept_once_and_rows_without_images_stay_as_they_are() -> None:
    store = Store()
    plain = {
        "messages": [{"role": "user", "content": "data:image/png;base64,?"}, {"role": "assistant", "content": "y"}]
    }
    rows = read(lines(asked(part()), plain, asked(part(), part(png(colour=9)))), store)
    assert rows[1] == plain
    assert len(store) == 2
    assert parts_of(rows[0])[0] == parts_of(rows[2])[0] != parts_of(rows[2])[1]


def test_a_row_is_as_large_as_its_text() -> None:
    large = png(1200, 900, extra=chunk(b"teXt", bytes(6 << 20)))
    (row,) = read(lines(asked(part(large), part(large))), Store(), piece=1 << 16)
    assert len(parts_of(row)) == 2
    with pytest.raises(InvalidRows, match="has more than"):
        read(lines(asked(part(), text="x" * MAX_ROW_BYTES)), Store())


def test_writers_that_escape_slashes_and_put_spaces() -> None:
    store = Store()
    text = json.dumps(asked(part()), separators=(" , ", " : ")).replace("/", "\\/").encode() + b"\n"
    (row,) = read(text, store, piece=5)
    assert len(parts_of(row)) == len(store) == 1


COLUMNS: dict[str, Callable[[str], Row]] = {
    "images": lambda one: asked({"type": "image"}) | {"images": [one]},
    "objects": lambda one: asked({"type": "image"}) | {"images": [{"url": one, "path": "a.png"}]},
    "image": lambda one: asked({"type": "image"}) | {"image": one},
    "in the part": lambda one: asked({"type": "image", "image": one}),
    "a text as image_url": lambda one: asked({"type": "image_url", "image_url": one}),
    "detail": lambda one: asked({"type": "image_url", "image_url": {"url": one, "detail": "high"}}),
}


@pytest.mark.parametrize("form", COLUMNS)
def test_forms_of_other_data_sets_give_the_same_row(form: str) -> None:
    (row,) = read(lines(COLUMNS[form](url(png()))), Store())
    (usual,) = read(lines(asked(part())), Store())
    assert row == usual


BOMB = png(20_000, 20_000, rows=1)
CUT = png(colour=77)[:-16]
GARBAGE = "data:image/png;base64,iVBO*Rw0K"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'
MOVING = riff((b"VP8X", b"\x02" + bytes(9)), (b"ANIM", bytes(6)))
HOSTILE: dict[str, tuple[Any, str]] = {
    "a bomb": (part(BOMB), "is an image of 20,000 x 20,000 pixels; expected at most 40,000,000 in all"),
    "a truncated PNG": (part(CUT), "is a PNG image whose file is cut short"),
    "a PNG without IEND": (part(png()[:-12]), "is an image whose file is cut short"),
    "a PNG with a changed byte": (
        part(png()[:20] + b"\x09" + png()[21:]), "is a PNG image with damage: chunk 'IHDR' has another checksum"
    ),
    "a PNG without its palette": (
        part(png()[:25] + b"\3" + png()[26:29] + struct.pack(">I", zlib.crc32(png()[12:25] + b"\3" + png()[26:29]))
             + png()[33:]),
        "is a PNG image with damage: its colours are those of a palette",
    ),
    "an animated PNG": (part(png(extra=chunk(b"acTL", bytes(8)))), "is an animated PNG image"),
    "a PNG with more behind it": (part(png() + b"PK\3\4"), "is a PNG image with 4 bytes behind its end"),
    "a PNG of no width": (part(png(0, 5)), "is an image of 0 x 5 pixels; expected at least one"),
    "a truncated JPEG": (part(jpeg(end=b""), "jpeg"), "is a JPEG image whose file is cut short"),
    "a JPEG without data": (
        part(b"\xff\xd8" + segment(0xE0, b"JFIF\0") + b"\xff\xd9", "jpeg"), "is a JPEG image without data"
    ),
    "a lossless JPEG": (part(jpeg(frame=0xC3), "jpeg"), "is a JPEG image of a rare kind (SOF3)"),
    "a JPEG bomb": (part(jpeg(65_000, 65_000), "jpeg"), "is an image of 65,000 x 65,000 pixels"),
    "a truncated WebP": (part(webp()[:-2], "webp"), "is a WebP image whose file is cut short"),
    "an animated WebP": (part(MOVING, "webp"), "is an animated WebP image"),
    "a WebP whose header lies": (
        part(riff((b"VP8X", bytes(10)), lossless(9, 9)), "webp"),
        "is a WebP image whose header has (1, 1) pixels, and its data (9, 9)",
    ),
    "SVG": (part(url(SVG, "svg+xml")), "is SVG, a drawing and not pixels"),
    "SVG called PNG": (part(SVG), "is SVG, a drawing and not pixels; expected PNG, JPEG or WebP"),
    "a GIF": (part("data:image/gif;base64,R0lGODlhAQ=="), "is of type 'image/gif'; expected image/png"),
    "wrong magic": (part(b"\0" * 40), "has no signature of an image"),
    "a JPEG called PNG": (part(jpeg()), "says that it is png, but its bytes are jpeg"),
    "base64 garbage": (part(GARBAGE), "is not base64 without gaps"),
    "half a group of base64": (part("data:image/png;base64,iVBORw0"), "is not base64: it ends in the middle"),
    "an http address": (
        part("http://169.254.169.254/latest/x.png"), "is 'http://169.254.169.254/latest/x.png', which this server "
        "does not fetch: an address could reach its own network",
    ),
    "a file of the server": (part("file:///etc/passwd"), "is 'file:///etc/passwd'; expected data:image/png;base64"),
    "a part of our own": (
        {"type": "image", "sha256": "a" * 64, "format": "png", "width": 1, "height": 1},
        "is a part that the server makes itself",
    ),
    "an uploaded file that nobody reads": (
        {"type": "image_file", "image_file": {"file_id": "file-1"}}, "is file 'file-1', but files are not read here"
    ),
    "an image without bytes": ({"type": "image"}, "is an image without its bytes"),
    "an empty file": (part("data:image/png;base64,"), "is an empty file"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_refused_with_its_row_and_part(name: str) -> None:
    hostile, reason = HOSTILE[name]
    store = Store()
    text = lines(asked(part()), asked(part(), hostile))
    with pytest.raises(InvalidRows) as refused:
        read(text, store, piece=1000)
    (problem,) = refused.value.problems
    assert (problem.row, problem.field) == (2, "messages[0].content[1]")
    assert problem.reason.startswith(reason), problem.reason
    assert len(store) == 1, "a refused image was stored"


@pytest.mark.parametrize("role", ["assistant", "system", "tool"])
def test_only_user_messages_have_images(role: str) -> None:
    row = asked(part())
    row["messages"].insert(1, {"role": role, "content": [part()]})
    with pytest.raises(InvalidRows) as refused:
        read(lines(row), Store())
    (problem,) = refused.value.problems
    assert problem.field == "messages[1].content[0]"
    assert problem.reason == f"is an image in a message of role '{role}'; only user messages have images"


def test_limits_are_those_of_the_server() -> None:
    with pytest.raises(InvalidRows, match=r"content\[2\]: is image 3 of its row; expected at most 2"):
        read(lines(asked(part(), part(), part())), Store(), per_row=2)
    with pytest.raises(InvalidRows, match=r"is an image of more than 2,000 bytes \(`images.max_bytes`"):
        read(lines(asked(part(png(extra=chunk(b"teXt", bytes(3000)))))), Store(), max_bytes=2000)
    with pytest.raises(InvalidRows, match="expected at most 3 in all"):
        read(lines(asked(part())), Store(), max_pixels=3)


def test_images_beyond_the_limit_are_not_stored() -> None:
    store = Store()
    with pytest.raises(InvalidRows, match=r"content\[2\]: is image 3 of its row"):
        read(
            lines(asked(part()), asked(*[part(png(colour=number)) for number in range(9)])), store, piece=50, per_row=2
        )
    assert len(store) == 2


def test_counts_of_the_column_and_the_parts_must_agree() -> None:
    with pytest.raises(InvalidRows, match="images: has 2 images, but the user messages have 1 part of type image"):
        read(lines(asked({"type": "image"}) | {"images": [url(png())] * 2}), Store())
    with pytest.raises(InvalidRows, match="image: is beside images; keep one of them"):
        read(lines(asked() | {"images": [url(png())], "image": url(png())}), Store())


def test_images_stand_before_the_first_users_text_where_contents_are_texts() -> None:
    """As TRL puts them; a later turn of the user stays a text, and one list of parts asks for placeholders."""
    store, images = Store(), [url(png()), url(png(colour=9))]
    talk = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "Red."}, {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Blue."},
    ]  # fmt: skip
    (row,) = read(lines({"messages": talk, "images": images}), store)
    (usual,) = read(lines(asked({"type": "image"}, {"type": "image"}, text="Which?") | {"images": images}), Store())
    assert row["messages"][1] == usual["messages"][0]
    assert [row["messages"][at] for at in (0, 2, 3, 4)] == [talk[at] for at in (0, 2, 3, 4)]
    assert "images" not in row
    (pair,) = read(lines({"prompt": talk[:2], "chosen": "Red.", "rejected": "No.", "image": images[0]}), store)
    assert pair["prompt"] == [
        talk[0],
        {"role": "user", "content": [*parts_of(usual)[:1], usual["messages"][0]["content"][2]]},
    ]
    assert len(store) == 2
    with pytest.raises(InvalidRows) as refused:
        read(lines(*[{"messages": talk, "images": images * 6}] * 2), store)
    assert [(each.row, each.field) for each in refused.value.problems] == [
        (1, "messages[1].content"),
        (2, "messages[1].content"),
    ]
    assert refused.value.problems[0].reason.startswith("is image 11 of its row; expected at most 10")
    listed = [*talk[:3], {"role": "user", "content": [{"type": "text", "text": "And now?"}]}, talk[4]]
    with pytest.raises(InvalidRows, match="row 2: images: has 2 images, but the user messages have 0 parts of type"):
        read(lines({"messages": talk}, {"messages": listed, "images": images}), store)
    with pytest.raises(InvalidRows, match="row 1: images: has 2 images, but the user messages have 0 parts of type"):
        read(lines({"messages": talk[::2], "images": images}), store)


PROMPTS: dict[str, Any] = {
    "a prompt": {"prompt": "What is it?", "completion": "A square."},
    "a pair": {"prompt": "What is it?", "chosen": "A square.", "rejected": "A disc."},
}


@pytest.mark.parametrize("form", PROMPTS)
def test_images_stand_before_a_prompt_of_text(form: str) -> None:
    """As in most data sets of questions about images; an answer may not be a conversation that has the prompt again."""
    row = PROMPTS[form]
    (found,) = read(lines(row | {"image": url(png())}), Store())
    (usual,) = read(lines(asked(part())), Store())
    assert found == row | {"prompt": usual["messages"][:1]}
    recipe: Recipe = "dpo" if "chosen" in row else "sft"
    taken = canonical(found, 1, recipe, "auto")
    assert not isinstance(taken, RowProblem), taken
    assert len(images_in(taken)) == 1
    whole = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A square."}]
    with pytest.raises(InvalidRows, match="image: has 1 image, but the user messages have 0 parts of type image"):
        read(lines(row | {"image": url(png()), "chosen": whole}), Store())


@pytest.mark.parametrize("column", ["messages", "dialog", "chat_completion_input"])
def test_images_in_json_text_are_refused_when_they_arrive(column: str) -> None:
    """A job could not find them; a text that only speaks of them is a text."""
    text = json.dumps(asked(part())["messages"])
    with pytest.raises(InvalidRows, match=f"row 1: {column}: is JSON text with an image; expected a list of messages"):
        read(lines({column: text, "expected_answer": "A square."}), Store())
    for nested in ("[" * 100_000 + '"image"', '["image"'):
        assert read(lines({column: nested}), Store()) == [{column: nested}], "whoever reads the text refuses it"
    spoken = json.dumps(asked(text='What does "image" mean?')["messages"])
    assert read(lines({column: spoken}), Store()) == [{column: spoken}]


@pytest.mark.parametrize("value", [7, [7], {"bytes": "text", "path": None}, [{"bytes": "text"}]])
def test_what_is_no_image_is_named_in_words(value: Any) -> None:
    with pytest.raises(InvalidRows) as refused:
        read(lines({"messages": asked({"type": "image"})["messages"], "images": value}), Store())
    (problem,) = refused.value.problems
    assert problem.reason.startswith("is not text; expected data:image/png;base64")


def test_a_scheme_may_be_in_capitals() -> None:
    (row,) = read(lines(asked(part("DATA:IMAGE/PNG" + url(png())[len("data:image/png") :]))), Store())
    (usual,) = read(lines(asked(part())), Store())
    assert row == usual


def test_an_image_where_none_stands_is_refused() -> None:
    row = asked() | {"tools": [{"url": url(png())}]}
    with pytest.raises(InvalidRows, match="has a data: URL of an image where no image stands"):
        read(lines(row), Store())


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"export", "playground", "ablation"}))
def test_recipes_take_images_as_their_table_says(recipe: Recipe) -> None:
    (row,) = read(lines(asked(part())), Store())
    if recipe in PAIRED:
        row = {"prompt": row["messages"][:1], "chosen": "a", "rejected": "b"}
    if recipe == "kto":
        row = {**row, "label": True}
    found = canonical(row, 3, recipe, "auto")
    if RECIPES[recipe].images:
        assert not isinstance(found, RowProblem), found
        assert len(images_in(found)) == 1
    else:
        assert isinstance(found, RowProblem)
        assert found.reason == f"is an image; recipe {recipe} takes text only, and sft and dpo take images"


def test_an_evaluation_and_an_answer_of_a_pair_take_no_images() -> None:
    (row,) = read(lines(asked(part())), Store())
    found = conversation(row, 1, "auto")
    assert isinstance(found, RowProblem)
    assert found.reason == "is an image; an evaluation or analysis takes text only"
    talk = [{"role": "assistant", "content": "Which?"}, row["messages"][0], {"role": "assistant", "content": "b"}]
    pair = canonical({"prompt": "hello", "chosen": talk, "rejected": "no"}, 1, "dpo", "auto")
    assert isinstance(pair, RowProblem)
    assert pair.reason == "has an image; the images of a preference stand in its prompt"


def test_memory_holds_one_image_of_a_row() -> None:
    image = url(png(extra=chunk(b"teXt", bytes(2 << 20)))).encode()
    row = json.dumps(asked(*[part("IMAGE")] * 10)).encode().replace(b"IMAGE", image) + b"\n"
    assert len(row) > 25 << 20
    file = RowFile("mine", images=Store().door())
    tracemalloc.start()
    try:
        count = sum(1 for at in range(0, len(row), 1 << 18) for _ in file.feed(row[at : at + (1 << 18)]))
        count += len(list(file.finish()))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 1
    assert peak_bytes < 12 << 20, "more than the bytes of an image, while they grow and are checked"


def test_headers_of_real_encoders() -> None:
    image = pytest.importorskip("PIL.Image")
    from io import BytesIO

    for kind, settings in (("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}),
                           ("WEBP", {"lossless": True})):  # fmt: skip
        file = BytesIO()
        image.effect_noise((37, 23), 60).convert("RGB").save(file, kind, **settings)
        found = header(file.getvalue())
        assert found == (kind.lower(), 37, 23), (kind, settings)


def test_a_name_of_a_file_is_never_a_path() -> None:
    for sha256, kind in (("../../etc/passwd", "png"), ("A" * 64, "png"), ("a" * 64, "svg")):
        with pytest.raises(ValueError, match="is not an image of the canonical form"):
            file_name(sha256, kind)  # type: ignore[arg-type]


def test_a_mutated_file_never_raises_anything_else() -> None:
    from llama_stack_provider_moe.spec.rows.image_files import BadImage

    for content in (png(), jpeg(), webp()):
        for at in range(len(content)):
            for value in (0, 255, content[at] ^ 1):
                try:
                    header(content[:at] + struct.pack("B", value) + content[at + 1 :])
                    header(content[:at])
                except BadImage:
                    pass
