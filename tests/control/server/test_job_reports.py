"""A job's report over the API is the one that `moe-train report job` writes, and can't act in the server's name."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llama_stack_provider_moe.control import cli
from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from tests.control.dashboard.conftest import make_jobs
from tests.support.cli_support import moe_train
from tests.support.host_support import ask, caller, folder_of, over_http, serving_in_process


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("reports")) as made:
        make_jobs(made)
        yield made


def without_time(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?", "TIME", text)


@pytest.mark.parametrize("job", ["breaker-1", "dpo-run-7", "sft-failed", "sft-later", "markup-1"])
def test_it_is_the_command_lines(
    service: PostTrainingService, tmp_path: Path, job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.html"
    with over_http(service) as url:
        found = httpx.get(f"{url}{PREFIX}/jobs/{job}/report", timeout=60)
        assert cli.main(["report", "job", job, "-o", str(file), "--url", url, "--json"]) == 0
    assert found.status_code == 200, found.text
    assert json.loads(capsys.readouterr().out)["file"] == str(file)
    assert without_time(found.text) == without_time(file.read_text(encoding="utf-8"))
    assert f"<h1>{job}</h1>" in found.text


def test_the_list_of_artifacts_has_it(service: PostTrainingService) -> None:
    """Also of a job that has saved nothing."""
    for job in ("breaker-1", "sft-later"):
        where = ask(service, "GET", f"/jobs/{job}/artifacts").json()["report"]
        assert where == f"/jobs/{job}/report"
        assert ask(service, "GET", where).text.startswith("<!doctype html>")
        with over_http(service) as url:
            done = moe_train("artifacts", job, "--url", url)
        assert done.code == 0, done.err
        assert done.out.rstrip().endswith(f"report: moe-train report job {job} -o report.html")


def test_a_browser_saves_it_and_runs_nothing(service: PostTrainingService) -> None:
    found = ask(service, "GET", "/jobs/breaker-1/report")
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert found.headers["content-disposition"] == 'attachment; filename="report.html"'
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert "sandbox" in found.headers["content-security-policy"]


def test_a_strangers_job_is_not_found(service: PostTrainingService) -> None:
    with caller("stranger"):
        assert ask(service, "GET", "/jobs/breaker-1/report").status_code == 404
    assert ask(service, "GET", "/jobs/none/report").status_code == 404


def test_an_evaluation_that_can_not_be_read_is_left_out(service: PostTrainingService) -> None:
    assert "refusal rate" in ask(service, "GET", "/jobs/breaker-1/report").text
    (path,) = folder_of(service, "breaker-1").artifacts.glob("evaluation/eval.json")
    whole = path.read_text(encoding="utf-8")
    path.write_text("{", encoding="utf-8")
    try:
        found = ask(service, "GET", "/jobs/breaker-1/report")
    finally:
        path.write_text(whole, encoding="utf-8")
    assert (found.status_code, "refusal rate" in found.text) == (200, False)


def test_it_needs_no_torch() -> None:
    code = "import sys; import llama_stack_provider_moe.control.server.job_reports; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
