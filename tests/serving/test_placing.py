"""A file in the router's folder: complete or not at all, never over another one, whenever its writer is killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_stack_provider_moe.errors import ExportError, NoRoom
from llama_stack_provider_moe.serving import placing
from llama_stack_provider_moe.serving.placing import place, take_away
from llama_stack_provider_moe.serving.record import PlacedFile
from tests.support.jobs_support import FORK, ram_folder, small_disk

CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "artifact.gguf"
    path.write_bytes(CONTENT)
    path.chmod(0o640)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def placed(source: Path, target: Path) -> tuple[bool, PlacedFile]:
    found: list[PlacedFile] = []
    shared = place(source, target, found.append)
    return shared, found[0]


def test_on_the_same_disk_it_takes_no_room(source: Path, folder: Path) -> None:
    shared, file = placed(source, folder / "ft-a.gguf")
    assert (shared, (folder / "ft-a.gguf").samefile(source)) == (True, True)
    assert os.listdir(folder) == ["ft-a.gguf"]
    assert take_away(folder / "ft-a.gguf", file)
    assert (os.listdir(folder), source.read_bytes()) == ([], CONTENT)
    assert not take_away(folder / "ft-a.gguf", file), "it is gone"


def test_on_another_disk_it_is_a_copy(source: Path) -> None:
    with ram_folder() as other:
        if other.stat().st_dev == source.stat().st_dev:
            pytest.skip("there is no second file system")
        target = other / "ft-a.gguf"
        shared, file = placed(source, target)
        assert (shared, target.read_bytes(), target.stat().st_mode & 0o777) == (False, CONTENT, 0o640)
        assert os.listdir(other) == ["ft-a.gguf"]
        assert file.is_at(target)
        assert take_away(target, file)


def test_no_other_file_is_replaced_or_removed(source: Path, folder: Path) -> None:
    target = folder / "ft-a.gguf"
    target.write_bytes(b"somebody else's")
    found: list[PlacedFile] = []
    with pytest.raises(ExportError, match=r"ft-a\.gguf exists and is not of this export; nothing was replaced"):
        place(source, target, found.append)
    assert not take_away(target, found[0])
    assert (os.listdir(folder), target.read_bytes()) == (["ft-a.gguf"], b"somebody else's")


def test_a_link_in_its_place_is_not_followed(source: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "ft-a.gguf").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="nothing was replaced"):
        placed(source, folder / "ft-a.gguf")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_gone_is_named(source: Path, folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(ExportError, match=r"serving\.models_dir: .*ft-a\.gguf can't be written \(No such file"):
        placed(source, folder / "ft-a.gguf")


def test_without_room_nothing_is_left(source: Path, folder: Path) -> None:
    with small_disk(folder, megabytes=1):
        source.write_bytes(bytes(2 << 20))
        with pytest.raises(NoRoom, match="has no room for a copy of 2,097,152 bytes"):
            placed(source, folder / "ft-a.gguf")
        assert os.listdir(folder) == []


CALLS = ["link", "unlink", "fsync"]


@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_any_moment_it_is_there_or_not(
    source: Path, folder: Path, call: str, number: int, is_after: bool
) -> None:
    """A second attempt, with what the first one recorded, ends well; a deletion leaves nothing."""
    target, record = folder / "ft-a.gguf", source.with_suffix(".json")

    def killed() -> None:
        real: Callable[..., object] = getattr(os, call)
        calls = []

        def dying(*arguments: object, **named: object) -> object:
            calls.append(arguments)
            if len(calls) == number + 1 and not is_after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = real(*arguments, **named)
            if len(calls) == number + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        setattr(placing.os, call, dying)
        place(source, target, lambda file: record.write_text(file.model_dump_json()) and None)
        os._exit(0)

    process = FORK.Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0), "0: there are fewer calls"
    assert not target.exists() or target.read_bytes() == CONTENT
    earlier = PlacedFile.model_validate_json(record.read_text()) if record.exists() else None
    if target.exists():
        assert earlier is not None, "the record comes first, so a deletion finds the file"
        assert earlier.is_at(target)
    else:
        _, earlier = placed(source, target)
    assert take_away(target, earlier)
    assert os.listdir(folder) == []
