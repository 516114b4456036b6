"""Installing llama.cpp: only pinned files are unpacked, an installation is complete or absent, children have limits."""

import io
import platform
import shutil
import stat
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from llama_stack_provider_moe.errors import ExportError, InvalidInput, NoRoom, NoToolchain
from llama_stack_provider_moe.llama_cpp import FOLDER, VERSION, find_toolchain, install, process, unpack
from tests.support import llama_support
from tests.support.cli_support import moe_train


def tar(path: Path, members: Iterable[tuple[str, bytes | None]]) -> Path:
    """A .tgz; a member without content is a link to /etc/passwd."""
    with tarfile.open(path, "w:gz") as out:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content or b"")
            out.addfile(info, io.BytesIO(content or b""))
    return path


def test_what_is_wanted_is_unpacked(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tgz", [("p/lib/one.so", b"1"), ("p/other", None), ("p/lib/two.so", b"22")])
    wanted = install._in_library(install.re.compile(r"p/lib/(\w+\.so)"))
    assert unpack.unpack(archive, wanted, tmp_path / "out") == ["one.so", "two.so"]
    assert (tmp_path / "out" / "two.so").read_bytes() == b"22"
    zipped = tmp_path / "a.whl"
    with zipfile.ZipFile(zipped, "w") as out:
        out.writestr("p/lib/one.so", b"1")
    assert unpack.unpack(zipped, wanted, tmp_path / "zip") == ["one.so"]


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("../../evil", b"x")], "outside the folder"), ([("/tmp/evil", b"x")], "outside the folder"),
        ([("a", b"x"), ("a", b"y")], "or exists"), ([("a", None)], "not a plain file"),
    ],
)  # fmt: skip
def test_an_archive_that_means_harm(members: list[tuple[str, bytes | None]], why: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(ExportError, match=why):
        unpack.unpack(tar(tmp_path / "a.tgz", members), lambda name: name, out)
    assert not (tmp_path / "evil").exists()


def test_a_zip_that_means_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as out:
        out.writestr(link, "/etc/passwd")
    with pytest.raises(ExportError, match="not a plain file"):
        unpack.unpack(tmp_path / "a.whl", lambda name: name, tmp_path / "out")
    monkeypatch.setattr(unpack, "_MOST_BYTES", 10)
    with pytest.raises(ExportError, match="larger than the 10 bytes"):
        unpack.unpack(tar(tmp_path / "b.tgz", [("a", b"x" * 11)]), lambda name: name, tmp_path / "big")


def test_what_is_not_pinned_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npm that fetches another file than the pinned one."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text('#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do shift; done\necho other > "$2/a.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    monkeypatch.setattr(install, "_by_pip", lambda folder: _sdist(tmp_path))
    with pytest.raises(ExportError, match=rf"a\.tgz has sha256 .* not the pinned {install.PREBUILT.sha256}"):
        install.install("npm", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{FOLDER}.lock"]
    npm.write_text("#!/bin/sh\necho no such package >&2\nexit 3\n")
    with pytest.raises(ExportError, match=r"(?s)npm pack .* exit code 3; its last output:\nno such package"):
        install.install("npm", tmp_path / "cache")


def _sdist(folder: Path) -> Path:
    return tar(folder / "llama_cpp_python-0.tar.gz", [("llama_cpp_python-0.3.36/vendor/llama.cpp/LICENSE", b"MIT")])


def test_an_installation_is_made_once_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two setups at once; a copy of these tests' own installation replaces the download."""
    made: list[str] = []
    whole = llama_support.toolchain().converter.parent

    def copied(folder: Path, source: str, say: install.Say) -> Path:
        made.append(source)
        time.sleep(0.2)
        return Path(shutil.copytree(whole, folder / "made"))

    monkeypatch.setattr(install, "_make", copied)
    done: list[bool] = []
    both = [threading.Thread(target=lambda: done.append(install.install(cache=tmp_path)[1])) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert sorted(done) == [False, True]
    assert len(made) == 1
    tools = find_toolchain({"MOE_TRAIN_CACHE": str(tmp_path)})
    assert tools.version == VERSION
    tools.library.write_bytes(b"broken")
    (tmp_path / f".{FOLDER}-left").mkdir()
    assert install.install(cache=tmp_path)[1]
    assert len(made) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{FOLDER}.lock", FOLDER]
    tools.library.unlink()
    with pytest.raises(NoToolchain, match=r"lacks lib/libllama.* run `moe-train export setup`, which repairs it"):
        find_toolchain({"MOE_TRAIN_CACHE": str(tmp_path)})


def test_what_setup_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="npm, build"):
        install.install("conda", tmp_path)
    monkeypatch.setattr(install, "_by_pip", lambda folder: _sdist(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "which", lambda name, path=None: None)
        with pytest.raises(NoToolchain, match=r"no C\+\+ compiler"):
            install.install(cache=tmp_path)
        with pytest.raises(NoToolchain, match=r"npm, which fetches .*, is not on the PATH"):
            install.install("npm", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(platform, "machine", lambda: "aarch64")
        assert "this is linux on aarch64" in install._why_not_prebuilt()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    assert "needs glibc 2.34, but this is glibc 2.31" in install._why_not_prebuilt()
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(NoRoom, match="1,000 are free"):
        install.install(cache=tmp_path)


def test_what_is_missing_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(NoToolchain, match="run `moe-train export setup`, or set LLAMA_CPP_DIR"):
        find_toolchain({"MOE_TRAIN_CACHE": str(tmp_path)})
    with pytest.raises(NoToolchain, match=r"lacks convert_hf_to_gguf\.py, conversion, gguf-py/gguf, libllama"):
        find_toolchain({"LLAMA_CPP_DIR": str(tmp_path)})


def test_an_own_checkout_is_taken(tmp_path: Path) -> None:
    tools = llama_support.toolchain()
    for part in ("convert_hf_to_gguf.py", "conversion", "gguf-py"):
        (tmp_path / part).symlink_to(tools.converter / part)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "bin").symlink_to(tools.library.parent)
    own = find_toolchain({"LLAMA_CPP_DIR": str(tmp_path)})
    assert own.libraries_from == "LLAMA_CPP_DIR"
    assert install._self_test(tools.converter, own.library) == 47


def test_another_version_of_the_library_is_refused(tmp_path: Path) -> None:
    """Its structures would differ."""
    library = llama_support.toolchain().library
    for name in ("libggml.so", "libllama.so"):
        (tmp_path / name).symlink_to(next(library.parent.glob("libggml-base*")))
    with pytest.raises(ExportError, match=r"another version of llama\.cpp than 0\.5\.x"):
        process.ask_llama(tmp_path / "libllama.so", {"do": "tokenize"}, tmp_path, 60)


def test_children_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    env = process.allowed_environment(MORE="1")
    assert "HF_TOKEN" not in env
    assert env["MORE"] == "1"
    loud = "import sys\nfor i in range(20000): print('x' * 50, flush=i > 19998)\nsys.exit('the end')"
    ended = process.run_bounded([sys.executable, "-c", loud], 60, env)
    assert (ended.code, len(ended.tail) < 6001, ended.tail[-7:]) == (1, True, "the end")
    ended = process.run_bounded([sys.executable, "-c", "import time; time.sleep(600)"], 0.5, env)
    assert ended.timed_out
    assert "silent for too long" in ended.how
    ended = process.run_bounded([sys.executable, "-c", "import os; os.abort()"], 60, env)
    assert ended.how == "was ended by signal 6"
    full = process.failure("it", process.Ended(1, "OSError: [Errno 28] No space left on device", False))
    assert isinstance(full, NoRoom)


def test_setup_by_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_support.toolchain()
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(llama_support.CACHE))
    done = moe_train("export", "setup")
    assert done.code == 0
    assert f"llama.cpp {VERSION} (MIT licence) is already installed" in done.out
    document = moe_train("export", "setup", "--json").document
    assert (document["licence"], document["installed_now"], document["missing_packages"]) == ("MIT", False, [])
