"""`ImageFolder`: the images of a data set or of a job, each once, as a file that its SHA-256 names."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.spec.rows.images import FOLDER, ImagePart, file_name

LEAST_BYTES = 4096  # that an image counts: a block of a disk, so that a quota bounds the number of files too


class ImageFolder:
    """Writes images into a folder, which the first one creates.

    Args:
        path: the folder.
        privacy: modes of its files.
        admit: called with the size of each new file in bytes, at least `LEAST_BYTES`; raises if there is no room.
    """

    def __init__(self, path: Path, privacy: Privacy, admit: Callable[[int], None]) -> None:
        self.path = path
        self._privacy = privacy
        self._admit = admit

    def keep(self, content: bytes, part: ImagePart) -> None:
        """Write an image, unless it is there."""
        place = self._place(part)
        if place.exists():
            return
        self._admit(max(len(content), LEAST_BYTES))
        self._privacy.make_folder(self.path)
        try:
            with self._privacy.new_file(place) as file:
                file.write(content)
        except BaseException:
            place.unlink(missing_ok=True)
            raise

    def has(self, part: ImagePart) -> bool:
        """Whether an image is there."""
        return self._place(part).exists()

    def take_from(self, other: Path, part: ImagePart) -> bool:
        """Take an image of another folder, as a second name of its file where the disk allows that, or as a copy.

        Args:
            other: the other folder, of this server.
            part: names the image.

        Returns:
            Whether the image is here now; False if the other folder does not have it.
        """
        place, source = self._place(part), other / file_name(part["sha256"], part["format"])
        if place.exists():
            return True
        try:
            found = source.lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode):
            return False
        self._admit(max(found.st_size, LEAST_BYTES))
        self._privacy.make_folder(self.path)
        try:
            os.link(source, place)
        except FileNotFoundError:  # deleted just now
            return False
        except OSError:  # another disk, or a file system without links
            with source.open("rb") as file, self._privacy.new_file(place) as out:
                shutil.copyfileobj(file, out)
        return True

    def sync(self) -> None:
        """Write all images to the disk."""
        if not self.path.exists():
            return
        for place in (*self.path.iterdir(), self.path):
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _place(self, part: ImagePart) -> Path:
        return self.path / file_name(part["sha256"], part["format"])


def beside(rows: Path) -> Path:
    """Return the folder with the images of a file of rows."""
    return rows.with_name(FOLDER)
