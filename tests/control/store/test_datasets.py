"""Laws of the table of data sets, on both databases; and of the files beside it."""

import dataclasses
import fcntl
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from llama_stack_provider_moe.control.store.dataset_files import Arriving, Room, remove, rows_of, sweep
from llama_stack_provider_moe.control.store.dataset_rows import DatasetTable, DatasetVersion, new_version
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput, NotFound, TooLarge
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import tiny_config

QUOTA = 1000
ROOM = Room(QUOTA, "no room")


@pytest.fixture
def shared(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


@pytest.fixture
def table(shared: JobStore) -> DatasetTable:
    return shared.datasets


@pytest.fixture
def config(root: Path, table: DatasetTable) -> ProviderConfig:
    made = tiny_config(root)
    sweep(made, table)
    return made


def a_version(number: int, name: str = "mine", owner: str = "ann", size_bytes: int = 10) -> DatasetVersion:
    return new_version(f"{owner}-{name}-{number}"[:32], owner, name, f"{number:064x}", 3, size_bytes, {"Frage ß": 3})


def add(table: DatasetTable, *versions: DatasetVersion) -> None:
    for version in versions:
        assert table.add(version, QUOTA) == (version, True)


def test_a_version_comes_back_as_it_was_added(table: DatasetTable) -> None:
    version = a_version(1)
    add(table, version)
    assert table.get("ann", "mine") == version
    assert table.has("ann", "mine")
    assert table.is_there(version.id)
    assert table.ids() == {version.id}


def test_sizes_beyond_32_bits_fit(table: DatasetTable) -> None:
    version = dataclasses.replace(a_version(1), rows=10**10, bytes=10**13)
    assert table.add(version, 10**14) == (version, True)
    assert table.get("ann", "mine") == version
    assert table.used_bytes("ann") == table.largest_bytes("ann", "mine") == 10**13
    assert table.overviews("ann", 10, None)[0].total_bytes == 10**13


def test_the_version_pushed_last_is_current_and_the_same_content_is_one_version(table: DatasetTable) -> None:
    first, second, third = (a_version(number) for number in (1, 2, 3))
    add(table, first, second, third)
    again = dataclasses.replace(first, id="another-id")
    assert table.add(again, QUOTA) == (first, False)
    assert table.get("ann", "mine") == first
    assert table.versions("ann", "mine", 10) == [first, third, second]
    assert table.versions("ann", "mine", 2) == [first, third]
    assert table.used_bytes("ann") == 30


def test_owners_and_names_are_apart(table: DatasetTable) -> None:
    versions = [a_version(1, name, owner) for owner in ("ann", "bob") for name in ("mine", "yours")]
    add(table, *versions)
    assert table.get("bob", "yours") == versions[3]
    assert [each.current for each in table.overviews("ann", 10, None)] == versions[:2]
    assert table.delete("ann", "mine") == versions[:1]
    assert table.ids() == {each.id for each in versions[1:]}
    with pytest.raises(NotFound, match="you have no data set 'mine'"):
        table.get("ann", "mine")
    assert table.used_bytes("ann") == 10
    assert table.used_bytes("nobody") == table.largest_bytes("nobody", "mine") == 0


def test_overviews_are_pages(table: DatasetTable) -> None:
    add(table, *(a_version(number, name) for name in ("b", "a", "c") for number in (1, 2)))
    found = table.overviews("ann", 2, None)
    assert [(each.current.name, each.versions, each.total_bytes) for each in found] == [("a", 2, 20), ("b", 2, 20)]
    assert [each.current.sha256 for each in found] == [f"{2:064x}"] * 2
    assert [each.current.name for each in table.overviews("ann", 2, "b")] == ["c"]
    assert table.overviews("ann", 2, "c") == []


def test_the_beginning_of_a_checksum_names_a_version(table: DatasetTable) -> None:
    versions = [dataclasses.replace(a_version(number), sha256=sha256.ljust(64, "0"))
                for number, sha256 in enumerate(["abcdef1", "abcdef2", "123456"])]  # fmt: skip
    add(table, *versions)
    assert table.get("ann", "mine", "123456") == versions[2]
    assert table.get("ann", "mine", versions[0].sha256) == versions[0]
    with pytest.raises(InvalidInput, match="expected more digits: several versions of data set 'mine' begin so"):
        table.get("ann", "mine", "abcdef")
    with pytest.raises(NotFound, match="no version 'fedcba'"):
        table.delete("ann", "mine", "fedcba")
    for wrong in ("12345", "", "12345_", "12345%", "ABCDEF1", "1" * 65):
        with pytest.raises(InvalidInput, match="expected 6 to 64 hexadecimal digits"):
            table.get("ann", "mine", wrong)
    assert table.delete("ann", "mine", "abcdef1") == versions[:1]
    assert table.versions("ann", "mine", 10) == [versions[2], versions[1]]


def test_the_quota_is_of_one_owner(table: DatasetTable) -> None:
    add(table, a_version(1, size_bytes=600))
    with pytest.raises(TooLarge, match=r"other: at least 401 bytes, but of your 1,000 bytes .* 600 are used"):
        table.add(a_version(2, "other", size_bytes=401), QUOTA)
    assert table.add(a_version(1, size_bytes=600), QUOTA)[1] is False
    add(table, a_version(2, "other", size_bytes=400), a_version(1, owner="bob", size_bytes=1000))


def arrived(config: ProviderConfig, table: DatasetTable, content: bytes = b'{"a":1}\n', name: str = "mine") -> str:
    with Arriving(config, ROOM) as arriving:
        arriving.write(content)
        arriving.sync()
        return arriving.keep(table, "ann", name, 1, {"a": 1})[0].id


def names(config: ProviderConfig) -> list[str]:
    return sorted(
        str(path.relative_to(config.datasets_dir)) for path in config.datasets_dir.rglob("*") if path.is_file()
    )


def test_an_arriving_file_becomes_a_version_or_nothing(config: ProviderConfig, table: DatasetTable) -> None:
    dataset_id = arrived(config, table)
    assert rows_of(config, dataset_id).read_bytes() == b'{"a":1}\n'
    assert arrived(config, table) == dataset_id
    with Arriving(config, ROOM) as arriving:
        arriving.write(b"{}\n")
    with Arriving(config, ROOM) as arriving:
        arriving.write(b"x" * QUOTA)
        with pytest.raises(TooLarge, match="no room"):
            arriving.write(b"x")
    assert names(config) == [".lock", f"{dataset_id}/rows.jsonl"]
    (gone,) = remove(config, table, "ann", "mine", None)
    assert gone.id == dataset_id
    assert names(config) == [".lock"]


def test_two_arrivals_together_do_not_exceed_the_quota(root: Path, shared: JobStore) -> None:
    config = tiny_config(root).model_copy(update={"dataset_quota_bytes": QUOTA})
    sweep(config, shared.datasets)

    def send(number: int) -> bool:
        try:
            arrived(config, shared.datasets, b"%d" % number * 400, f"name{number}")
        except TooLarge:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(send, range(8))) == 2
    assert shared.datasets.used_bytes("ann") == 800
    assert len(names(config)) == 1 + 2


def test_a_failed_insert_leaves_no_file(
    config: ProviderConfig, table: DatasetTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(table, "add", fails)
    with pytest.raises(OSError, match="no space"):
        arrived(config, table)
    assert names(config) == [".lock"]


def test_an_insert_whose_answer_was_lost_counts(
    config: ProviderConfig, table: DatasetTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_once, calls = table.add, []

    def loses_the_answer(new: DatasetVersion, quota_bytes: int, setting: str) -> tuple[DatasetVersion, bool]:
        calls.append(new.id)
        found = add_once(new, quota_bytes, setting)
        if len(calls) == 1:
            raise OperationalError("COMMIT", {}, Exception("server closed the connection"))
        return found

    monkeypatch.setattr(table, "add", loses_the_answer)
    if table.is_embedded:  # a failed transaction on a local file has not happened, so nothing is tried again
        with pytest.raises(OperationalError):
            arrived(config, table)
        assert (len(calls), names(config)) == (1, [".lock"])
        return
    dataset_id = arrived(config, table)
    assert calls == [dataset_id, dataset_id]
    assert rows_of(config, dataset_id).is_file()
    assert table.is_there(dataset_id)


def test_a_sweep_deletes_what_nobody_writes_and_the_store_does_not_know(
    config: ProviderConfig, table: DatasetTable
) -> None:
    dataset_id = arrived(config, table)
    shutil.copytree(rows_of(config, dataset_id).parent, config.datasets_dir / "unknown")
    incoming = config.datasets_dir / "incoming"
    (incoming / "dead").write_bytes(b"{}")
    with Arriving(config, ROOM) as arriving:
        arriving.write(b"{}\n")
        sweep(config, table)
        assert len(list(incoming.iterdir())) == 1
        assert arriving.keep(table, "ann", "other", 1, {})[1]
    with (incoming / "written").open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(config, table)
        assert [path.name for path in incoming.iterdir()] == ["written"]
    sweep(config, table)
    assert list(incoming.iterdir()) == []
    assert len(names(config)) == 1 + 2
