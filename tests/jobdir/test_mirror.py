"""Laws for copies in a mirror, on a file system and on S3 (moto's server): listed copies are complete."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import child_environment
from llama_stack_provider_moe.control.supervisor.removal import remove
from llama_stack_provider_moe.jobdir.checkpoint_index import verify_files, write_checksums
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.mirror import Mirror, read_places
from llama_stack_provider_moe.spec.server_config import MIRROR_VARIABLE, ProviderConfig
from tests.support.jobs_support import new_job, tiny_config
from tests.support.s3_server import AWS, s3

__all__ = ["s3"]


@pytest.fixture(params=["file", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The common prefix of all jobs' copies."""
    if request.param == "file":
        return f"file://{tmp_path}/far away"
    for name, value in {**AWS, "AWS_ENDPOINT_URL": request.getfixturevalue("s3")}.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


def checkpoint(folder: Path, text: str = "weights") -> Path:
    """A published folder."""
    (folder / "below").mkdir(parents=True)
    (folder / "weights").write_text(text * 1000)
    (folder / "below" / "empty").write_text("")
    write_checksums(folder, step=3)
    return folder


def job(root: Path, name: str = "job") -> JobFolder:
    folder = JobFolder(root / "jobs" / name)
    folder.root.mkdir(parents=True)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_put_is_fetched_and_what_is_replaced_is_replaced(base: str, tmp_path: Path) -> None:
    mirror = Mirror.of(job(tmp_path), base)
    assert mirror.names() == []
    first, second = checkpoint(tmp_path / "a" / "epoch-1"), checkpoint(tmp_path / "b" / "epoch-1", "other")
    assert mirror.put(first, "checkpoints/epoch-1") == 7000
    assert mirror.put(first, "checkpoints/epoch-1") == 0, "it is there"
    assert mirror.names() == ["checkpoints/epoch-1"]
    assert mirror.fetch("checkpoints/epoch-1", tmp_path / "c" / "epoch-1")
    assert files(tmp_path / "c" / "epoch-1") == files(first)
    assert not mirror.fetch("checkpoints/epoch-1", first), "it is here"
    (second / "new").write_text("new")
    write_checksums(second, step=4)
    assert mirror.put(second, "checkpoints/epoch-1") == 5003
    assert mirror.fetch("checkpoints/epoch-1", tmp_path / "d" / "epoch-1")
    assert files(tmp_path / "d" / "epoch-1") == files(second)
    mirror.put(first, "artifacts/adapter")
    mirror.remove("checkpoints/epoch-1")
    assert mirror.names() == ["artifacts/adapter"]
    mirror.remove()
    mirror.remove()
    assert mirror.names() == []


def test_what_is_not_whole_is_not_listed_and_what_was_changed_is_not_taken(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, sent = Mirror.of(job(tmp_path), base), checkpoint(tmp_path / "epoch-1")
    mirror.put(sent, "checkpoints/epoch-1")
    plain = mirror._send

    def broken(source: Path, target: str, sent_bytes: Callable[[int], None]) -> None:
        if target.endswith("weights"):
            raise ConnectionResetError("gone")
        plain(source, target, sent_bytes)

    (sent / "below" / "empty").write_text("no longer")
    write_checksums(sent, step=4)
    with monkeypatch.context() as during:
        during.setattr(mirror, "_send", broken)
        with pytest.raises(OSError, match="gone"):
            mirror.put(sent, "checkpoints/epoch-1")
    assert mirror.names() == [], "neither the new one nor what is left of the old one"
    with pytest.raises(OSError, match="not complete"):
        mirror.fetch("checkpoints/epoch-1", tmp_path / "here")
    assert mirror.put(sent, "checkpoints/epoch-1") > 0
    mirror._system.pipe_file(f"{mirror._root}/checkpoints/epoch-1/weights", b"Weights" + b"weights" * 999)
    with pytest.raises(OSError, match="weights was changed after it was written"):
        mirror.fetch("checkpoints/epoch-1", tmp_path / "here")
    assert {path.name for path in tmp_path.glob("*here*")} == set()


def test_a_copy_can_write_nowhere_else(base: str, tmp_path: Path) -> None:
    mirror, sent = Mirror.of(job(tmp_path), base), checkpoint(tmp_path / "epoch-1")
    mirror.put(sent, "epoch-1")
    sums = json.loads((sent / "checksums.json").read_text())
    sums["files"]["../../../outside"] = sums["files"]["weights"]
    mirror._system.pipe_file(f"{mirror._root}/epoch-1/checksums.json", json.dumps(sums).encode())
    with pytest.raises(OSError, match=r"names '\.\./\.\./\.\./outside', outside its folder"):
        mirror.fetch("epoch-1", tmp_path / "x" / "y" / "here")
    assert not (tmp_path / "outside").exists()


def test_jobs_of_one_id_share_no_copies(tmp_path: Path) -> None:
    base, other = f"file://{tmp_path}/far", f"file://{tmp_path}/farther"
    first, second = job(tmp_path / "one"), job(tmp_path / "two")
    assert Mirror.of(first, base).url == Mirror.of(first, f"{base}/").url != Mirror.of(second, base).url
    Mirror.of(first, other)
    assert [url.rpartition("/")[0] for url in read_places(first).urls] == [base, other]


def test_a_deleted_job_takes_its_copies_along(
    store: JobStore, root: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(root)
    mirrors = []
    for name in ("first", "second"):
        folder = JobFolder(new_job(store, config, name))
        mirrors.append(Mirror.of(folder, base))
        mirrors[-1].put(checkpoint(root / name / "adapter"), "artifacts/adapter")
        store.request_cancel(name, None)

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("nobody listens")

    with monkeypatch.context() as during:
        during.setattr(Mirror, "remove", unreachable)
        remove(store, config, "first", "ann")
    assert mirrors[0].names() == ["artifacts/adapter"]
    assert [path.name.partition(".")[0] for path in (root / "deleted").iterdir()] == ["first"], "for the next time"
    remove(store, config, "second", "ann")
    assert [mirror.names() for mirror in mirrors] == [[], []]
    assert not [*(root / "deleted").iterdir()]


def test_a_place_that_needs_a_package_or_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Protocol not known"):
        Mirror("nowhere://bucket/job")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Mirror(f"file://{tmp_path}/file/job").put(checkpoint(tmp_path / "epoch-1"), "epoch-1")
    assert verify_files(tmp_path / "epoch-1") is None


def test_only_a_mirror_on_s3_hands_credentials_on_and_no_job_moves_it(tmp_path: Path) -> None:
    for url, handed in (("s3://bucket/prefix", AWS), ("file:///far", {}), (None, {})):
        config = ProviderConfig(state_dir=tmp_path, mirror={"url": url}, child_env={MIRROR_VARIABLE: "file:///mine"})
        found = child_environment({**AWS, "HOME": "/"}, config, tmp_path)
        assert {name: value for name, value in found.items() if name.startswith("AWS_")} == handed
        assert found[MIRROR_VARIABLE] == (url or "")


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3://Bucket", "memory://x", "http://host/x", "file://host/x", "s3://bucket/../x", "file:///a/../b",
     "simplecache::s3://bucket", "s3://bucket/a?b", "/far", ""],
)  # fmt: skip
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match=r"mirror\.url"):
        ProviderConfig(mirror={"url": url})
