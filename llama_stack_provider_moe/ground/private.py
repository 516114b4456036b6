"""File modes: only the server's user may read training data and output of jobs.

Our own processes set their umask. The server runs inside the host's process, together with threads of others. There
each new file and folder gets its mode explicitly, by this module.
"""

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# The umask in octal digits, for processes on other machines, which can't inherit it.
UMASK_VARIABLE = "MOE_UMASK"


@dataclass(frozen=True)
class Privacy:
    """The modes of new files and folders.

    Attributes:
        group: Whether their group may read them.
    """

    group: bool = False

    @property
    def umask(self) -> int:
        """The permissions that new files do not get."""
        return 0o027 if self.group else 0o077

    def make_folder(self, path: Path) -> None:
        """Create the folder `path` and its missing parents.

        Raises:
            FileExistsError: `path` is not a folder.
        """
        missing = []
        above = path
        while not above.exists():
            missing.append(above)
            above = above.parent
        for folder in reversed(missing):
            folder.mkdir(mode=0o777 & ~self.umask, exist_ok=True)
        path.mkdir(exist_ok=True)

    def opener(self, path: str, flags: int) -> int:
        """An opener for `open` that creates files with these modes."""
        return os.open(path, flags, 0o666 & ~self.umask)

    def new_file(self, path: Path) -> BinaryIO:
        """Create a file, which must not exist, and open it for writing."""
        return open(path, "xb", opener=self.opener)

    def appended(self, path: Path) -> BinaryIO:
        """Open a file for appending; create it if it does not exist."""
        return open(path, "ab", opener=self.opener)

    def tighten(self, path: Path, note: Callable[[str], None]) -> None:
        """Remove access that an earlier version gave to others, if this user owns the file or folder.

        Args:
            path: The file or folder; links are not followed.
            note: Called with a message if the mode can't be changed.
        """
        try:
            found = path.lstat()
            if found.st_uid == os.geteuid() and found.st_mode & self.umask and not path.is_symlink():
                path.chmod(stat.S_IMODE(found.st_mode) & ~self.umask)  # set-group-ID stays
        except FileNotFoundError:
            return
        except OSError as error:
            note(f"{path}: other users can read it, and its mode can't be changed ({error.strerror})")


def take_umask(environment: Mapping[str, str]) -> None:
    """Set this process's umask to the server's, or to that of private files if the server gave none."""
    given = environment.get(UMASK_VARIABLE, "")
    os.umask(int(given, 8) if given in ("027", "077") else Privacy().umask)


def as_new_files(folder: Path, pattern: str = "*.safetensors") -> None:
    """Give files in `folder` the mode that this process's umask gives to a new file there.

    safetensors (since 0.6) writes through a temporary file that only its owner can read, and keeps that mode, whatever
    the umask: a model that its user shares, or a job's that a group may read, would not be readable.

    Args:
        folder: The folder, with everything below it. It is not in use yet, so no other process creates `.mode` there.
        pattern: Names of the files. Links are left alone.
    """
    files = [path for path in folder.rglob(pattern) if path.is_file() and not path.is_symlink()]
    if not files:
        return
    # Asking for the umask would mean setting it, for all threads; a default ACL counts as well.
    trial = folder / ".mode"
    trial.touch()
    mode = stat.S_IMODE(trial.stat().st_mode)
    trial.unlink()
    for path in files:
        path.chmod(mode)
