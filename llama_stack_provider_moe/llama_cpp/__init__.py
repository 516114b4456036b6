"""Find llama.cpp's converter and library on this machine. They are not part of this package; `install` installs them.

    tools = find_toolchain()        # raises NoToolchain, which names the command to run

`LLAMA_CPP_DIR` may name your own built checkout of version 0.5. Otherwise the toolchain is in the cache, into which
`moe-train export setup` installs: `MOE_TRAIN_CACHE`, else `XDG_CACHE_HOME/moe-train`, else `~/.cache/moe-train`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from llama_stack_provider_moe.errors import NoToolchain

VERSION = "0.5.0"
LICENCE = "MIT"
SETUP = "moe-train export setup"
FOLDER = f"llama.cpp-{VERSION}"
RECORD = "toolchain.json"
CONVERTER = "convert_hf_to_gguf.py"
# The parts of the converter, also in a checkout.
CONVERTER_PARTS = (CONVERTER, "conversion", "gguf-py/gguf")
_LIBRARY_FOLDERS = ("build/bin", "build/src", "lib", "bin", ".")
_LIBRARY_NAMES = ("libllama.so", "libllama.v*.so", "libllama.dylib")


@dataclass(frozen=True)
class Toolchain:
    """llama.cpp as found on this machine.

    Attributes:
        converter: Folder with convert_hf_to_gguf.py, conversion/ and gguf-py/.
        library: File of libllama, with those of ggml beside it.
        version: Version recorded at the installation; "own" for your own checkout.
        libraries_from: Where the library comes from.
    """

    converter: Path
    library: Path
    version: str
    libraries_from: str


class Installation(TypedDict):
    """The record of an installation, in `toolchain.json`."""

    version: str
    licence: str
    library: str
    libraries_from: str
    converter_from: str
    files: dict[str, str]  # SHA-256 by relative path


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder into which `moe-train export setup` installs."""
    environ = os.environ if environ is None else environ
    if given := environ.get("MOE_TRAIN_CACHE"):
        return Path(given).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "moe-train"


def find_toolchain(environ: Mapping[str, str] | None = None) -> Toolchain:
    """Return the toolchain of `LLAMA_CPP_DIR`, or else the installed one.

    Raises:
        NoToolchain: There is none, or a part of it is missing.
    """
    environ = os.environ if environ is None else environ
    if own := environ.get("LLAMA_CPP_DIR"):
        return _own(Path(own).expanduser().absolute())
    root = cache_dir(environ) / FOLDER
    record = read_record(root)
    if record is None:
        raise NoToolchain(
            f"GGUF files need llama.cpp's converter and library, which are not in {root}; run `{SETUP}`, or set "
            "LLAMA_CPP_DIR to a built checkout of llama.cpp 0.5"
        )
    missing = [name for name in record["files"] if not (root / name).is_file()]
    if missing:
        raise NoToolchain(f"llama.cpp in {root} lacks {missing[0]}; run `{SETUP}`, which repairs it")
    return Toolchain(
        root / "converter", root / record["library"], record["version"], record["libraries_from"]
    )  # fmt: skip


def read_record(root: Path) -> Installation | None:
    """Read the record of an installation: version, licence, sources and SHA-256 of each file; None if there is none."""
    try:
        record: Installation = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = isinstance(record, dict) and {"version", "library", "libraries_from", "files"} <= set(record)
    return record if complete else None


def find_library(root: Path) -> Path | None:
    """Find the file of libllama below `root`, where builds and packages put it."""
    for folder in _LIBRARY_FOLDERS:
        for name in _LIBRARY_NAMES:
            if found := sorted((root / folder).glob(name)):
                return found[0]
    return None


def _own(root: Path) -> Toolchain:
    missing = [part for part in CONVERTER_PARTS if not (root / part).exists()]
    library = find_library(root)
    if library is None:
        missing.append("libllama (build it: cmake -B build -DBUILD_SHARED_LIBS=ON && cmake --build build)")
    if missing or library is None:
        raise NoToolchain(f"LLAMA_CPP_DIR={root} is not a built checkout of llama.cpp: it lacks {', '.join(missing)}")
    return Toolchain(root, library, "own", "LLAMA_CPP_DIR")
