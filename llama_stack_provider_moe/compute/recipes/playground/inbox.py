"""The prompts of a playground, as its training process sees them."""

from contextlib import closing, suppress
from pathlib import Path

from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.jobdir.prompts import AnswerLog, Ended, LoadedModel, PromptFiles

RESTARTED = "the playground was restarted while it answered; send the prompt again"


class Inbox:
    """The prompts of one playground.

    Args:
        folder: `JobFolder.prompts`.
    """

    def __init__(self, folder: Path) -> None:
        self.files = PromptFiles(folder)

    def reopen(self) -> None:
        """Take prompts again after an earlier attempt of the job: what it left half answered ends with an error."""
        self.files.folder.mkdir(exist_ok=True)
        for path in (self.files.closed, self.files.wanted, self.files.model):
            path.unlink(missing_ok=True)
        for number in self.files.numbers():
            if self.files.answer(number).exists() and not self.files.is_answered(number):
                with closing(AnswerLog(self.files.answer(number))) as log:
                    log.append(Ended(error=RESTARTED))

    def write_model(self, model: LoadedModel) -> None:
        """Tell what the loaded model has."""
        write_atomic(self.files.model, model)

    def next(self) -> int | None:
        """The number of the prompt to answer now; None if none waits."""
        return next(iter(self.files.waiting()), None)

    def close(self) -> bool:
        """Take no more prompts; False if one came at the last moment, which is then answered.

        The server writes a prompt first and then looks for this file, so one of the two sees the other.
        """
        self.files.closed.touch()
        if self.next() is None:
            return True
        with suppress(FileNotFoundError):
            self.files.closed.unlink()
        return False
