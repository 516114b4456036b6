"""`Outbox`: messages about jobs that ended, which the supervisor delivers as webhooks.

A message is written in the transaction that ends its job, so there is one for each end and none for an end that did
not happen. It is delivered at least once: a supervisor that dies after a request and before it could write down the
answer leaves the message to its successor. Receivers tell a second delivery by its id.
"""

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import Connection, Engine, func, insert, select, update

from llama_stack_provider_moe.control.store import lease
from llama_stack_provider_moe.control.store.schema import TableRow, webhooks_table
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.notify import Notify, NotifyEvent

log = logging.getLogger(__name__)
EVENTS: dict[JobState, NotifyEvent] = {
    JobState.COMPLETED: "fine_tuning.job.succeeded",
    JobState.FAILED: "fine_tuning.job.failed",
    JobState.CANCELLED: "fine_tuning.job.cancelled",
}
_AT_A_TIME = 20
_W = webhooks_table.c


class Delivery(StrEnum):
    """Where a message stands."""

    WAITING = lease.MESSAGE_WAITS
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class Message(NamedTuple):
    """A message about a job.

    Attributes:
        id: The receiver's key against a second delivery.
        job: Id of the job.
        url: Where it goes.
        event: What happened, by OpenAI's name, or of a sweep.
        body: JSON.
        state: Where it stands.
        created_at: When the job ended.
        due_at: When it is sent next, if it waits.
        attempts: How often it was sent.
        told: What the last attempt met; None: nothing went wrong, or there was none.
    """

    id: str
    job: str
    url: str
    event: str
    body: str
    state: Delivery
    created_at: datetime
    due_at: datetime
    attempts: int
    told: str | None


def write(connection: Connection, row: TableRow, new_state: JobState) -> None:
    """Write the message about a job that moves to `new_state`, if its owner asked for one."""
    event = EVENTS.get(new_state)
    if event is None or row.notify is None:
        return
    try:
        asked = read_as(Notify, row.notify)
    except ValueError:  # damaged, or of a later version: the end of the job is recorded all the same
        log.warning("job %s: nobody is told of its end, because its `notify` can't be read", row.id)
        return
    if event not in asked.events:
        return
    # The first is the job's id in OpenAI's API.
    add(connection, row.id, asked.url, event, {"id": f"ftjob-{row.id}", "job_uuid": row.id})


def add(connection: Connection, job_id: str, url: str, event: str, data: Mapping[str, object]) -> None:
    """Write a message.

    Args:
        connection: Transaction of what happened.
        job_id: Job that the message is listed with and deleted with.
        url: Where it goes.
        event: What happened.
        data: What to tell, for JSON.
    """
    moment, message_id = now(), f"evt_{uuid.uuid4().hex}"
    body = {
        "object": "event", "id": message_id, "type": event, "created_at": int(moment.timestamp()), "data": data,
    }  # fmt: skip
    connection.execute(insert(webhooks_table).values(
        id=message_id, job=job_id, url=url, event=event, body=json.dumps(body, separators=(",", ":")),
        state=Delivery.WAITING.value, created_at=moment, due_at=moment, attempts=0,
    ))  # fmt: skip


class Outbox:
    """The messages in the store. Each method is one transaction.

    Args:
        reading: Engine for transactions that only read.
        writing: Engine for transactions that write.
    """

    def __init__(self, reading: Engine, writing: Engine) -> None:
        self._reading = reading
        self._writing = writing

    def next_due_at(self) -> datetime | None:
        """Return when the next message is due; None if none waits."""
        with self._reading.begin() as connection:
            query = select(func.min(_W.due_at)).where(_W.state == Delivery.WAITING.value)
            found: datetime | None = connection.execute(query).scalar_one()
            return found

    def take_due(self, supervisor_id: str, again_at: Callable[[int, datetime], datetime]) -> list[Message]:
        """Return messages that are due, each with one more attempt; each is due again later, unless it is settled.

        Args:
            supervisor_id: Id of the supervisor that sends them.
            again_at: Returns when to send a message again, given its attempts and now.

        Raises:
            LeaseLost: Another supervisor holds the lease.
        """
        moment = now()
        waits = (_W.state == Delivery.WAITING.value, _W.due_at <= moment)
        with self._writing.begin() as connection:
            lease.require(connection, supervisor_id)
            query = select(webhooks_table).where(*waits).order_by(_W.due_at, _W.seq).limit(_AT_A_TIME)
            found = []
            for row in connection.execute(query).all():
                message = _message(row)._replace(attempts=row.attempts + 1)
                message = message._replace(due_at=again_at(message.attempts, moment))
                values = {"attempts": message.attempts, "due_at": message.due_at}
                connection.execute(update(webhooks_table).where(_W.seq == row.seq).values(values))
                found.append(message)
            return found

    def settle(self, message_id: str, state: Delivery, told: str | None) -> None:
        """Write down how an attempt ended; a message that was deleted with its job stays deleted."""
        with self._writing.begin() as connection:
            mine = (_W.id == message_id, _W.state == Delivery.WAITING.value)
            connection.execute(update(webhooks_table).where(*mine).values(state=state.value, told=told))

    def of(self, job_id: str) -> Sequence[Message]:
        """Return the messages about a job, oldest first."""
        with self._reading.begin() as connection:
            query = select(webhooks_table).where(_W.job == job_id).order_by(_W.seq)
            return [_message(row) for row in connection.execute(query)]


def _message(row: TableRow) -> Message:
    return Message(
        row.id, row.job, row.url, row.event, row.body, Delivery(row.state), row.created_at, row.due_at, row.attempts,
        row.told,
    )  # fmt: skip
