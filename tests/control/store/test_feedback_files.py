"""Laws of the files of flagged conversations: each owner's, whole lines, bounded, whatever dies meanwhile."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.feedback_files import append, erase, kept, path_of, pieces, used_bytes
from llama_stack_provider_moe.control.store.owners import everybody_of

ANN, BOB, TENANT, OTHER = "a" * 64, "b" * 64, "c" * 64, "d" * 64
MOST = 1 << 20


def line(text: str, shield: str = "s", role: str = "user") -> bytes:
    row = {"at": "2026-01-01T00:00:00+00:00", "shield": shield, "messages": [{"role": "user", "content": text}]}
    if role == "assistant":
        row["messages"] = [*row["messages"], {"role": role, "content": text}]
    return json.dumps(row).encode() + b"\n"


def texts(folder: Path, whose: str | None) -> list[str]:
    lines = b"".join(pieces(folder, whose, "all")).splitlines()
    return [json.loads(each)["messages"][0]["content"] for each in lines]


def test_each_owner_and_each_tenant_has_their_own(tmp_path: Path) -> None:
    owners = ("anonymous", ANN, BOB, f"{TENANT}/{ANN}", f"{TENANT}/{BOB}", f"{OTHER}/{ANN}")
    for owner in owners:
        append(tmp_path, owner, line(f"of {owner}"), MOST)
    for owner in owners:
        assert texts(tmp_path, owner) == [f"of {owner}"]
    assert texts(tmp_path, everybody_of(TENANT)) == [f"of {TENANT}/{ANN}", f"of {TENANT}/{BOB}"]
    assert sorted(texts(tmp_path, None)) == sorted(f"of {owner}" for owner in owners)
    assert used_bytes(tmp_path) == sum(len(line(f"of {owner}")) for owner in owners)
    assert erase(tmp_path, ANN) == len(line(f"of {ANN}"))
    assert (texts(tmp_path, ANN), texts(tmp_path, f"{TENANT}/{ANN}")) == ([], [f"of {TENANT}/{ANN}"])
    assert append(tmp_path, ANN, line("again"), MOST) == "kept"


@pytest.mark.parametrize("owner", ["", "../x", "a/b", ANN.upper(), f"{TENANT}/../{ANN}", f"{ANN}/{ANN}/{ANN}"])
def test_no_other_text_is_an_owner(tmp_path: Path, owner: str) -> None:
    with pytest.raises(AssertionError):
        path_of(tmp_path, owner)


def test_nothing_is_kept_of_an_owner_of_whom_nothing_was_flagged(tmp_path: Path) -> None:
    assert kept(tmp_path, ANN) == (0, 0, 0, 0)
    assert (texts(tmp_path, None), used_bytes(tmp_path), erase(tmp_path, ANN)) == ([], 0, 0)


def test_equal_conversations_count_once(tmp_path: Path) -> None:
    for shield in ("s", "t", "s"):
        append(tmp_path, ANN, line("x", shield), MOST)
    append(tmp_path, ANN, line("y", "t", "assistant"), MOST)
    assert kept(tmp_path, ANN)[:2] == (2, 1)
    assert texts(tmp_path, ANN) == ["x", "y"]
    assert b"".join(pieces(tmp_path, ANN, "answered", "s")) == b""


def test_what_a_dead_process_left_of_a_line_is_no_row_and_goes(tmp_path: Path) -> None:
    append(tmp_path, ANN, line("whole"), MOST)
    path = path_of(tmp_path, ANN)
    for torn in (b'{"at": "2026', b"x" * 200_000):
        with path.open("ab") as file:
            file.write(torn)
        assert texts(tmp_path, ANN) == ["whole"]
    append(tmp_path, ANN, line("next"), MOST)
    assert texts(tmp_path, ANN) == ["whole", "next"]
    path.write_bytes(b"torn alone")
    append(tmp_path, ANN, line("first"), MOST)
    assert path.read_bytes() == line("first")


def test_a_damaged_line_hides_no_other(tmp_path: Path) -> None:
    append(tmp_path, ANN, line("one"), MOST)
    for damaged in (b"null\n", b"{}\n", b"\xff\n", b'{"shield": "s", "messages": []}\n', b"[" * 9 + b"\n"):
        append(tmp_path, ANN, damaged, MOST)
    append(tmp_path, ANN, line("two"), MOST)
    assert texts(tmp_path, ANN) == ["one", "two"]


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    size = len(line("x"))
    assert [append(tmp_path, ANN, line("x"), 3 * size) for _ in range(5)] == ["kept"] * 3 + ["full"] * 2
    assert append(tmp_path, BOB, line("x"), 3 * size) == "kept"


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, ANN, line("one"), MOST)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            append(tmp_path, ANN, line("two"), MOST)
    assert path_of(tmp_path, ANN).read_bytes() == line("one")


def _many(folder: Path, name: str, count: int) -> None:
    for number in range(count):
        append(folder, ANN, line(f"{name} {number} " + "x" * 5000), 1 << 30)


def test_several_processes_append_and_one_that_is_killed_damages_nothing(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_many, args=(tmp_path, name, 100 if name != "killed" else 10**6))
               for name in ("one", "two", "killed")]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers[:2]:
        worker.join(120)
    assert workers[2].pid is not None
    os.kill(workers[2].pid, signal.SIGKILL)
    workers[2].join(60)
    append(tmp_path, ANN, line("last"), 1 << 30)
    lines = path_of(tmp_path, ANN).read_bytes().splitlines()
    found = [json.loads(each)["messages"][0]["content"].split(" x")[0] for each in lines]
    for name in ("one", "two"):
        assert [each for each in found if each.startswith(name)] == [f"{name} {number}" for number in range(100)]
    assert found[-1] == "last"


BAD_ARGUMENTS = ['{"a": 1e999}', '{"a": NaN}', "not JSON", "[]", "{} {}", '{"a": "\\ud800"}', "[" * 100_000]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_what_a_job_could_not_take_is_left_out_and_counted(tmp_path: Path, arguments: str) -> None:
    function = {"name": "f", "arguments": arguments}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    row = {"at": "", "shield": "s", "messages": [{"role": "user", "content": "x"}, call]}
    append(tmp_path, ANN, json.dumps(row).encode() + b"\n", MOST)
    append(tmp_path, ANN, line("y", role="assistant"), MOST)
    assert kept(tmp_path, ANN)[:2] == (1, 1)
    assert kept(tmp_path, ANN).left_out == 1
    for only in ("all", "answered"):
        assert [json.loads(each)["messages"][0]["content"] for each in pieces(tmp_path, ANN, only)] == ["y"]
