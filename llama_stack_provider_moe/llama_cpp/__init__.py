"""Where llama.cpp's converter and library lie on this machine. Nothing of it ships here: `install` obtains it.

    tools = find_toolchain()        # raises NoToolchain, which names the command to run

An own checkout of version 0.5, built, is taken from `LLAMA_CPP_DIR`; what `moe-train export setup` installed, from the
cache: `MOE_TRAIN_CACHE`, else `XDG_CACHE_HOME/moe-train`, else `~/.cache/moe-train`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llama_stack_provider_moe.errors import NoToolchain

# File types as llama.cpp names them; `f32` to `q8_0` are the converter's, the others llama_model_quantize's.
GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s",
    "q5_k_m", "q6_k",
]  # fmt: skip
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)

VERSION = "0.5.0"
LICENCE = "MIT"
SETUP = "moe-train export setup"
FOLDER = f"llama.cpp-{VERSION}"
RECORD = "toolchain.json"
CONVERTER = "convert_hf_to_gguf.py"
# What the converter is made of; of an own checkout as well.
CONVERTER_PARTS = (CONVERTER, "conversion", "gguf-py/gguf")
_LIBRARY_FOLDERS = ("build/bin", "build/src", "lib", "bin", ".")
_LIBRARY_NAMES = ("libllama.so", "libllama.v*.so", "libllama.dylib")


@dataclass(frozen=True)
class Toolchain:
    """llama.cpp as it is on this machine.

    Attributes:
        converter: folder with convert_hf_to_gguf.py, conversion/ and gguf-py/.
        library: file of libllama, with those of ggml beside it.
        version: as recorded at the installation; of an own checkout "own".
        libraries_from: where the library comes from.
    """

    converter: Path
    library: Path
    version: str
    libraries_from: str


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Folder in which `moe-train export setup` installs."""
    environ = os.environ if environ is None else environ
    if given := environ.get("MOE_TRAIN_CACHE"):
        return Path(given).expanduser().absolute()
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "moe-train"


def find_toolchain(environ: Mapping[str, str] | None = None) -> Toolchain:
    """The toolchain of `LLAMA_CPP_DIR`, else the installed one.

    Raises:
        NoToolchain: there is none, or a part of it is missing.
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
        raise NoToolchain(f"llama.cpp in {root} lacks {missing[0]}; run `{SETUP}`, which mends it")
    return Toolchain(
        root / "converter", root / record["library"], record["version"], record["libraries_from"]
    )  # fmt: skip


def read_record(root: Path) -> dict[str, Any] | None:
    """What an installation wrote down: version, licence, sources, and sha256 of each file; None without one."""
    try:
        record: dict[str, Any] = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(record, dict) and {"version", "library", "libraries_from", "files"} <= set(record)
    return record if whole else None


def find_library(root: Path) -> Path | None:
    """The file of libllama below `root`, where builds and packages put it."""
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
        raise NoToolchain(f"LLAMA_CPP_DIR={root} is no built checkout of llama.cpp: it lacks {', '.join(missing)}")
    return Toolchain(root, library, "own", "LLAMA_CPP_DIR")
