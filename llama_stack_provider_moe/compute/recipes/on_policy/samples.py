"""The newest answers of a job in files of its folder: one for each generation."""

from collections.abc import Sequence
from pathlib import Path

from llama_stack_provider_moe.jobdir.samples import GeneratedSample


class SampleFiles:
    """Keeps at most so many answers.

    Args:
        folder: for the files.
        most: answers to keep; 0: none are written.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most

    def keep(self, step: int, samples: Sequence[GeneratedSample]) -> None:
        """Write the answers of a generation, and delete files that are then too many.

        Args:
            step: the optimiser step that learns from them first.
            samples: the answers.
        """
        if not self._most:
            return
        self._folder.mkdir(exist_ok=True)
        lines = "".join(f"{each.model_dump_json()}\n" for each in samples[: self._most])
        written = self._folder / f"{step:09d}.writing"
        written.write_text(lines, encoding="utf-8")
        written.rename(self._folder / f"{step:09d}.jsonl")
        files = sorted(self._folder.glob("*.jsonl"))
        each = max(1, len(samples))
        for old in files[: max(0, len(files) - max(1, self._most // each))]:
            old.unlink()
