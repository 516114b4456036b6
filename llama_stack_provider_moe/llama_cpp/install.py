"""`moe-train export setup`: install llama.cpp's converter and library into the user's cache, with pip and npm.

- The converter (`conversion/` and its own `gguf`) is in the source distribution of llama-cpp-python, which pip fetches.
- The library is prebuilt in an npm package (Linux x86-64, glibc 2.34), which npm fetches. Without npm, pip builds it
  from that source distribution; this needs a C++ compiler, cmake (which pip installs) and some 13 minutes.

Versions and SHA-256 are pinned here and checked before anything is unpacked. The installation must pass llama.cpp's own
tokenisation tests, and then appears by one rename. If two setups run at once, the second one uses the first's result.
"""

import fcntl
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llama_stack_provider_moe.errors import ExportError, InvalidInput, NoRoom, NoToolchain
from llama_stack_provider_moe.llama_cpp import (
    CONVERTER,
    FOLDER,
    LICENCE,
    RECORD,
    VERSION,
    Installation,
    Toolchain,
    cache_dir,
    find_library,
    find_toolchain,
    read_record,
)
from llama_stack_provider_moe.llama_cpp.process import ask_llama, run_bounded, scratch
from llama_stack_provider_moe.llama_cpp.unpack import check, sha256, unpack

Say = Callable[[str], None]
SOURCES = ("npm", "build")


@dataclass(frozen=True)
class Package:
    """A pinned file of a package registry."""

    name: str
    version: str
    sha256: str


SDIST = Package("llama-cpp-python", "0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
PREBUILT = Package(
    "@node-llama-cpp/linux-x64", "3.22.1", "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0"
)
_PREBUILT_GLIBC = (2, 34)
_NEEDED_BYTES = 400 << 20  # the source distribution, pip's copy of it, and what is unpacked: 217 MB measured
_FETCH_TIMEOUT_S = 900.0
_BUILD_TIMEOUT_S = 2 * 3600.0
_SELF_TEST_TIMEOUT_S = 300.0
_VOCABULARY = "models/ggml-vocab-gpt-2.gguf"
_IN_SDIST = re.compile(
    r"llama_cpp_python-[\d.]+/vendor/llama\.cpp/"
    rf"({re.escape(CONVERTER)}|LICENSE|conversion/\w+\.py|gguf-py/LICENSE|gguf-py/gguf/[\w.]+|"
    rf"{re.escape(_VOCABULARY)}(?:\.inp|\.out)?)"
)
_IN_PREBUILT = re.compile(r"package/bins/linux-x64/(lib(?:llama\.|ggml)[\w.-]*\.so)")
_IN_BUILT = re.compile(r"llama_cpp/lib/(lib(?:llama|ggml)[\w.-]*\.(?:so|dylib)[\d.]*)")


def install(
    libraries: str | None = None, cache: Path | None = None, say: Say = lambda line: None
) -> tuple[Toolchain, bool]:
    """Install the toolchain unless it is complete; return it, and whether anything was installed.

    Args:
        libraries: "npm" or "build"; by default npm if it is usable.
        cache: Folder to install into; by default the user's cache.
        say: Called with a line about each step.

    Raises:
        InvalidInput: `libraries` has another value.
        NoToolchain: pip, npm or a compiler is missing, or the platform is not supported; the text says which.
        NoRoom: There is not enough disk space.
        ExportError: A download failed, has the wrong hash, or does not work on this machine.
    """
    if libraries is not None and libraries not in SOURCES:
        raise InvalidInput("libraries", libraries, f"one of {', '.join(SOURCES)}")
    cache = cache or cache_dir()
    root = cache / FOLDER
    cache.mkdir(parents=True, exist_ok=True)
    with _exclusive(cache):
        if _is_complete(root, libraries):
            return find_toolchain({"MOE_TRAIN_CACHE": str(cache)}), False
        free = shutil.disk_usage(cache).free
        if free < _NEEDED_BYTES:
            raise NoRoom(f"{cache}: the installation needs {_NEEDED_BYTES:,} bytes, but only {free:,} are free")
        for stale in cache.glob(f".{FOLDER}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=cache) as folder:
            made = _make(Path(folder), libraries or _best_source(), say)
            if root.exists():
                root.rename(Path(folder) / "replaced")
            made.rename(root)
    return find_toolchain({"MOE_TRAIN_CACHE": str(cache)}), True


def missing_for_conversion() -> list[str]:
    """Return the packages that the converter imports and that this Python lacks."""
    needed = ("torch", "transformers", "sentencepiece", "numpy", "yaml")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _make(folder: Path, source: str, say: Say) -> Path:
    began = time.monotonic()
    say(f"pip: {SDIST.name} {SDIST.version}, source distribution")
    sdist = _by_pip(folder / "pip")
    made = folder / "made"
    files = [f"converter/{name}" for name in unpack(sdist, _in_sdist, made / "converter")]
    if source == "npm":
        say(f"npm: {PREBUILT.name} {PREBUILT.version}")
        package = _by_npm(folder / "npm")
        found = unpack(package, _in_library(_IN_PREBUILT), made / "lib")
        origin = f"npm {PREBUILT.name} {PREBUILT.version}"
    else:
        say("pip: building llama.cpp from the source distribution, some 13 minutes of one core")
        package = _by_building(folder / "build", sdist)
        found = unpack(package, _in_library(_IN_BUILT), made / "lib")
        origin = f"built from {SDIST.name} {SDIST.version}"
    library = find_library(made)
    if library is None or f"converter/{CONVERTER}" not in files:
        raise ExportError(f"{sdist.name} and {package.name} contain no {CONVERTER} or no libllama")
    files += [f"lib/{name}" for name in found]
    record: Installation = {
        "version": VERSION, "licence": LICENCE, "library": str(library.relative_to(made)), "libraries_from": origin,
        "converter_from": f"pip {SDIST.name} {SDIST.version}",
        "files": {name: sha256(made / name) for name in files},
    }  # fmt: skip
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(f"self-test: {_self_test(made / 'converter', library)} texts tokenised as llama.cpp's own tests expect")
    say(f"done in {time.monotonic() - began:.1f} s")
    return made


def _self_test(converter: Path, library: Path) -> int:
    """Run llama.cpp's own tokenisation test with the library; return the number of texts.

    Raises:
        ExportError: The library does not load on this machine, or tokenises a text differently.
    """
    vocabulary = converter / _VOCABULARY
    texts = Path(f"{vocabulary}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = Path(f"{vocabulary}.out").read_text(encoding="utf-8").split("\n")
    with scratch() as folder:
        request = {"do": "tokenize", "gguf": str(vocabulary), "texts": texts}
        answer = ask_llama(library, request, Path(folder), _SELF_TEST_TIMEOUT_S)
    for text, tokens, line in zip(texts, answer["tokens"], expected, strict=False):
        if tokens != [int(each) for each in line.split()]:
            raise ExportError(f"libllama tokenises {text!r} to {tokens}, not to {line.split()}, on this machine")
    return len(answer["tokens"])


def _by_pip(folder: Path) -> Path:
    """Fetch the source distribution; pip checks its hash before it runs its build backend, and we check it again."""
    if importlib.util.find_spec("pip") is None:
        raise NoToolchain(
            f"{sys.executable} has no pip, which is needed to fetch llama.cpp's converter; install it with ensurepip"
        )
    folder.mkdir()
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{SDIST.name}=={SDIST.version} --hash=sha256:{SDIST.sha256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps",
        "--no-binary", ":all:", "--require-hashes", "--requirement", str(wanted), "--dest", str(folder),
    ]  # fmt: skip
    # pip asks the build backend for the metadata of a source distribution. If it is installed, pip need not fetch it.
    if importlib.util.find_spec("scikit_build_core") is not None:
        command.append("--no-build-isolation")
    _run(command, folder, _FETCH_TIMEOUT_S)
    return _the_one(folder, "llama_cpp_python-*.tar.gz", SDIST.sha256)


def _by_npm(folder: Path) -> Path:
    npm = _npm()
    if npm is None:
        raise NoToolchain(
            f"npm, which fetches {PREBUILT.name}, is not on the PATH; install Node.js, or use --libraries build"
        )
    if why_not := _why_not_prebuilt():
        raise NoToolchain(f"{PREBUILT.name} does not run here: {why_not}; use --libraries build")
    folder.mkdir()
    spec = f"{PREBUILT.name}@{PREBUILT.version}"
    _run([npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), spec], folder,
         _FETCH_TIMEOUT_S)  # fmt: skip
    return _the_one(folder, "*.tgz", PREBUILT.sha256)


def _by_building(folder: Path, sdist: Path) -> Path:
    if not any(shutil.which(each) for each in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        raise NoToolchain("there is no C++ compiler to build llama.cpp; install g++ or clang")
    folder.mkdir()
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps",
        "--wheel-dir", str(folder), str(sdist),
    ]  # fmt: skip
    _run(command, folder, _BUILD_TIMEOUT_S, CMAKE_ARGS="-DLLAVA_BUILD=OFF")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _best_source() -> str:
    return "npm" if _npm() is not None and not _why_not_prebuilt() else "build"


def _npm() -> str | None:
    return shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))


def _why_not_prebuilt() -> str:
    """Return why the prebuilt library does not run here; empty if it does."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it needs Linux on x86-64, but this is {sys.platform} on {platform.machine()}"
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(int(each) for each in version.split(".")[:2]) < _PREBUILT_GLIBC:
        return f"it needs glibc 2.34, but this is {name or 'another libc'} {version}"
    return ""


def _run(command: list[str], folder: Path, timeout_s: float, **more: str) -> None:
    # pip and npm get the whole environment, so that they use the user's configuration.
    ended = run_bounded(command, timeout_s, {**os.environ, **more}, cwd=folder)
    if ended.code or ended.timed_out:
        raise ExportError(f"{' '.join(command)}\n{ended.how}; its last output:\n{ended.tail[-2000:]}")


def _the_one(folder: Path, pattern: str, expected: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ExportError(f"expected one file {pattern}, but the client left {[each.name for each in found]}")
    check(found[0], expected)
    return found[0]


def _in_sdist(name: str) -> str | None:
    match = _IN_SDIST.fullmatch(name)
    return match[1] if match else None


def _in_library(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    def wanted(name: str) -> str | None:
        match = pattern.fullmatch(name)
        return PurePosixPath(match[1]).name if match else None

    return wanted


def _is_complete(root: Path, libraries: str | None) -> bool:
    """Whether every recorded file has its recorded content, and the library comes from the requested source."""
    record = read_record(root)
    if record is None or record["version"] != VERSION:
        return False
    if libraries is not None and not record["libraries_from"].startswith({"npm": "npm", "build": "built"}[libraries]):
        return False
    return all(
        (root / name).is_file() and sha256(root / name) == expected for name, expected in record["files"].items()
    )


@contextmanager
def _exclusive(cache: Path) -> Iterator[None]:
    """Allow one setup at a time; the others wait."""
    with (cache / f".{FOLDER}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
