"""`moe-train export JOB`, against our own router behind uvicorn."""

import json
from collections.abc import Iterator

import pytest

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.export_steps import ExportStep, ExportSteps, StepState
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import ExportSpec
from tests.control.server.test_exports import trained
from tests.support.cli_support import moe_train
from tests.support.host_support import folder_of, over_http, serving_in_process


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    folder = tmp_path_factory.mktemp("cli")
    with serving_in_process(folder) as made, over_http(made) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_TRAIN_URL", url)
        yield made


def test_a_job_may_be_given_instead_of_a_command(service: PostTrainingService) -> None:
    of = trained(service)
    for words in (["export", of], ["export", "job", of]):
        done = moe_train(*words, "--merged", "--dtype", "fp16", "--shard-size", "2GB", "--no-load-check", "--json")
        assert done[0] == Exit.OK, done
        export_id = json.loads(done[1])["job_uuid"]
        spec = folder_of(service, export_id).read_spec()
        assert isinstance(spec, ExportSpec)
        assert (spec.of, spec.export.dtype, spec.export.shard_size, spec.export.load_check) == (
            of, "fp16", "2GB", False,
        )  # fmt: skip
    code, out, err = moe_train("export", of, "--merged")
    assert (code, f"; it exports job {of}\n" in out, "--watch" in err) == (Exit.OK, True, True)


def test_a_mistake_is_reported(service: PostTrainingService) -> None:
    of = trained(service)
    for words, told in (
        ([of], "asks for no export"),
        ([of, "--serve"], "serve: True is not valid; expected false, because this server has no inference server"),
        ([of, "--gguf", "q4"], "gguf.0: 'q4' is not valid; expected 'f32'"),
        (["nobody", "--merged"], "job 'nobody' does not exist"),
        ([of, "--merged", "--ollama-url", "http://a:1"], "--ollama-url needs --ollama NAME"),
    ):
        code, out, err = moe_train("export", *words, "--json")
        assert (code, out, told in err) == (Exit.REFUSED, "", True), err


def test_steps_are_shown_with_the_job_and_its_export(service: PostTrainingService) -> None:
    of = trained(service)
    export_id = json.loads(moe_train("export", of, "--merged", "--json")[1])["job_uuid"]
    steps = [ExportStep(name="load_check", state=StepState.COMPLETED, note="as trained"),
             ExportStep(name="merged", state=StepState.FAILED, reason="the disk is full")]  # fmt: skip
    write_atomic(folder_of(service, export_id).exports, ExportSteps(steps=steps))
    service.store.move(export_id, JobState.IN_PROGRESS)
    service.store.move(export_id, JobState.FAILED, reason="1 of 2 steps failed")
    for job_id, exit_code in ((of, Exit.OK), (export_id, Exit.FAILED)):
        code, out, _ = moe_train("status", job_id)
        assert code == exit_code
        lines = [line.split() for line in out.splitlines() if export_id in line and "merged" in line]
        assert ["merged", "failed"] in [line[1:3] for line in lines], out
    code, out, _ = moe_train("status", export_id, "--watch")
    assert (code, "merged: failed, the disk is full" in out) == (Exit.FAILED, True)
    code, out, _ = moe_train("resume", export_id)
    assert (code, "it keeps the steps that are completed" in out) == (Exit.OK, True)
    assert moe_train("cancel", export_id)[0] == Exit.OK
    assert moe_train("rm", of)[1] == f"job {of} is deleted, with its exports {export_id}\n"
