"""The tree of errors that this package raises on purpose.

    MoeError                      500  never raised itself
    ├── InvalidInput              400  a value that is not valid: field, value, expectation
    │   ├── InvalidBody           400  a request's body with one or more problems
    │   ├── InvalidConfig              a server's configuration, or its machine, has problems; it does not start
    │   └── InvalidRows           400  rows of a data set: number, field, reason
    ├── Forbidden                 403  exists, but is not allowed for this caller or on this server
    ├── NotFound                  404  no such job, data set, artifact or model
    ├── Conflict                  409  the job's state, or a name already in use, does not allow it
    ├── StoreReplaced             503  the job store's file was deleted or replaced while it was open
    ├── InvalidFile               400  a file written by somebody else can't be used: which, and why
    ├── OverLimit                 429  the owner is at a limit of this server: what is left, and when
    ├── TooLarge                  413  a data set is larger than the server accepts
    ├── NoRoom                    507  the server's disk is full
    ├── Unavailable               503  the store, a folder or a thread is not available now; try again
    ├── NoToolchain               501  llama.cpp, which GGUF files need, is not on this machine
    ├── ServerRefused                  raised by clients: the server refused the request
    ├── ServerLost                     raised by clients: no server, or one that stopped answering
    └── TrainingError             500  raised in the training process; the job ends as `failed`
        ├── ModelError                 the model can't be loaded, or is not a kind that we train
        ├── LayoutError                a Mixture-of-Experts model with parts that were not found
        ├── AdapterError               an adapter was requested where it is not possible
        ├── DataError                  rows have a valid form, but can't be used as requested
        ├── CheckpointError            a checkpoint is missing, incomplete or from another job
        ├── ForkRefused                a process with other threads was asked to fork
        ├── GraderFailed               a grader gave no value for too many answers
        └── ExportError                an export failed, or an exported file behaves differently from the model

`status` is the HTTP code that a host answers with; only `control.server.routes` reads it.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class MoeError(Exception):
    """Base of the tree; its text is written for the person who sent the request."""

    status: ClassVar[int] = 500


class InvalidInput(MoeError, ValueError):
    """A value that is not valid.

    Args:
        field: dotted path of the field, as the caller wrote it (`training.lr`).
        value: what the caller gave.
        expected: the range or the list of valid values.
    """

    status = 400

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field = field
        self.value = value
        self.expected = expected
        super().__init__(f"{field}: {shorten(value)} is not valid; expected {expected}")

    @classmethod
    def missing(cls, field: str, expected: str) -> "InvalidInput":
        """Return the error for a value that was not given; `None` is not what its caller wrote."""
        made = cls(field, None, expected)
        made.args = (f"{field}: is missing; expected {expected}",)
        return made


class InvalidBody(InvalidInput):
    """A request's body with one or more problems, each a sentence that names its field."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        ValueError.__init__(self, "; ".join(problems))


class InvalidConfig(InvalidInput):
    """A server's configuration, or its machine, with one or more problems.

    Args:
        where: file and provider.
        problems: each a line that names a setting, its value and the expectation.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        ValueError.__init__(self, "\n  ".join([f"{where}: {count}", *problems]))


class RowProblem(NamedTuple):
    """One problem of one row; `row` counts from 1, as an editor counts lines."""

    row: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.field}: {self.reason}"


class InvalidRows(InvalidInput):
    """Rows that are not valid: the text names the first `SHOWN`, and states how many there are.

    Args:
        dataset_id: the data set.
        problems: the first problems.
        count: number of all problems.
        total_rows: number of rows in the data set.
        looked_at: number of rows that were rendered with the model's chat template, which can't render `count` of
            them; None: every row was checked, and not with a template.
    """

    SHOWN: ClassVar[int] = 20

    def __init__(
        self,
        dataset_id: str,
        problems: Sequence[RowProblem],
        count: int,
        total_rows: int,
        looked_at: int | None = None,
    ) -> None:
        self.dataset_id = dataset_id
        self.problems = tuple(problems[: self.SHOWN])
        self.count = count
        self.total_rows = total_rows
        shown = "; ".join(str(problem) for problem in self.problems)
        more = "" if count <= len(self.problems) else f"; and {count - len(self.problems)} more"
        seen, how = total_rows, ""
        if looked_at is not None:
            seen, how = looked_at, f"{looked_at} of {total_rows} rows looked at with the model's chat template: "
        ValueError.__init__(self, f"dataset {dataset_id!r}: {how}{count} problem(s) in {seen} row(s): {shown}{more}")


class Forbidden(MoeError):
    """The caller may not do this, or this server's configuration does not allow it."""

    status = 403


class NotFound(MoeError):
    """No such job, data set, artifact or model."""

    status = 404


class Conflict(MoeError):
    """The state of a job, or a name already in use, does not allow it."""

    status = 409


class Superseded(Conflict):
    """A job is no longer as the supervisor saw it, so nothing was changed."""


class LeaseLost(Conflict):
    """Another supervisor has the store's lease, so nothing was changed."""


class TooLarge(MoeError):
    """A data set is larger than this server accepts, or its owner's quota is used up; nothing was stored."""

    status = 413


class OverLimit(MoeError):
    """The owner of the request is at a limit of this server, so nothing was changed.

    Args:
        message: the limit, what is left of it, and when to try again.
        retry_after_s: whole seconds after which to try again (`Retry-After`); None: time alone changes nothing.
    """

    status = 429

    def __init__(self, message: str, retry_after_s: int | None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class NoRoom(MoeError):
    """The server's disk is full; nothing was stored."""

    status = 507


class StoreReplaced(MoeError):
    """The job store's file was replaced while this process had it open, so nothing written there would last."""

    status = 503


class Unavailable(MoeError):
    """Something that a request needs does not answer, or is busy; the same request may succeed in a moment.

    Args:
        message: what is unavailable, for a person.
        retry_after_s: whole seconds after which to try again (`Retry-After`).
    """

    status = 503

    def __init__(self, message: str, retry_after_s: int = 2) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class InvalidFile(MoeError, ValueError):
    """A file that somebody else wrote can't be used.

    Args:
        path: the file.
        reason: what is wrong with it, to follow the file's name: "is a FIFO, not a regular file".
    """

    status = 400

    def __init__(self, path: object, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{shorten(str(path), 300)} {reason}")


class NoToolchain(MoeError):
    """llama.cpp's converter or library is not on this machine; the text names the command that installs it."""

    status = 501


class ServerRefused(MoeError):
    """A server refused a request of a client.

    Args:
        message: the server's own text, unchanged.
        answered: its HTTP status.
    """

    def __init__(self, message: str, answered: int) -> None:
        self.answered = answered
        super().__init__(message)


class ServerLost(MoeError):
    """No server answers a client, or it stopped in the middle of its answer.

    Args:
        message: which server, and what happened.
        asked: whether the request may have reached it.
    """

    def __init__(self, message: str, asked: bool) -> None:
        self.asked = asked
        super().__init__(message)


class TrainingError(MoeError):
    """Raised in the training process; its text becomes the reason of a failed job."""


class ModelError(TrainingError):
    """The model can't be loaded, or is not a kind that we train."""


class LayoutError(TrainingError):
    """A Mixture-of-Experts model with parts that were not found where its family has them."""


class AdapterError(TrainingError):
    """An adapter was requested where it is not possible, or it reached nothing."""


class DataError(TrainingError):
    """Rows have a valid form, but can't be used as requested."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, incomplete or from another job."""


class ForkRefused(TrainingError):
    """A process with other threads was asked to fork, which could make the child hang."""


class GraderFailed(TrainingError):
    """A grader gave no value for too many answers."""


class EngineFailed(TrainingError):
    """What generates a job's answers (`rl.engine`) can't be reached, or does not do what it is asked."""


class ExportError(TrainingError):
    """An export failed, or an exported file behaves differently from the model."""


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)`, cut at `limit` characters; a large value is never spelled out beyond that."""
    text = _spelled(value, limit)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _spelled(value: object, limit: int) -> str:
    """`repr(value)`: all of it up to `limit` characters, else at least the first `limit`."""
    if isinstance(value, str | bytes):
        return repr(value[: limit + 1])
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        return f"{'-' if value < 0 else ''}0x{abs(value) >> max(0, value.bit_length() - 4 * limit):x}"
    if not isinstance(value, list | dict):
        return repr(value)
    text = opening = "{" if isinstance(value, dict) else "["
    for each in value:
        room = limit - len(text)
        if room < 0:
            return text
        text += "" if text == opening else ", "
        text += _spelled(each, room)
        if isinstance(value, dict):
            text += f": {_spelled(value[each], room)}"
    return text + ("}" if isinstance(value, dict) else "]")
