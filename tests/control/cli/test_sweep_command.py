"""`moe-train sweep` and `sweeps`: what they refuse before they ask a server, and their exit codes."""

from pathlib import Path

import pytest

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.jobdir.state import JobState
from tests.control.server.test_sweeps import JOB
from tests.support.cli_support import moe_train, template_at
from tests.support.host_support import ask, over_http, serving_in_process


def test_jobs_end_early_in_one_way_only(tmp_path: Path) -> None:
    words = ["--grid", "optimizer.lr=0.1,0.2", "--halving", "--hyperband", "--url", "http://127.0.0.1:9"]
    done = moe_train("sweep", str(template_at(tmp_path)), *words)
    assert done.code != 0
    assert "--hyperband: True is not valid; expected one way to end jobs early; --halving is another" in done.err


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ((JobState.FAILED, JobState.FAILED), Exit.FAILED),
        ((JobState.FAILED, JobState.COMPLETED), Exit.OK),
        ((JobState.CANCELLED, JobState.CANCELLED), Exit.CANCELLED),
        ((), Exit.OK),
    ],
)
def test_the_exit_code_of_a_sweep_is_that_of_a_job(
    tmp_path_factory: pytest.TempPathFactory, ends: tuple[JobState, ...], code: Exit
) -> None:
    body = {"job": JOB, "parameters": {"optimizer.lr": [1e-4, 2e-4]}, "max_parallel": 2}
    with serving_in_process(tmp_path_factory.mktemp("sweep")) as service, over_http(service) as url:
        made = ask(service, "POST", "/sweeps", json=body)
        assert made.status_code == 200, made.text
        jobs = [service.store.claim("me/1/1/1/1") for _ in ends]
        for job, state in zip(jobs, ends, strict=True):
            assert job is not None
            service.store.move(job.id, state)
        for words in ((), ("--json",)):
            done = moe_train("sweeps", made.json()["sweep_uuid"], "--url", url, *words)
            assert done.code == code, done.err
