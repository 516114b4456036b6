"""Each state folder names its store. Two stores on one folder would treat each other's jobs as leftovers."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from sqlalchemy.engine import make_url

from llama_stack_provider_moe.control.store.opening import identity_of
from llama_stack_provider_moe.control.store.state_layout import STORE_FILE
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.server_config import ProviderConfig


def require_same_store(config: ProviderConfig) -> None:
    """Check that the state folder names the same store as the configuration. Creates nothing.

    Raises:
        InvalidInput: The folder names another store, or the store is damaged or of a newer version.
        OSError: The folder or the store's password can't be read.
        SQLAlchemyError: The store does not answer.
    """
    try:
        found = (config.state_dir / STORE_FILE).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    mine = identity_of(config.url)
    if found is not None and found != mine:
        raise _another_stores(config, found, mine)


def claim_state_folder(config: ProviderConfig, store: JobStore) -> None:
    """Assign the state folder to the store if it names no store yet.

    Raises:
        InvalidInput: The folder names another store.
        OSError: The folder can't be read or written.
    """
    mine = store.identity()
    found = _named(config.state_dir / STORE_FILE, mine)
    if found != mine:
        raise _another_stores(config, found, mine)


def _another_stores(config: ProviderConfig, found: str, mine: str | None) -> InvalidInput:
    url = make_url(config.url).render_as_string(hide_password=True)
    which, back = (f"id {mine}", "") if mine else ("which has no jobs yet", "put that store's file back, or ")
    way_out = f"{back}set store_url to that store, or state_dir to another folder"
    return InvalidInput(
        "state_dir",
        str(config.state_dir),
        f"a folder of the store {url} ({which}), or a new one: this one has the jobs of another store, "
        f"{found}. {way_out[0].upper()}{way_out[1:]}. If that store no longer exists, "
        f"delete {config.state_dir / STORE_FILE}: the folders of its jobs stay, but no list shows them",
    )


def _named(path: Path, mine: str) -> str:
    """Return the store that the folder names; if it names none, write `mine` first."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="ascii").strip()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(f"{mine}\n")
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):  # another process wrote it meanwhile
        os.link(name, path)
    os.unlink(name)
    return path.read_text(encoding="ascii").strip()
