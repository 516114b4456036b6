"""Playgrounds: one for each owner at a time, their prompts, and the answers that the training process writes.

An owner has one playground that waits or runs, because it holds a device while nobody asks anything. A second is
refused rather than put in the place of the first: somebody may be chatting in another window. `playground.replace`
cancels the first.
"""

from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import views
from llama_stack_provider_moe.control.server.safe_json import dumps
from llama_stack_provider_moe.control.server.stream import OutputPage
from llama_stack_provider_moe.control.server.wire_playground import (
    Playground,
    PromptAnswer,
    PromptLine,
    PromptStatus,
    RoutedToken,
    SentPrompt,
    SideAnswer,
    StoppedPrompt,
)
from llama_stack_provider_moe.control.store.job_filter import JobFilter
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput, NotFound, OverLimit
from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.jobdir.prompts import (
    Answered,
    Begun,
    Ended,
    Piece,
    PromptFiles,
    Routed,
    Text,
    pieces_from,
)
from llama_stack_provider_moe.jobdir.state import UNFINISHED
from llama_stack_provider_moe.spec import PlaygroundSpec
from llama_stack_provider_moe.spec.playground import MAX_WAITING, YIELD_S, AdapterSide, PromptRequest

RECIPE = "playground"
UNANSWERED = "the playground ended before it answered; resume it, or start another"
_RETRY_S = 5
_SOME = 16


def others(store: JobStore, owner: str, but: str | None = None) -> list[Job]:
    """Return the playgrounds of an owner that wait or run, newest first, but for those that are being cancelled.

    Args:
        store: the store.
        owner: as the store names owners.
        but: a job that does not count.
    """
    found = store.list(owner, _SOME, None, JobFilter(states=tuple(UNFINISHED), recipe=RECIPE, owner=owner))
    return [job for job in found if job.id != but and job.cancel_requested_at is None]


def must_be_alone(store: JobStore, owner: str, but: str | None = None) -> None:
    """Raise `Conflict` if the owner has another playground; see `others`."""
    for other in others(store, owner, but):
        raise Conflict(f"playground: {other.id!r} is your playground already, of {other.model}, and you can have one "
                       "at a time; use it, cancel it, or set playground.replace to true, which cancels it")  # fmt: skip


def replace_others(store: JobStore, new: Job) -> None:
    """Cancel the other playgrounds of the owner of a new one."""
    for other in others(store, new.owner, but=new.id):
        store.request_cancel(other.id, new.owner)


def in_the_way(store: JobStore) -> str | None:
    """Return what a waiting job is told if the supervisor has asked a playground to make room; else None."""
    for job in store.running():
        # Whose it is, and its name, are not for the owner of another job.
        if job.recipe == RECIPE and PromptFiles(views.folder_of(job).prompts).wanted.exists():
            return (
                f"a playground has the place of a waiting job; it ends once it has had no prompt for {YIELD_S} seconds"
            )
    return None


def files_of(job: Job) -> PromptFiles:
    """Return the files of a playground.

    Raises:
        Conflict: the job is no playground.
        Forbidden: the folder, or the job's, is a link.
    """
    if job.recipe != RECIPE:
        raise Conflict(f"job {job.id!r} is no playground: its recipe is {job.recipe!r}")
    files = PromptFiles(views.folder_of(job).prompts)
    for path in (files.folder, files.model, files.closed):
        if path.is_symlink():
            raise Forbidden(f"{path.name} of job {job.id!r} is a link; the server reads only files in the job's folder")
    return files


def spec_of(job: Job) -> PlaygroundSpec:
    """Return the settings of a playground; raise `Conflict` if they can't be read."""
    try:
        spec = views.folder_of(job).read_spec()
    except (OSError, ValidationError) as error:
        raise Conflict(f"job {job.id!r} has no readable spec.json ({type(error).__name__})") from None
    assert isinstance(spec, PlaygroundSpec), "the row and spec.json name the same recipe"
    return spec


def standing(job: Job) -> Playground:
    """Return a playground and its prompts."""
    files, spec = files_of(job), spec_of(job)
    return Playground(
        job_uuid=job.id,
        status=job.state,
        is_open=_why_closed(job, files) is None,
        loaded=files.read_model(),
        idle_s=spec.playground.idle_s,
        max_new_tokens=spec.playground.max_new_tokens,
        data=[PromptLine(number=number, status=_status(job, files, number)) for number in files.numbers()],
    )


def send(job: Job, asked: PromptRequest, privacy: Privacy) -> SentPrompt:
    """Put a prompt into a playground.

    Args:
        job: the playground.
        asked: the prompt.
        privacy: modes of new files.

    Raises:
        Conflict: it takes no prompts any more, or is no playground.
        InvalidInput: it can't answer this one.
        OverLimit: too many prompts wait.
    """
    files = files_of(job)
    _check(job, asked, files)
    privacy.make_folder(files.folder)
    number = files.add(asked, 0o666 & ~privacy.umask)
    waiting = files.waiting()
    ahead = sum(each < number for each in waiting)
    if ahead >= MAX_WAITING:
        files.withdraw(number)
        raise OverLimit(f"{MAX_WAITING} prompts of playground {job.id!r} wait for their answers, which is the limit; "
                        "stop some, or wait", _RETRY_S)  # fmt: skip
    # After the prompt is written: the training process writes `closed` first, and then looks for prompts.
    if files.closed.exists() and not files.answer(number).exists():
        files.withdraw(number)
        raise Conflict(_closed(job, "it has had no prompt for a while and ends"))
    return SentPrompt(job_uuid=job.id, number=number, ahead=ahead)


def _check(job: Job, asked: PromptRequest, files: PromptFiles) -> None:
    why = _why_closed(job, files)
    if why is not None:
        raise Conflict(_closed(job, why))
    spec = spec_of(job)
    longest = spec.playground.max_new_tokens
    if asked.max_tokens > longest:
        raise InvalidInput("max_tokens", asked.max_tokens, f"at most {longest}, playground.max_new_tokens of this job")
    if asked.adapter != "on" and spec.adapter_folder is None:
        raise InvalidInput("adapter", asked.adapter, f"'on', because playground {job.id!r} has no adapter to switch "
                           f"off: {job.model} is a whole model")  # fmt: skip
    loaded = files.read_model()
    if asked.routing and loaded is not None and not loaded.moe_layers:
        raise InvalidInput("routing", True, "false, because the model is dense: it has no experts")


def _why_closed(job: Job, files: PromptFiles) -> str | None:
    if job.state not in UNFINISHED:
        return f"it is {job.state.value}"
    if job.cancel_requested_at is not None:
        return "it is being cancelled"
    return "it has had no prompt for a while and ends" if files.closed.exists() else None


def _closed(job: Job, why: str) -> str:
    return f"playground {job.id!r} takes no prompts: {why}; start another"


def answer(job: Job, number: int) -> PromptAnswer:
    """Return a prompt and its answer so far.

    Raises:
        NotFound: there is no such prompt, or it is old and was removed.
    """
    files = files_of(job)
    asked = _prompt(job, files, number)
    pieces, start = list[Piece](), 0
    while True:
        found, end = pieces_from(files.answer(number), start)
        pieces += found
        if end == start:
            break
        start = end
    status = _status(job, files, number)
    error = next((piece.error for piece in pieces if isinstance(piece, Ended)), None)
    if status == "failed" and error is None:
        error = UNANSWERED
    sides = {piece.side: _side(piece, pieces) for piece in pieces if isinstance(piece, Begun)}
    return PromptAnswer(job_uuid=job.id, number=number, status=status, prompt=asked, answers=sides, error=error)


def _side(begun: Begun, pieces: list[Piece]) -> SideAnswer:
    side: AdapterSide = begun.side
    ended = next((piece for piece in pieces if isinstance(piece, Answered) and piece.side == side), None)
    written = "".join(piece.text for piece in pieces if isinstance(piece, Text) and piece.side == side)
    return SideAnswer(
        prompt_tokens=begun.prompt_tokens,
        text=written if ended is None else ended.text,
        tokens=None if ended is None else ended.tokens,
        reason=None if ended is None else ended.reason,
        seconds=None if ended is None else ended.seconds,
        routing=[
            RoutedToken(id=piece.id, token=piece.token, experts=piece.experts, weights=piece.weights)
            for piece in pieces
            if isinstance(piece, Routed) and piece.side == side
        ],
    )


def page(job: Job, number: int, start: int) -> OutputPage:
    """Return what is new in an answer from byte `start` on, for a stream; its end has the prompt's status."""
    files = files_of(job)
    if not files.prompt(number).exists():
        raise _no_prompt(job, number)
    status = _status(job, files, number)  # before the answer is read, so that no piece is missed
    pieces, end = pieces_from(files.answer(number), start)
    shown = [piece.model_dump(mode="json") for piece in pieces]
    text = dumps({"pieces": shown, "cursor": end}) if shown else None
    return OutputPage(status in ("answered", "failed"), status, job.id, text, end)


def stop(job: Job, number: int, privacy: Privacy) -> StoppedPrompt:
    """Withdraw a prompt that waits, or end its answer.

    Args:
        job: the playground.
        number: of the prompt.
        privacy: modes of new files.
    """
    files = files_of(job)
    _prompt(job, files, number)
    if files.is_answered(number):
        return StoppedPrompt(job_uuid=job.id, number=number, status="answered")
    if not files.answer(number).exists():
        files.withdraw(number)
        return StoppedPrompt(job_uuid=job.id, number=number, status="withdrawn")
    privacy.appended(files.stop(number)).close()
    return StoppedPrompt(job_uuid=job.id, number=number, status="stopping")


def _prompt(job: Job, files: PromptFiles, number: int) -> PromptRequest:
    try:
        return files.read_prompt(number)
    except FileNotFoundError:
        raise _no_prompt(job, number) from None
    except ValueError as error:
        raise Conflict(f"prompt {number} of playground {job.id!r} can't be read ({type(error).__name__})") from None


def _no_prompt(job: Job, number: int) -> NotFound:
    return NotFound(f"playground {job.id!r} has no prompt {number}; it was never sent, was withdrawn, or is old")


def _status(job: Job, files: PromptFiles, number: int) -> PromptStatus:
    path: Path = files.answer(number)
    if files.is_answered(number):
        return "failed" if files.has_failed(number) else "answered"
    if job.state not in UNFINISHED:
        return "failed"
    return "answering" if path.exists() else "waiting"
