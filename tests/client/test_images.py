"""Image files that rows name become data: URLs in the rows that are sent; no path leads out of their folder or tar."""

import io
import json
import os
import re
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.client.upload import opened
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.row_files import RowFile
from llama_stack_provider_moe.spec.rows.image_parts import ImageDoor
from llama_stack_provider_moe.spec.rows.images import ImageLimits, ImagePart
from tests.support.image_bytes import asked, jpeg, part, png

RED = png(colour=255)
FORMS: dict[str, Any] = {
    "image_file": asked({"type": "image_file", "image_file": "cats/red.png"}),
    "a path": asked({"type": "image_file", "image_file": {"path": "cats/red.png"}}),
    "image": asked({"type": "image", "image": "cats/red.png"}),
    "image and path": asked({"type": "image", "path": "cats/red.png"}),
    "image_url": asked({"type": "image_url", "image_url": {"url": "cats/red.png"}}),
    "a column": asked({"type": "image"}) | {"images": ["cats/red.png"]},
    "a column of one": asked({"type": "image"}) | {"image": "cats/red.png"},
    "already a URL": asked(part(RED)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "cats").mkdir(parents=True)
    (tmp_path / "pictures" / "cats" / "red.png").write_bytes(RED)
    (tmp_path / "pictures" / "photo.jpg").write_bytes(jpeg())
    (tmp_path / "pictures" / "words.png").write_text("no image")
    (tmp_path / "secret.png").write_bytes(RED)
    (tmp_path / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    return tmp_path / "pictures"


def tar_of(folder: Path, *more: tarfile.TarInfo) -> Path:
    path = folder.parent / "pictures.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("cats", "cats/red.png", "photo.jpg"):
            tar.add(folder / name, f"./{name}", recursive=False)
        for member in more:
            tar.addfile(member, io.BytesIO(b"\0" * member.size))
    return path


def sent(file: Path, images: Path | None) -> list[Any]:
    """The rows as a server stores them, and each image that it keeps."""
    kept: list[tuple[bytes, ImagePart]] = []
    reader = RowFile("mine", images=ImageDoor(ImageLimits(), lambda *image: kept.append(image)))
    with opened(str(file), None, None if images is None else str(images)) as upload:
        rows = [row.content for piece in upload.body(lambda: None) for row in reader.feed(piece)]
    rows += [row.content for row in reader.finish()]
    assert all(content == RED for content, _ in kept)
    return rows


def rows_file(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_way_to_name_a_file_gives_the_same_row(folder: Path, tmp_path: Path) -> None:
    file = rows_file(tmp_path, *FORMS.values())
    (row, *others) = sent(file, folder)
    assert row["messages"][0]["content"][0]["type"] == "image"
    assert all(other == row for other in others)
    assert sent(file, tar_of(folder)) == [row, *others]


def test_parquet_has_the_bytes_itself(tmp_path: Path) -> None:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    row = asked({"type": "image", "text": None}) | {"images": [{"bytes": RED, "path": "red.png"}]}
    row["messages"][0]["content"][1] = {"type": "text", "text": "What is it?"}
    row["messages"][1]["content"] = [{"type": "text", "text": "A square."}]
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (found,) = sent(tmp_path / "rows.parquet", None)
    assert found["messages"][0]["content"][0]["width"] == 2
    assert "images" not in found
    bare = {"prompt": "What is it?", "completion": "A square."}
    parquet.write_table(arrow.Table.from_pylist([bare | {"image": RED}]), tmp_path / "bare.parquet")
    parquet.write_table(arrow.Table.from_pylist([bare | {"images": [RED]}]), tmp_path / "list.parquet")
    assert sent(tmp_path / "bare.parquet", None) == sent(tmp_path / "list.parquet", None)
    moving = {"prompt": "What is it?", "completion": "A cat.", "image": {"bytes": b"GIF89a", "path": "a.gif"}}
    parquet.write_table(arrow.Table.from_pylist([moving]), tmp_path / "gif.parquet")
    with pytest.raises(InvalidInput, match=r"^FILE: 'a.gif' is not valid; expected a PNG, JPEG or WebP image"):
        sent(tmp_path / "gif.parquet", None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "a path below the folder"), ("/etc/passwd", "a path below the folder"),
        ("link.png", "with no link out of it"), ("cats", "a file inside"), ("none.png", "No such file"),
        ("words.png", "a PNG, JPEG or WebP image"),
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_folder(folder: Path, tmp_path: Path, name: str, reason: str) -> None:
    file = rows_file(tmp_path, asked(), asked({"type": "image_file", "image_file": name}))
    with pytest.raises(InvalidInput, match=reason) as refused:
        sent(file, folder)
    assert "row 2" in str(refused.value)


def test_all_missing_files_are_named_at_once(folder: Path, tmp_path: Path) -> None:
    rows = [asked({"type": "image_file", "image_file": "cats/red.png"})] * 20
    for number in (3, 7, 20):
        rows[number - 1] = asked({"type": "image_file", "image_file": f"none-{number}.png"})
    with pytest.raises(InvalidInput) as refused:
        sent(rows_file(tmp_path, *rows), folder)
    assert re.findall(r"none-(\d+)\.png' is not valid.*?row (\d+) ", str(refused.value)) == [
        ("3", "3"), ("7", "7"), ("20", "20")
    ]  # fmt: skip
    same = [asked({"type": "image_file", "image_file": "none.png"})] * 12
    with pytest.raises(InvalidInput, match="row 1 ") as refused:
        sent(rows_file(tmp_path, *same), folder)
    assert "row 2 " not in str(refused.value)
    names = [f"none-{number}.png" for number in range(11)]
    missing = [asked({"type": "image_file", "image_file": name}) for name in names]
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    parquet.write_table(
        arrow.Table.from_pylist([{"images": [name], "prompt": "?"} for name in names]), tmp_path / "p.parquet"
    )
    for file in (rows_file(tmp_path, *missing), tmp_path / "p.parquet"):
        with pytest.raises(InvalidInput, match=r"row 10 .*; 10 faults; later rows were not read$") as refused:
            sent(file, folder)
        assert "row 11" not in str(refused.value)


def odd(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member",
    [
        odd("a.png", tarfile.SYMTYPE, "/etc/passwd"), odd("a.png", tarfile.LNKTYPE, "cats/red.png"),
        odd("a.png", tarfile.CHRTYPE), odd("a.png", tarfile.FIFOTYPE), odd("../a.png", tarfile.REGTYPE),
        odd("/a.png", tarfile.REGTYPE),
    ],
    ids=["link", "second name", "device", "pipe", "out", "absolute"],
)  # fmt: skip
def test_a_tar_has_plain_files_alone(folder: Path, tmp_path: Path, member: tarfile.TarInfo) -> None:
    file = rows_file(tmp_path, asked())
    with pytest.raises(InvalidInput, match="a link, a device or a path out of it"):
        sent(file, tar_of(folder, member))


@pytest.mark.parametrize("name", ["photo.jpg", "./photo.jpg"])
def test_a_tar_names_each_file_once(folder: Path, tmp_path: Path, name: str) -> None:
    """Else a row would get the last of two images."""
    file = rows_file(tmp_path, asked({"type": "image_file", "image_file": "photo.jpg"}))
    with pytest.raises(InvalidInput, match=r"photo\.jpg' twice"):
        sent(file, tar_of(folder, odd(name, tarfile.REGTYPE)))


def test_what_is_no_folder_of_images(folder: Path, tmp_path: Path) -> None:
    file = rows_file(tmp_path, asked())
    with pytest.raises(InvalidInput, match="a folder, or a tar file that is not compressed"):
        sent(file, folder / "words.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="a folder, or a tar file that is not compressed"):
        sent(file, tmp_path / "pipe")
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(InvalidInput, match="a cell of CSV holds no list of parts"):
        sent(tmp_path / "rows.csv", folder)
