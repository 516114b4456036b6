"""Only the server's user can read its files, or a group if the operator configures one."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store import state_layout
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.private import UMASK_VARIABLE, Privacy, as_new_files, take_umask
from llama_stack_provider_moe.jobdir.cluster_run import ClusterRun
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.host_support import serving_in_process, submit
from tests.support.live_folders import everything


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    """The umask that most people have."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def open_to_others(root: Path, mask: int = 0o077) -> list[str]:
    found = []
    for path in [root, *root.rglob("*")]:
        with suppress(FileNotFoundError):  # a file that was written beside another and has got its name meanwhile
            if not path.is_symlink() and path.lstat().st_mode & mask:
                found.append(f"{path.relative_to(root)} {stat.S_IMODE(path.lstat().st_mode):o}")
    return found


def test_all_that_the_server_writes(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as service:
        submit(service)
        state = service.config.state_dir
        assert len(list(state.rglob("*"))) > 6
        assert open_to_others(state) == []
        now = os.umask(0o022)
        assert now == 0o022, "the host's umask is its own"


def test_for_a_group(tmp_path: Path) -> None:
    with serving_in_process(tmp_path, group_access=True) as service:
        job_id = submit(service)
        assert open_to_others(service.config.state_dir, 0o027) == []
        assert stat.S_IMODE((service.config.jobs_dir / job_id / "data").stat().st_mode) == 0o750


def test_a_group_reads_the_files_that_are_written_whole(tmp_path: Path) -> None:
    with serving_in_process(tmp_path, group_access=True) as service:
        job = service.config.jobs_dir / submit(service)
    assert stat.S_IMODE((job / "spec.json").stat().st_mode) == 0o640
    os.umask(0o027)  # as processes of our own have it
    write_atomic(job / "manifest.json", "{}")
    assert stat.S_IMODE((job / "manifest.json").stat().st_mode) == 0o640
    ClusterRun(run="a", number=1).write(job)
    assert stat.S_IMODE((job / "cluster.json").stat().st_mode) == 0o600, "it has secrets"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_a_library_with_its_own_mode(umask: int, mode: int, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere.safetensors"
    (folder / "deep").mkdir(parents=True)
    weights = [folder / "model.safetensors", folder / "deep" / "adapter.safetensors"]
    for path in (elsewhere, *weights, folder / "secret.txt"):
        path.touch(mode=0o600)
    (folder / "link.safetensors").symlink_to(elsewhere)
    os.umask(umask)
    as_new_files(folder)
    assert [stat.S_IMODE(path.stat().st_mode) for path in weights] == [mode, mode]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (elsewhere, folder / "secret.txt")] == [0o600, 0o600]
    assert sorted(path.name for path in folder.iterdir()) == ["deep", "link.safetensors", "model.safetensors",
                                                              "secret.txt"]  # fmt: skip


def test_a_folder_that_gives_its_group_to_what_is_made_in_it_stays_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o2777)
    Privacy(group=True).tighten(tmp_path, note=print)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o2750


def test_what_an_earlier_version_left_open(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "jobs" / "old" / "data").mkdir(parents=True)
    (state / "jobs" / "old" / "data" / "train.jsonl").write_text("{}")
    (state / "supervisor.log").write_text("x")
    JobStore(f"sqlite:///{state}/jobs.db").close()
    (state / "jobs.db").chmod(0o644)
    (state / "tools").mkdir(mode=0o755)
    state.chmod(0o755)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (state / "link").symlink_to(elsewhere)
    with serving_in_process(tmp_path):
        for path in (state, state / "jobs", state / "jobs" / "old"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "supervisor.log").stat().st_mode) == 0o600
        assert stat.S_IMODE((state / "jobs.db").stat().st_mode) == 0o600
        assert stat.S_IMODE((state / "tools").stat().st_mode) == 0o755, "no server made it"
        assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755, "a link's other end is somebody else's"


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): stat.S_IMODE(found.st_mode) for path, found in everything(root)}


def test_a_folder_that_others_use_stays_as_it_is(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for name in ("other/deep", "jobs/theirs", "models"):
        (state / name).mkdir(parents=True)
    (state / "other" / "file").write_text("x")
    for mode in (0o1777, 0o755):
        state.chmod(mode)
        before = modes(state)
        with (
            pytest.raises(InvalidInput, match=r"state_dir: .*contains other files \('other'\)"),
            serving_in_process(tmp_path),
        ):
            pass
        assert modes(state) == before


def test_a_used_folder_that_is_open_to_all_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving_in_process(tmp_path) as service:
        state = service.config.state_dir
    (state / "other").mkdir(mode=0o755)
    state.chmod(0o1777)  # after a server had closed it, so somebody needs it open
    (state / "jobs").chmod(0o755)
    with serving_in_process(tmp_path):
        found = modes(state)
        assert (found["."], found["other"], found["jobs"]) == (0o1777, 0o755, 0o700)
    assert f"state_dir: '{state}' stays open to other users (mode 1777): others use it too ('other')" in caplog.text


def test_models_and_files_of_the_host_may_be_there_first(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "models" / "mine").mkdir(parents=True)
    for name in ("registry.db", "stack.db-wal", "server.log", "run.yaml"):
        (state / name).write_text("")
    state.chmod(0o777)  # as volumes of containers are
    with serving_in_process(tmp_path) as service:
        submit(service)
        found = modes(state)
        assert (found["."], found["models"], found["models/mine"], found["registry.db"]) == (0o700, 0o755, 0o755, 0o644)
        assert {name for name in found if "/" not in name} <= {
            ".", "models", "registry.db", "stack.db-wal", "server.log", "run.yaml", *state_layout.OURS
        }, "every name that a server makes is known as its own"  # fmt: skip


@pytest.mark.parametrize("place", ["/", "/tmp", "/dev/shm", "~"])
def test_places_that_everybody_shares(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # empty
    refused = state_layout.refusal(ProviderConfig(state_dir=Path(place)).state_dir)
    assert "a home folder, or a folder that everybody shares" in str(refused)


def test_in_a_folder_that_all_may_write_in_another_users_mark_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("store-id", "other"):
        (tmp_path / name).write_text("x")
    assert state_layout.refusal(tmp_path) is None
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert state_layout.refusal(tmp_path) is None, "its owner let nobody else make it"
    tmp_path.chmod(0o1777)
    assert "'other'" in str(state_layout.refusal(tmp_path))


@pytest.mark.parametrize(("told", "umask"), [("077", 0o077), ("027", 0o027), ("", 0o077), ("000", 0o077), ("x", 0o077)])
def test_processes_on_other_machines(told: str, umask: int) -> None:
    take_umask({UMASK_VARIABLE: told})
    assert os.umask(0o022) == umask


def test_folders_above_are_private_too(tmp_path: Path) -> None:
    Privacy().make_folder(tmp_path / "a" / "b" / "c")
    assert open_to_others(tmp_path / "a") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Privacy().make_folder(tmp_path / "file")
