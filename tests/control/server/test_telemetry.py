"""Tests the metrics for exporters and Prometheus: one server counts each job once, correctly after a restart."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import create_engine, update

from llama_stack_provider_moe.control.server import telemetry
from llama_stack_provider_moe.control.server.prometheus import MEDIA_TYPE, metrics_text
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.server.telemetry import Telemetry
from llama_stack_provider_moe.control.store.job_counts import GroupCounts, JobCounts
from llama_stack_provider_moe.control.store.schema import jobs_table
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.recipes import RECIPES
from tests.support.host_support import ask, caller, serving_in_process, submit

SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')


class Exporter:
    """The host's exporter for tests: (name, attributes) -> value, or (count, sum) of a histogram."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider(metric_readers=[self.reader], shutdown_on_exit=False)
        self.meter = self.provider.get_meter(telemetry.METER)

    def collect(self) -> dict[tuple[Any, ...], Any]:
        """All metrics exported so far."""
        found = self.reader.get_metrics_data()
        metrics = [] if found is None else found.resource_metrics[0].scope_metrics[0].metrics
        return {
            (metric.name, *(str(value) for _, value in sorted((point.attributes or {}).items()))): point.value
            if hasattr(point, "value")
            else (point.count, point.sum)
            for metric in metrics
            for point in metric.data.data_points
        }

    def units(self) -> dict[str, str]:
        found = self.reader.get_metrics_data()
        assert found is not None
        return {metric.name: metric.unit for metric in found.resource_metrics[0].scope_metrics[0].metrics}


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    made = Exporter()
    yield made
    made.provider.shutdown()


@pytest.fixture
def service(tmp_path: Path, exporter: Exporter) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, meter=exporter.meter, prometheus=True) as made:
        yield made


def shift(store: JobStore, job_id: str, **seconds: float) -> None:
    """Move the times of a job back, as if it had begun earlier."""
    job = store.get(job_id, None)
    changes = {name: getattr(job, name) - timedelta(seconds=by) for name, by in seconds.items()}
    engine = create_engine(store._reading.url)
    with engine.begin() as connection:
        connection.execute(update(jobs_table).where(jobs_table.c.id == job_id).values(changes))
    engine.dispose()


def test_a_job_is_reported_from_submission_to_end(service: PostTrainingService, exporter: Exporter) -> None:
    job_id = submit(service)
    submit(service, job_uuid="waits")
    told = exporter.collect()
    assert told["moe.jobs.submitted", "sft"] == 2
    assert told["moe.jobs.active", "sft", "scheduled"] == 2
    assert told["moe.jobs.active", "sft", "in_progress"] == told["moe.jobs.active", "dpo", "scheduled"] == 0

    claimed = service.store.claim("s", None)
    assert claimed is not None
    assert claimed.id == job_id
    shift(service.store, job_id, queued_at=30)
    told = exporter.collect()
    assert told["moe.jobs.active", "sft", "scheduled"] == told["moe.jobs.active", "sft", "in_progress"] == 1
    count, waited_s = told["moe.jobs.queue.wait", "sft"]
    assert (count, 30 <= waited_s < 600) == (1, True), "recorded while it runs, not when it ends"
    assert ("moe.jobs.ended", "sft", "completed") not in told

    service.store.move(job_id, JobState.COMPLETED)
    for _ in range(3):
        told = exporter.collect()
        assert told["moe.jobs.ended", "sft", "completed"] == 1, "counted once, however often the exporter collects"
        assert told["moe.jobs.queue.wait", "sft"] == (1, waited_s)
        assert told["moe.jobs.run.duration", "sft", "completed"][0] == 1
        assert told["moe.jobs.active", "sft", "in_progress"] == 0, "0 instead of the last figure forever"


def test_a_job_between_two_collections_is_reported_completely(service: PostTrainingService, exporter: Exporter) -> None:
    exporter.collect()
    job_id = submit(service)
    service.store.claim("s", None)
    service.store.move(job_id, JobState.FAILED, "it broke")
    told = exporter.collect()
    assert (told["moe.jobs.ended", "sft", "failed"], told["moe.jobs.queue.wait", "sft"][0]) == (1, 1)


def test_a_job_that_never_began_has_no_times(service: PostTrainingService, exporter: Exporter) -> None:
    waited = submit(service)
    service.store.request_cancel(waited, None)
    resumed = submit(service)
    service.store.claim("s", None)
    service.store.move(resumed, JobState.FAILED, "it broke")
    exporter.collect()
    service.store.resume(resumed, None)
    service.store.request_cancel(resumed, None)
    told = exporter.collect()
    assert (told["moe.jobs.ended", "sft", "cancelled"], told["moe.jobs.ended", "sft", "failed"]) == (2, 1)
    assert told["moe.jobs.queue.wait", "sft"][0] == 1, "the wait before its first start"
    assert ("moe.jobs.run.duration", "sft", "cancelled") not in told


def test_a_resumed_job_waits_and_ends_again(service: PostTrainingService, exporter: Exporter) -> None:
    job_id = submit(service)
    for _ in range(2):
        service.store.claim("s", None)
        service.store.move(job_id, JobState.FAILED, "it broke")
        exporter.collect()
        service.store.resume(job_id, None)
    told = exporter.collect()
    assert told["moe.jobs.ended", "sft", "failed"] == 2
    assert told["moe.jobs.queue.wait", "sft"][0] == told["moe.jobs.run.duration", "sft", "failed"][0] == 2
    assert told["moe.jobs.submitted", "sft"] == 1


def test_one_of_two_servers_reports_and_the_other_takes_over(
    service: PostTrainingService, exporter: Exporter, tmp_path: Path
) -> None:
    other = Exporter()
    second = Telemetry(other.meter, service.store, service.config.state_dir / "telemetry.lock")
    try:
        exporter.collect()
        job_id = submit(service)
        service.store.claim("s", None)
        service.store.move(job_id, JobState.COMPLETED)
        assert exporter.collect()["moe.jobs.ended", "sft", "completed"] == 1
        assert not other.collect()
        service._telemetry.close()
        assert ("moe.jobs.active", "sft", "scheduled") not in exporter.collect()
        told = other.collect()
        assert told["moe.jobs.active", "sft", "scheduled"] == 0
        assert ("moe.jobs.ended", "sft", "completed") not in told, "the other server has reported it"
        late = submit(service)
        service.store.request_cancel(late, None)
        assert other.collect()["moe.jobs.ended", "sft", "cancelled"] == 1
    finally:
        second.close()
        other.provider.shutdown()


def test_refusals_are_counted_by_route(service: PostTrainingService, exporter: Exporter) -> None:
    ask(service, "GET", "/jobs/none")
    ask(service, "GET", "/jobs/other")
    ask(service, "GET", "/jobs")
    ask(service, "POST", "/jobs", json={"recipe": "ppo"})
    told = {key[1:]: value for key, value in exporter.collect().items() if key[0] == "moe.requests.refused"}
    prefix = "/v1alpha/post-training"
    assert told == {
        ("GET", "404", f"{prefix}/jobs/{{job_uuid}}"): 2,  # names that callers choose are not attributes
        ("POST", "400", f"{prefix}/jobs"): 1,
    }


def test_units_are_those_of_the_conventions(service: PostTrainingService, exporter: Exporter) -> None:
    job_id = submit(service)
    service.store.claim("s", None)
    service.store.move(job_id, JobState.COMPLETED)
    ask(service, "GET", "/jobs/none")
    assert exporter.units() == {
        "moe.jobs.submitted": "{job}", "moe.jobs.ended": "{job}", "moe.jobs.active": "{job}",
        "moe.jobs.queue.wait": "s", "moe.jobs.run.duration": "s", "moe.requests.refused": "{request}",
    }  # fmt: skip


# For Prometheus.


def parsed(text: str) -> dict[tuple[str, ...], float]:
    """The samples of a document, each of a family that is declared just before."""
    assert text.endswith("\n")
    found: dict[tuple[str, ...], float] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert not any(key[0] == family for key in found), "the lines of a family are together"
        elif line.startswith("# "):
            assert line == f"# TYPE {family} gauge"
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            assert match["name"] == family
            labels = LABEL.findall(match["labels"] or "")
            assert ",".join(f'{name}="{value}"' for name, value in labels) == (match["labels"] or ""), line
            key = (family, *(value for _, value in labels))
            assert key not in found
            found[key] = float(match["value"])
    return found


def test_a_new_server_reports_the_whole_store(tmp_path: Path) -> None:
    with serving_in_process(tmp_path, prometheus=True) as first:
        done = submit(first)
        first.store.claim("s", None)
        first.store.requeue(done, "lost")
        first.store.claim("s", None)
        first.store.move(done, JobState.COMPLETED)
        submit(first, job_uuid="waits")
        shift(first.store, "waits", queued_at=50)
        before = parsed(ask(first, "GET", "/metrics").text)
    with serving_in_process(tmp_path, prometheus=True) as second:
        answer = ask(second, "GET", "/metrics")
    assert answer.headers["content-type"] == MEDIA_TYPE
    found = parsed(answer.text)
    wait, wait_before = found.pop(("moe_jobs_longest_wait_seconds",)), before.pop(("moe_jobs_longest_wait_seconds",))
    assert found == before
    assert 50 <= wait_before <= wait < 600
    assert found["moe_jobs", "sft", "completed"] == found["moe_jobs", "sft", "scheduled"] == 1
    assert found["moe_jobs_starts", "sft", "completed"] == 2
    assert found["moe_jobs_lost", "sft", "completed"] == 1
    assert found["moe_supervisor_alive",] == 0
    assert {key[1:] for key in found if key[0] == "moe_jobs"} == {
        (recipe, state.value) for recipe in RECIPES for state in JobState
    }, "0 is told too"


def test_text_stays_within_its_quotes() -> None:
    odd = 'a "b" \\ c\n# TYPE x counter'
    job_counts = JobCounts({(odd, JobState.FAILED): GroupCounts(3, 4, 1)}, None, [], [])
    found = parsed(metrics_text(job_counts, now(), supervisor_is_alive=True))
    assert found["moe_jobs", r"a \"b\" \\ c\n# TYPE x counter", "failed"] == 3
    assert found["moe_supervisor_alive",] == 1
    assert found["moe_jobs_longest_wait_seconds",] == 0


def test_the_route_exists_only_where_the_server_enables_it(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as made:
        assert ask(made, "GET", "/metrics").status_code == 404


def test_a_caller_who_may_not_read_every_job_gets_no_figures(service: PostTrainingService) -> None:
    with caller("alice"):
        answer = ask(service, "GET", "/metrics")
    assert answer.status_code == 403
    assert "post_training_job::*" in answer.json()["error"]["message"]
    assert ask(service, "GET", "/metrics").status_code == 200, "without authentication there are no owners"
