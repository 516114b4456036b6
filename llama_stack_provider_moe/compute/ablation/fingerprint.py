"""A fingerprint that tells two models apart without reading all of their weights."""

import hashlib
from pathlib import Path

from llama_stack_provider_moe.compute.export.tensors import TensorEntry, read_model
from llama_stack_provider_moe.ground import liveness

# A trained tensor differs from its base nearly everywhere, so a small piece of each is enough.
_READ_BYTES = 4096
_PIECE_BYTES = 1 << 20


def fingerprint(folder: Path) -> str:
    """SHA-256 of every tensor's name, dtype and shape, and of 4 KiB from its middle.

    It does not depend on how the tensors are spread over files.

    Raises:
        ModelError: the folder's weights can't be read.
    """
    digest = hashlib.sha256()
    entries = read_model(folder)
    for name in liveness.counted("reading the fingerprint", sorted(entries), len(entries), "tensors"):
        entry = entries[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        digest.update(_middle(entry))
    return digest.hexdigest()


def _middle(entry: TensorEntry) -> bytes:
    count = min(entry.nbytes, _READ_BYTES)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start + (entry.nbytes - count) // 2)
        return file.read(count)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            liveness.alive()
    return digest.hexdigest()
