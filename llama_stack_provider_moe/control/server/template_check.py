"""`TemplateChecker`: renders a sample of a job's rows with its model's chat template, in a child process.

The other side, and the messages, are `compute.data.template_check`. A chat template is a program from elsewhere, so it
runs neither in this process nor with any of its secrets. Whatever happens to the child, a job is not refused for it: a
note then says that its rows were not checked with the template.

A check never blocks the event loop: it runs in a thread of its own pool, one at a time.
"""

import contextlib
import json
import logging
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Literal, TypedDict

from pydantic import BaseModel

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.row_sample import SampledRow
from llama_stack_provider_moe.control.supervisor.executors.local import training_environment
from llama_stack_provider_moe.errors import Unavailable
from llama_stack_provider_moe.spec.server_config import ProviderConfig

MODULE = "llama_stack_provider_moe.compute.data.template_check"
LIMIT_S = 20.0  # for an answer, and for the start of the child before the first one
START_LIMIT_S = 180.0  # a child that still imports is not killed before; later jobs may use it
IDLE_S = 540.0  # shorter than the child's own limit: a request must not meet a child that is about to end
STOPPING_S = 0.25  # how often a check looks whether the server is stopping
LARGEST_ANSWER_BYTES = 1 << 20
# What the child needs of a training process's environment: its libraries, and the languages of texts.
PASSED_ON = frozenset({
    "PATH", "HOME", "TMPDIR", "TZ", "LANG", "LANGUAGE", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH",
})  # fmt: skip
DECIDED = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
log = logging.getLogger(__name__)

# learnt: rows that are learnt whole; pair: a prompt with two answers; answer: with one; break: the last answer;
# prompt: what is sent to the model; whole: a conversation with its answers, or a prompt.
Kind = Literal["learnt", "pair", "answer", "break", "prompt", "whole"]


class Sample(TypedDict):
    """The rows of one part of a job."""

    kind: Kind
    rows: list[SampledRow]


class Question(TypedDict):
    """What to check.

    Keys: model (folder with the tokenizer), name (the job's name for the model), chat_template
    (`options.chat_template`), rendering (turns, reasoning, special_tokens), parts (by `RowSource.part`).
    """

    model: str
    name: str
    chat_template: str | None
    rendering: Mapping[str, str]
    parts: Mapping[str, Sample]


class Checked(BaseModel):
    """The child's answer: one of these.

    Attributes:
        problems: (part, row number, field, reason) of each row that the template can't render.
        refused: why it can't render any conversation; follows the model's name.
        unavailable: why the rows could not be checked.
    """

    problems: list[tuple[str, int, str, str]] = []
    refused: str | None = None
    unavailable: str | None = None
    ready: bool = False


class TemplateChecker:
    """Checks samples, and keeps the child for the next ones.

    Args:
        config: has the interpreter of training processes.
    """

    def __init__(self, config: ProviderConfig) -> None:
        self._config = config
        self._pool = Pool("moe-templates", 1, 64, "checks of chat templates")
        self._lock = threading.Lock()  # of the two fields below
        self._child: _Child | None = None
        self._closed = False
        self._asking = threading.Lock()

    async def check(self, question: Question) -> Checked:
        """Return the rows that the template can't render; never raises for what the child or the template does."""
        try:
            busy = "the server is busy with other checks of chat templates"
            return await self._pool.within(2 * LIMIT_S, busy, self._ask, question)
        except Unavailable as unavailable:
            return Checked(unavailable=str(unavailable))

    @property
    def pid(self) -> int | None:
        """The process id of the child, if there is one."""
        with self._lock:
            return None if self._child is None else self._child.process.pid

    def close(self) -> None:
        """End the child; a check that runs gets no answer."""
        self._pool.close()
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.kill()
        with self._asking:  # the thread that reads from it has seen its end
            self._drop()

    def _ask(self, question: Question) -> Checked:
        with self._asking:
            deadline = time.monotonic() + LIMIT_S
            try:
                child = self._current()
                return child.ask(question, deadline) if child.becomes_ready(deadline) else self._failed(child.why)
            except TimeoutError:
                return self._late()
            except _StoppingError:
                self._drop()
                return Checked(unavailable="the server is stopping")
            except (OSError, EOFError, ValueError) as error:
                return self._failed(f"its process ended or gave no answer that can be read ({type(error).__name__})")

    def _current(self) -> "_Child":
        with self._lock:
            if self._closed:
                raise EOFError
            if self._child is not None and self._child.usable():
                return self._child
        self._drop()
        with self._lock:
            if self._closed:
                raise EOFError
            self._child = _Child(self._config)
            return self._child

    def _late(self) -> Checked:
        child = self._child
        if child is not None and not child.ready:
            if time.monotonic() - child.began_s < START_LIMIT_S:
                return Checked(unavailable="the process that renders rows is still starting")
            return self._failed(f"the process that renders rows did not start within {START_LIMIT_S:g} s")
        return self._failed(f"the chat template gave no answer within {LIMIT_S:g} s")

    def _failed(self, why: str) -> Checked:
        self._drop()
        log.warning("rows were not checked with a chat template: %s", why)
        return Checked(unavailable=why)

    def _drop(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.close()


class _StoppingError(Exception):
    """The server is shutting down."""


class _Child:
    """One child process. Its methods are for one thread, but for `kill`."""

    def __init__(self, config: ProviderConfig) -> None:
        allowed = training_environment(os.environ, config)
        environment = {name: value for name, value in allowed.items() if name in PASSED_ON or name.startswith("LC_")}
        for name in config.secrets:
            environment.pop(name, None)
        self.began_s = self._used_s = time.monotonic()
        self.ready = False
        self.why = ""
        self._received = bytearray()
        self.process = subprocess.Popen(
            [config.training_python, "-m", MODULE],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a traceback could quote rows
            cwd="/",
            env=environment | DECIDED,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._from = self.process.stdin, self.process.stdout
        for pipe in (self._to, self._from):
            os.set_blocking(pipe.fileno(), False)

    def usable(self) -> bool:
        """Whether it runs, and has not been idle for long."""
        return self.process.poll() is None and time.monotonic() - self._used_s < IDLE_S

    def becomes_ready(self, deadline: float) -> bool:
        """Wait until it has imported everything; False if it can't, with the reason in `why`.

        Raises:
            TimeoutError: `deadline` (`time.monotonic`) has passed.
            _StoppingError: see there.
            OSError, EOFError, ValueError: it has ended, or wrote something else.
        """
        if not self.ready:
            answer = self._exchange(b"", deadline)
            self.ready, self.why = answer.ready, answer.unavailable or "its process did not start"
        return self.ready

    def ask(self, question: Question, deadline: float) -> Checked:
        """Return its answer; raises like `becomes_ready`."""
        parts = {
            part: {"kind": sample["kind"], "rows": [(each.number, each.row) for each in sample["rows"]]}
            for part, sample in question["parts"].items()
        }
        # Its own timer ends it a little later, should this server end meanwhile.
        left = max(deadline - time.monotonic(), 0.0) + 1
        answer = self._exchange(json.dumps({**question, "parts": parts, "limit_s": left}).encode() + b"\n", deadline)
        self._used_s = time.monotonic()
        return answer

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()

    def close(self) -> None:
        """End it, and wait for its end."""
        self.process.kill()
        self.process.wait()
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                pipe.close()

    def _exchange(self, message: bytes, deadline: float) -> Checked:
        """Write a line, if any, and return the next one."""
        unsent = memoryview(message)
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            if unsent:
                selector.register(self._to, selectors.EVENT_WRITE)
            while b"\n" not in self._received:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                if compat.is_stopping():  # the host's server first waits for its requests
                    raise _StoppingError
                for key, _ in selector.select(min(left, STOPPING_S)):
                    if key.fileobj is self._to:
                        unsent = unsent[os.write(self._to.fileno(), unsent[: 1 << 16]) :]
                        if not unsent:
                            selector.unregister(self._to)
                    else:
                        self._receive()
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received[:] = rest
        return Checked.model_validate_json(line)

    def _receive(self) -> None:
        piece = os.read(self._from.fileno(), 1 << 16)
        if not piece:
            raise EOFError
        self._received += piece
        if len(self._received) > LARGEST_ANSWER_BYTES:
            raise ValueError
