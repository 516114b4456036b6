"""Every stage of a job's process reports while it works, because the watchdog would stop a long, silent one.

Jobs here send every report (`EVERY_S` 0). Between its first and its last report a stage must have at least as many as
its work has pieces; a stage without its hook has none.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import _xet_progress_reporting
from transformers import PreTrainedModel
from trl.trainer.utils import hash_module

from llama_stack_provider_moe.compute.evaluation import judges
from llama_stack_provider_moe.compute.evaluation.lm_eval_tasks import run_tasks
from llama_stack_provider_moe.compute.export import hub, ollama
from llama_stack_provider_moe.compute.moe import downloads
from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.quantize import dequantize
from llama_stack_provider_moe.compute.recipes import dpo
from llama_stack_provider_moe.compute.runtime import library_signs
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.liveness import Work
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.checkpoint_index import sync, verify_files, write_checksums
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.destinations import OllamaServer
from llama_stack_provider_moe.spec.server_config import MIRROR_VARIABLE
from tests.compute.recipes.test_export import asked, done
from tests.compute.recipes.test_routing_analysis import ANALYSIS, run, service
from tests.compute.train.test_safety_eval import evaluated
from tests.support import tiny_models
from tests.support.ollama_server import ollama as ollama_server
from tests.support.training_support import Run, Workshop, dpo_rows, sft_rows, workshop

__all__ = ["service", "workshop"]


@pytest.fixture(scope="module", autouse=True)
def every_report() -> Iterator[None]:
    """No report is dropped because it follows another one too soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(liveness, "EVERY_S", 0.0)
        yield


def reports_of(folder: JobFolder) -> dict[str, list[Work]]:
    """A job's reports by stage, in order."""
    found: dict[str, list[Work]] = {}
    page = events.read(folder.events)
    while page.events:
        for event in page.events:
            if event.type == "progress":
                found.setdefault(event.stage, []).append(Work(event.stage, event.done, event.total, event.unit))
        page = events.read(folder.events, page.cursor)
    return found


@pytest.fixture
def told() -> Iterator[list[Work]]:
    """The reports of this test."""
    reports: list[Work] = []
    with liveness.reports_to(reports.append):
        yield reports


@pytest.fixture(scope="module")
def sft(workshop: Workshop) -> Run:
    """LoRA on a quantised base with four micro-batches a step, evaluated and merged."""
    return evaluated(
        workshop, "sft", "granitemoe", {}, adapter={"quantize_base": True},
        training={"batch_size": 2, "gradient_accumulation_steps": 4}, options={"save_merged": True},
    )  # fmt: skip


@pytest.fixture(scope="module")
def preferences(workshop: Workshop) -> Run:
    """All weights, with the untrained model as the reference."""
    return workshop.run(
        "dpo", "qwen3_moe", dpo_rows(16), adapter=None, training={"batch_size": 2},
        options={"precompute_ref_log_probs": True},
    )  # fmt: skip


@pytest.fixture(scope="module")
def breaker(workshop: Workshop) -> Run:
    return workshop.run("circuit_breaker", "mixtral", training={"batch_size": 2})


@pytest.fixture(scope="module")
def exported(sft: Run) -> Run:
    folder = asked(sft, "export", load_check=True, merged=True)
    return Run(folder, done(folder))


# Job, stage, the minimum number of reports between its first and its last, and whether it counts up to a total.
STAGES = [
    ("sft", "importing libraries", 0, False),
    ("sft", "loading weights", 10, True),
    ("sft", "quantising experts", 2, True),
    ("sft", "quantising linear layers", 4, True),
    ("sft", "tokenising", 1, True),
    ("sft", "eval before: refuse", 2, True),
    ("sft", "eval before: retain", 2, True),
    ("sft", "eval after: safe", 2, True),
    ("sft", "training", 10, True),
    ("sft", "evaluating", 2, True),
    ("sft", "saving a checkpoint", 2, False),
    ("sft", "saving adapter", 0, False),
    ("sft", "computing checksums", 4, True),
    ("sft", "writing to the disk", 4, True),
    ("sft", "recording logits", 4, False),
    ("sft", "decoding the base", 2, True),
    ("sft", "merging the adapter", 4, True),
    ("sft", "writing weights", 1, True),
    ("preferences", "hashing weights", 10, True),
    ("preferences", "computing the reference's log-probabilities (train)", 16, True),
    ("preferences", "computing the reference's log-probabilities (eval)", 4, True),
    ("preferences", "evaluating", 4, True),
    ("preferences", "saving a checkpoint", 20, False),
    ("preferences", "writing weights", 1, True),
    ("breaker", "evaluating", 4, True),
    ("exported", "verifying adapter", 2, True),
    ("exported", "loading weights", 3, True),
    ("exported", "computing logits", 4, True),
    ("exported", "merging", 10, True),
    ("exported", "computing checksums", 1, True),
]  # fmt: skip


@pytest.mark.parametrize(("job", "stage", "least", "counts"), STAGES, ids=[" ".join(each[:2]) for each in STAGES])
def test_a_stage_reports_while_it_works(
    request: pytest.FixtureRequest, job: str, stage: str, least: int, counts: bool
) -> None:
    ran: Run = request.getfixturevalue(job)
    assert ran.exit_code == COMPLETED, ran.reason
    reports = reports_of(ran.folder)
    assert stage in reports, f"stages: {', '.join(reports)}"
    found = reports[stage]
    assert len(found) >= least + 1, found
    if counts:
        ends = [work for work in found if work.done == work.total]
        assert ends, found
        assert {work.done for work in found} > {0}, found
        assert all(work.done <= (work.total or 0) for work in found if work.total is not None), found


def test_generation_gives_a_sign_of_life_for_each_token(sft: Run) -> None:
    """6 rows in batches of 4, at most 12 tokens each, with a model of 2 layers: one token gives 3 signs."""
    found = [work for work in reports_of(sft.folder)["eval before: refuse"] if work.done == 0]
    assert len(found) > 12


def test_a_training_step_counts_its_micro_batches(sft: Run) -> None:
    """16 rows in batches of 2 are 8 micro-batches, in 2 steps of 4."""
    found = reports_of(sft.folder)["training"]
    assert {0, 1, 2, 3, 4, 5, 6, 7} <= {work.done for work in found}
    assert found[-1].total == 8


def test_a_routing_analysis_reports_while_it_works(service: Any) -> None:
    job_id, code = run(service, ANALYSIS | {"model": "granite", "job_uuid": "watched"})
    assert code == COMPLETED
    reports = reports_of(JobFolder(service.config.jobs_dir / job_id))
    for stage, least in (("tokenising garden", 8), ("resampling rows", 2), ("permuting rows", 2), ("analysing", 4)):
        assert len(reports[stage]) > least, reports[stage]


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_each_layer_of_a_pass_is_a_sign_of_life(told: list[Work], way: str) -> None:
    """In any model that a job loads; one batch of a large model takes minutes on a CPU."""
    model = tiny_models.model("granitemoe")
    library_signs.watch_layers(model)
    ids = torch.arange(3, 15).unsqueeze(0)
    with liveness.stage("passing"):
        loss = model(input_ids=ids, labels=ids).loss
        if way == "backward":
            told.clear()
            loss.backward()
    layers = model.config.num_hidden_layers
    assert len(told) == layers + (1 if way == "forward" else 0)


def test_a_hash_of_weights_is_trls_own(told: list[Work]) -> None:
    model = tiny_models.model("qwen3_moe").to(torch.bfloat16)
    with dpo.hashing_counted():
        assert dpo.dpo_trainer.hash_module(model) == hash_module(model)
    assert dpo.dpo_trainer.hash_module is hash_module
    tensors = len(model.state_dict())
    assert told[-1] == Work("hashing weights", tensors, tensors, "tensors")
    assert len(told) > tensors


def test_a_file_is_hashed_written_and_synced_in_pieces(tmp_path: Path, told: list[Work]) -> None:
    (tmp_path / "weights").write_bytes(bytes(5 << 20))
    write_checksums(tmp_path, step=1)
    assert [work.done >> 20 for work in told] == [0, 1, 2, 3, 4, 5]
    told.clear()
    assert verify_files(tmp_path) is None
    assert [work.done >> 20 for work in told] == [0, 1, 2, 3, 4, 5]
    told.clear()
    large = tmp_path / "large"
    large.write_bytes(bytes(1))
    with large.open("r+b") as file:
        file.truncate(200 << 20)
    with liveness.stage("writing to the disk"):
        sync(large)
    assert len(told) == 1 + 4, "pieces of 64 MiB"


def test_torch_saves_a_tensor_at_a_time(tmp_path: Path, told: list[Work]) -> None:
    weights = {str(number): torch.full((1000,), float(number)) for number in range(8)}
    with liveness.stage("saving"), library_signs.CountingWriter(tmp_path / "state.pt") as file:
        torch.save(weights, file)
    assert len(told) > 8
    found = torch.load(tmp_path / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_a_download_reports_received_bytes(told: list[Work]) -> None:
    """The bar is created and advanced as huggingface_hub does it; see `_create_progress_bar` there."""
    how = {"unit": "B", "unit_scale": True, "total": 100, "initial": 0, "desc": "weights"}
    with liveness.stage("opening the model", unit="files"), downloads.DownloadBar(**how) as bar:
        for _ in range(10):
            bar.update(10)
    assert len(told) == 1 + 10


def test_bars_of_transformers_are_stages_in_both_ways_of_use(told: list[Work]) -> None:
    from transformers.utils import logging

    with library_signs.transformers_counts():
        assert list(logging.tqdm("abc", desc="Loading weights")) == ["a", "b", "c"]
        with logging.tqdm(total=2, desc="Something else") as bar:
            bar.update(1)
            bar.set_postfix(a=1)
            bar.update(1)
    assert [work for work in told if work.stage == "loading weights"][-1] == Work("loading weights", 3, 3, "tensors")
    assert told[-1] == Work("something else", 2, 2, "steps")
    told.clear()
    assert list(logging.tqdm("abc", desc="Loading weights")) == ["a", "b", "c"]
    assert not told


def test_bytes_sent_to_ollama_are_counted(tmp_path: Path, told: list[Work]) -> None:
    model, gguf = tmp_path / "model", tmp_path / "it.gguf"
    tiny_models.build("llama", model)
    gguf.write_bytes(bytes(3 << 20))
    with ollama_server() as (url, _):
        ollama.push(gguf, model, OllamaServer(name="it", url=url), say=lambda line: None)
    for stage in ("hashing it.gguf", "sending to Ollama"):
        assert [work.done >> 20 for work in told if work.stage == stage] == [0, 1, 2, 3], stage
    assert [work.done for work in told if work.stage.startswith("waiting for Ollama")][-1] > 1


def test_bytes_sent_to_the_hub_are_counted(tmp_path: Path, told: list[Work]) -> None:
    """A streamed file counts the bytes that are read, a file sent by Xet the bytes that are moved, and nothing else."""
    (tmp_path / "weights").write_bytes(bytes(1000))
    operation = huggingface_hub.CommitOperationAdd("weights", tmp_path / "weights")
    before = _xet_progress_reporting.XetUploadProgressReporter
    with liveness.stage("pushing", 1000, "bytes") as counter, hub._counted(counter):
        with operation.as_file(with_tqdm=True) as file:
            while file.read(100):
                pass
        assert told[-1] == Work("pushing", 1000, 1000, "bytes")
        told.clear()
        reporter = _xet_progress_reporting.XetUploadProgressReporter()
        for moved in (0, 0, 300, 300, 300, 500):
            group = SimpleNamespace(total_bytes_completed=moved, total_transfer_bytes_completed=0)
            reporter.update_progress(group, {})
        reporter.close()
        assert [work.done for work in told] == [300, 500]
    assert _xet_progress_reporting.XetUploadProgressReporter is before


def test_a_copy_is_a_sign_of_life_while_the_job_waits_for_it(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only then: during training it would hide a training that hangs."""
    monkeypatch.setenv(MIRROR_VARIABLE, f"file://{tmp_path / 'mirror'}")
    ran = workshop.run("sft", "granitemoe", sft_rows(8))
    assert ran.exit_code == COMPLETED, ran.reason
    found = reports_of(ran.folder)["copying to the mirror"]
    assert max(work.done for work in found) > 0
    shutil.rmtree(ran.folder.root / "checkpoints")
    ran.folder.manifest.unlink()
    again = workshop.again(ran)
    assert again.exit_code == COMPLETED, again.reason
    fetched = [
        work for stage, works in reports_of(ran.folder).items() if stage.startswith("fetching") for work in works
    ]
    assert fetched[-1].done >= (fetched[-1].total or 0) > 0


def test_a_quantised_base_is_decoded_layer_by_layer(told: list[Work]) -> None:
    from llama_stack_provider_moe.compute.moe.quantize import quantize

    model: PreTrainedModel = tiny_models.model("granitemoe")
    layout = find_layout(model)
    quantize(model, layout, Coding(4), torch.device("cpu"))
    told.clear()
    dequantize(model, layout)
    assert {work.unit for work in told} == {"layers", "linear layers"}
    assert all(max(w.done for w in told if w.unit == unit) > 1 for unit in ("layers", "linear layers"))


def test_the_child_process_of_a_comparison_reports_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from llama_stack_provider_moe.compute.export import separate_process

    separate_process._show(Work("loading weights", 1, 2, "tensors"))
    assert json.loads(capsys.readouterr().out) == {"work": ["loading weights", 1, 2, "tensors"]}
    assert separate_process._read("a library's words\n") == separate_process._read("[1]\n") == {}


def test_a_judges_batches_are_counted(told: list[Work]) -> None:
    model, tokenizer = tiny_models.model("llama", vocab_size=400), tiny_models.tokenizer()
    tokenizer.add_tokens(["Yes", "No"])
    told.clear()
    judges.ModelJudge("j", model, tokenizer, 2, 512).margins([judges.Exchange("A tree?", "An oak.")] * 7)
    assert [work.done for work in told if work.stage == "judging answers"] == [0, 1, 2, 3, 4]


def test_each_call_of_the_model_from_lm_eval_counts(told: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for lm-eval, which this package does not require: its names and its calls.

    (EleutherAI's lm-evaluation-harness 0.4, lm_eval/models/huggingface.py.)
    """

    class HFLM:
        def __init__(self, **_: Any) -> None:
            pass

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> str:
            return f"logits of {inps}"

        def _model_generate(self, context: Any, max_length: int, stop: Any, **_: Any) -> str:
            return f"{context} goes on"

    def simple_evaluate(model: Any, tasks: list[str], log_samples: bool) -> dict[str, Any]:
        assert [model._model_call(number) for number in range(3)] == [f"logits of {number}" for number in range(3)]
        assert model._model_generate("it", max_length=1, stop=[]) == "it goes on"
        assert not log_samples
        scores = {"acc,none": 0.5, "acc_stderr,none": 0.1}
        return {"results": {tasks[0]: scores}, "n-samples": {tasks[0]: {"effective": 3}}}

    package, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    vars(package).update(simple_evaluate=simple_evaluate, __spec__=ModuleSpec("lm_eval", None))
    vars(models).update(HFLM=HFLM)
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    skipped: list[str] = []
    found = run_tasks(tiny_models.model("llama"), tiny_models.tokenizer(), ["piqa"], 2, skipped.append)
    assert (found["piqa"].value, skipped) == (0.5, [])
    assert [work.done for work in told if work.stage == "lm-eval piqa"] == [0, 1, 2, 3, 4]
