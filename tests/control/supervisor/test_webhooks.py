"""Webhooks: signed so that an independent implementation accepts them, once for each end, kept until delivered."""

import base64
import json
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from standardwebhooks import Webhook, WebhookVerificationError

from llama_stack_provider_moe.control.store.audit import Audit, pseudonym
from llama_stack_provider_moe.control.store.outbox import Delivery, Message
from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.control.supervisor import webhooks
from llama_stack_provider_moe.control.supervisor.webhooks import GIVE_UP, RETRY_S, WebhookSender
from llama_stack_provider_moe.errors import LeaseLost
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import AuditConfig
from llama_stack_provider_moe.spec.notify import NotifyConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.hook_server import Hooks, hook_server
from tests.support.jobs_support import wait_for

VARIABLE = "MOE_TEST_WEBHOOK_SECRET"
OLD, NEW = (f"whsec_{base64.b64encode(bytes([fill]) * 32).decode()}" for fill in (1, 2))


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    with hook_server() as hooks:
        yield hooks


@pytest.fixture
def store(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    monkeypatch.setenv(VARIABLE, NEW)
    store = JobStore(url)
    assert store.acquire_lease("me", 1, 600)
    yield store
    store.close()


def config_for(hooks: Hooks) -> NotifyConfig:
    return NotifyConfig(allowed=[hooks.url], secret_variable=VARIABLE)


def ended(store: JobStore, url: str, state: JobState = JobState.COMPLETED, name: str = "job", **events: Any) -> None:
    """A job that asks for messages and has ended."""
    asked = {"url": url, "events": [f"fine_tuning.job.{word}" for word in ("succeeded", "failed", "cancelled")]}
    store.add(NewJob(name, "ann", "sft", "some/model", f"/jobs/{name}", notify=json.dumps(asked | events)))
    store.move(name, JobState.IN_PROGRESS)
    store.move(name, state)


def no_audit() -> Audit:
    """An audit trail that writes nothing."""
    return Audit(ProviderConfig(state_dir=Path("/nonexistent"), audit=AuditConfig(write=False)))


def sender(store: JobStore, hooks: Hooks, *retry_s: float) -> WebhookSender:
    return WebhookSender(store, config_for(hooks), "me", no_audit(), retry_s or (0.01,))


def message(store: JobStore, name: str = "job") -> Message:
    (found,) = store.outbox.of(name)
    return found


def test_an_independent_implementation_accepts_the_message_and_refuses_a_changed_one(
    store: JobStore, hooks: Hooks
) -> None:
    ended(store, f"{hooks.url}/told?by=moe")
    assert sender(store, hooks).send_due() == 1
    ((path, headers, body),) = hooks.received
    assert path == "/told?by=moe"
    found: Any = Webhook(NEW).verify(body, headers)
    assert found["type"] == "fine_tuning.job.succeeded"
    assert found["data"] == {"id": "ftjob-job", "job_uuid": "job"}
    assert found["id"] == headers["webhook-id"] == message(store).id
    for secret, changed in ((OLD, body), (NEW, body.replace(b"succeeded", b"failed"))):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(changed, headers)
    assert message(store).state is Delivery.DELIVERED


def test_the_openai_package_reads_it_as_its_own_event(store: JobStore, hooks: Hooks) -> None:
    ended(store, hooks.url, JobState.FAILED)
    sender(store, hooks).send_due()
    ((_, headers, body),) = hooks.received
    event = OpenAI(api_key="none", webhook_secret=NEW).webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("fine_tuning.job.failed", "ftjob-job")


def test_while_a_secret_is_replaced_both_verify(store: JobStore, hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{NEW} {OLD}")
    ended(store, hooks.url)
    sender(store, hooks).send_due()
    ((_, headers, body),) = hooks.received
    for secret in (OLD, NEW):
        Webhook(secret).verify(body, headers)


@pytest.mark.parametrize(
    ("state", "wanted", "count"),
    [
        (JobState.COMPLETED, ["fine_tuning.job.failed"], 0),
        (JobState.FAILED, ["fine_tuning.job.failed"], 1),
        (JobState.CANCELLED, ["fine_tuning.job.failed", "fine_tuning.job.cancelled"], 1),
    ],
)
def test_only_what_was_asked_for_is_told(
    store: JobStore, hooks: Hooks, state: JobState, wanted: list[str], count: int
) -> None:
    ended(store, hooks.url, state, events=wanted)
    assert sender(store, hooks).send_due() == len(hooks.received) == count


def test_a_job_that_is_cancelled_while_it_waits_is_told_too(store: JobStore, hooks: Hooks) -> None:
    asked = {"url": hooks.url, "events": ["fine_tuning.job.cancelled"]}
    store.add(NewJob("job", "ann", "sft", "some/model", "/jobs/job", notify=json.dumps(asked)))
    store.request_cancel("job", "ann")
    store.request_cancel("job", "ann")
    assert sender(store, hooks).send_due() == 1


def test_a_second_end_is_a_second_message(store: JobStore, hooks: Hooks) -> None:
    ended(store, hooks.url, JobState.FAILED)
    store.resume("job", None)
    store.move("job", JobState.IN_PROGRESS)
    store.move("job", JobState.COMPLETED)
    assert sender(store, hooks).send_due() == 2
    assert len({headers["webhook-id"] for _, headers, _ in hooks.received}) == 2


def test_a_failed_delivery_is_repeated_with_the_same_id_until_it_succeeds(store: JobStore, hooks: Hooks) -> None:
    hooks.answers = [500, 429, 200]
    ended(store, hooks.url)
    sending = sender(store, hooks)
    assert store.has_work(), "a supervisor stays for it"
    for attempt, told in enumerate(("it answered 500", "it answered 429", None), 1):
        wait_for(lambda: sending.send_due())
        assert (message(store).attempts, message(store).told) == (attempt, told)
    assert message(store).state is Delivery.DELIVERED
    assert len({headers["webhook-id"] for _, headers, _ in hooks.received}) == 1
    assert not store.has_work()
    assert sending.send_due() == 0


def test_a_message_survives_a_sender_that_dies_after_its_request(
    store: JobStore, hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(store, hooks.url)
    with monkeypatch.context() as during:
        during.setattr(store.outbox, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sender(store, hooks, 0.01).send_due()
    assert (message(store).state, len(hooks.received)) == (Delivery.WAITING, 1)
    wait_for(lambda: sender(store, hooks).send_due())
    assert message(store).state is Delivery.DELIVERED
    assert len({headers["webhook-id"] for _, headers, _ in hooks.received}) == 1, "the receiver can tell"


def test_only_the_holder_of_the_lease_sends(store: JobStore, hooks: Hooks) -> None:
    ended(store, hooks.url)
    with pytest.raises(LeaseLost):
        WebhookSender(store, config_for(hooks), "another", no_audit()).send_due()
    assert hooks.received == []


def test_a_receiver_that_is_gone_is_given_up_at_once(store: JobStore, hooks: Hooks) -> None:
    hooks.answers = [410]
    ended(store, hooks.url)
    sender(store, hooks).send_due()
    assert (message(store).state, message(store).told) == (Delivery.GIVEN_UP, "it answered 410")


def test_the_audit_trail_has_a_message_that_is_given_up(store: JobStore, hooks: Hooks, tmp_path: Path) -> None:
    """Under its owner, and without the URL and the answer, which may hold secrets; not a message that waits."""
    config = ProviderConfig(state_dir=tmp_path)
    hooks.answers = [500, 410]
    ended(store, f"{hooks.url}/token-1234")
    with closing(Audit(config)) as audit:
        again = WebhookSender(store, config_for(hooks), "me", audit, (0.01,))
        again.send_due()
        wait_for(lambda: again.send_due() == 1)
    [line] = (tmp_path / "audit" / "audit.jsonl").read_text().splitlines()
    found = json.loads(line)
    who = pseudonym((tmp_path / "audit" / "key").read_bytes(), "ann")
    assert (found["who"], found["action"], found["job"], found["attempts"]) == (who, "webhook given up", "job", 2)
    assert (found["event"], found["message"]) == ("fine_tuning.job.succeeded", message(store).id)
    assert "token-1234" not in line
    assert "410" not in line


def test_after_a_day_a_message_is_given_up(store: JobStore, hooks: Hooks) -> None:
    hooks.answers = [500]
    ended(store, hooks.url)
    sender(store, hooks, GIVE_UP.total_seconds() + 1).send_due()
    assert (message(store).state, message(store).told) == (Delivery.GIVEN_UP, "it answered 500")
    assert not store.has_work()


def test_the_pauses_grow_and_fit_into_a_day() -> None:
    assert list(RETRY_S) == sorted(RETRY_S)
    tries, at_s = 1, 0.0
    while at_s + RETRY_S[min(tries, len(RETRY_S)) - 1] <= timedelta(days=1).total_seconds():
        at_s += RETRY_S[min(tries, len(RETRY_S)) - 1]
        tries += 1
    assert tries == 15


def test_a_redirect_is_not_followed(store: JobStore, hooks: Hooks) -> None:
    with hook_server() as inside:
        hooks.answers, hooks.location = [307], f"{inside.url}/secret"
        ended(store, hooks.url)
        sender(store, hooks).send_due()
        assert inside.received == []
    assert message(store).told == "it answered 307"


def test_a_server_that_is_not_allowed_any_more_gets_nothing(store: JobStore, hooks: Hooks) -> None:
    ended(store, hooks.url)
    closed = NotifyConfig(allowed=["https://elsewhere.example"], secret_variable=VARIABLE)
    WebhookSender(store, closed, "me", no_audit()).send_due()
    assert (message(store).state, hooks.received) == (Delivery.GIVEN_UP, [])


def test_a_long_answer_is_not_read_to_its_end(store: JobStore, hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks.answers, hooks.body = [200], bytes(64 << 20)
    ended(store, hooks.url)
    sender(store, hooks).send_due()
    wait_for(lambda: hooks.taken)
    assert hooks.taken == [False]
    assert message(store).state is Delivery.DELIVERED


def test_a_receiver_that_never_answers_costs_a_bounded_time(
    store: JobStore, hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended(store, address)
        config = NotifyConfig(allowed=[address], secret_variable=VARIABLE)
        start = time.monotonic()
        WebhookSender(store, config, "me", no_audit()).send_due()
        assert time.monotonic() - start < 60, "without a limit it would wait for ever"
    assert (message(store).told or "").startswith("ReadTimeout")


@pytest.mark.parametrize("secret", ["", "not base64!", "whsec_c2hvcnQ="])
def test_without_a_good_secret_nothing_is_sent_and_the_secret_is_not_told(
    store: JobStore, hooks: Hooks, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv(VARIABLE, secret)
    ended(store, hooks.url)
    sender(store, hooks).send_due()
    told = message(store).told or ""
    assert told.startswith(f"the supervisor's variable {VARIABLE} ")
    assert (hooks.received, message(store).state) == ([], Delivery.WAITING)
    assert not secret or secret.removeprefix("whsec_") not in told


def test_the_thread_sends_and_ends(store: JobStore, hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "LOOK_S", 0.01)
    with sender(store, hooks):
        for number in range(3):
            ended(store, hooks.url, name=f"job{number}")
        wait_for(lambda: len(hooks.received) == 3)
    ended(store, hooks.url, name="late")
    time.sleep(0.05)
    assert len(hooks.received) == 3


def test_messages_go_with_their_job(store: JobStore, hooks: Hooks, tmp_path: Path) -> None:
    ended(store, hooks.url)
    store.delete("job", "ann")
    assert store.outbox.of("job") == []
    assert sender(store, hooks).send_due() == 0


@pytest.mark.parametrize(
    ("allowed", "url", "is_allowed"),
    [
        ("https://a.example", "https://a.example/x", True),
        ("https://a.example", "https://A.example:443/x", True),
        ("https://a.example:8443", "https://a.example/x", False),
        ("https://a.example", "http://a.example/x", False),
        ("https://a.example", "https://a.example.evil.example/x", False),
        ("https://a.example", "https://evil.example/?https://a.example", False),
        ("https://a.example", "https://a.example@evil.example/", False),
        ("https://a.example", "ftp://a.example/", False),
        ("http://127.0.0.1:9000", "http://127.0.0.1:9001/", False),
        ("https://a.example", "https://a.example:99999/", False),
    ],
)
def test_only_the_same_scheme_host_and_port_is_allowed(allowed: str, url: str, is_allowed: bool) -> None:
    assert NotifyConfig(allowed=[allowed], secret_variable="X").allows(url) is is_allowed
