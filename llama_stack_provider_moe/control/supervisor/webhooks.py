"""`WebhookSender`: delivers messages about jobs that ended, from a thread of the supervisor.

`ground.webhook_signature` has the form of the messages.

A job's owner names the URL, and the supervisor's machine asks it. So only servers that the operator allowed are asked,
redirects are not followed, no proxy of the environment is used, and an answer is read only up to a limit.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Self

import httpx
from sqlalchemy.exc import SQLAlchemyError

from llama_stack_provider_moe.control.store.audit import Audit
from llama_stack_provider_moe.control.store.outbox import Delivery, Message
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import LeaseLost, NotFound, StoreReplaced
from llama_stack_provider_moe.ground.webhook_signature import EXPECTED, secrets_in, signed_headers
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.spec.notify import NotifyConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig

# Seconds to wait after each attempt, as the specification of Standard Webhooks advises; then every two hours.
RETRY_S: tuple[float, ...] = (5, 300, 1800, 7200)
GIVE_UP = timedelta(days=1)
LOOK_S = 1.0
TIMEOUT_S = 15.0
READ_BYTES = 64 << 10  # of an answer
_HEADERS = {"content-type": "application/json", "user-agent": "llama-stack-provider-moe"}

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class WebhookSender:
    """Sends what is due, in a thread of its own inside `with`. The store has the errors of receivers.

    Args:
        store: The store with the messages.
        config: Which servers may be told.
        supervisor_id: Id of the supervisor, which must hold the lease.
        audit: Gets a record of each message that is given up; closed at the end.
        retry_s: Seconds to wait after each attempt; the last one repeats.
    """

    def __init__(
        self,
        store: JobStore,
        config: NotifyConfig,
        supervisor_id: str,
        audit: Audit,
        retry_s: Sequence[float] = RETRY_S,
    ) -> None:
        self._store = store
        self._config = config
        self._id = supervisor_id
        self._audit = audit
        self._retry_s = retry_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="moe-webhooks", daemon=True)
        self._complained = False

    @classmethod
    def of(cls, store: JobStore, config: ProviderConfig, supervisor_id: str) -> Self:
        """Return the sender of a supervisor with this configuration."""
        return cls(store, config.notify, supervisor_id, Audit(config))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop after the message that is being sent; the others stay in the store."""
        self._closed.set()
        self._thread.join(2 * TIMEOUT_S)
        self._audit.close()

    def send_due(self) -> int:
        """Send the messages that are due; return how many were sent, delivered or not."""
        due_at = self._store.outbox.next_due_at()
        if due_at is None or due_at > now():
            return 0
        messages = self._store.outbox.take_due(self._id, self._again_at)
        for message in messages:
            state, told = self._sent(message)
            if state is Delivery.WAITING and message.due_at - message.created_at > GIVE_UP:
                state = Delivery.GIVEN_UP
            self._store.outbox.settle(message.id, state, told)
            if state is Delivery.GIVEN_UP:
                self._note_given_up(message)
            if state is Delivery.DELIVERED:
                log.info("job %s: %s was delivered", message.job, message.event)
            else:
                later = "given up" if state is Delivery.GIVEN_UP else f"again at {message.due_at:%Y-%m-%dT%H:%M:%SZ}"
                log.warning("job %s: %s was not delivered (%s); %s", message.job, message.event, told, later)
        return len(messages)

    def _note_given_up(self, message: Message) -> None:
        with suppress(NotFound):  # the job was deleted, and its messages with it
            owner = self._store.get(message.job, None).owner
            # Not the URL, which may hold a secret, and not the receiver's answer.
            self._audit.note(
                owner,
                "webhook given up",
                job=message.job,
                event=message.event,
                message=message.id,
                attempts=message.attempts,
            )

    def _again_at(self, attempts: int, moment: datetime) -> datetime:
        wait_s = self._retry_s[min(attempts, len(self._retry_s)) - 1]
        return moment + timedelta(seconds=max(wait_s, 0.01))

    def _sent(self, message: Message) -> tuple[Delivery, str | None]:
        if not self._config.allows(message.url):
            return Delivery.GIVEN_UP, "its server is not in `notify.allowed` any more"
        variable = self._config.secret_variable or ""
        try:
            secrets = secrets_in(os.environ.get(variable, ""))
        except ValueError as problem:
            return Delivery.WAITING, f"the supervisor's variable {variable} {problem}; expected {EXPECTED}"
        body = message.body.encode()
        headers = signed_headers(message.id, int(time.time()), body, secrets)
        try:
            status = _posted(message.url, {**_HEADERS, **headers}, body)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, OSError) as error:
            return Delivery.WAITING, f"{type(error).__name__}: {error}"[:300]
        if status in range(200, 300):
            return Delivery.DELIVERED, None
        told = f"it answered {status}"
        return (Delivery.GIVEN_UP if status == HTTPStatus.GONE else Delivery.WAITING), told

    def _work(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                self.send_due()
                self._complained = False
            except LeaseLost:
                return
            except (SQLAlchemyError, StoreReplaced) as error:  # the supervisor's own steps report it too
                if not self._complained:
                    log.warning("webhooks wait: %s", str(error).partition("\n")[0])
                self._complained = True


def _posted(url: str, headers: Mapping[str, str], body: bytes) -> int:
    """Send a request; return the status of its answer."""
    deadline = time.monotonic() + TIMEOUT_S
    with (
        httpx.Client(follow_redirects=False, timeout=TIMEOUT_S, trust_env=False) as client,
        client.stream("POST", url, content=body, headers=dict(headers)) as answer,
    ):
        read = 0
        for piece in answer.iter_raw(4096):
            read += len(piece)
            if read > READ_BYTES or time.monotonic() > deadline:  # its status is what counts
                break
        return answer.status_code
