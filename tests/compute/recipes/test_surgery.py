"""Expert surgery as jobs: a pruned model of the user's, and what the next jobs make of it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_stack_provider_moe.compute.surgery.report import SurgeryReport
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.surgery import REPORT_FILE
from tests.compute.recipes.test_routing_analysis import GARDEN, SFT, SUMS, reason, run
from tests.support import surgery_models, tiny_models
from tests.support.export_support import gap, logits
from tests.support.host_support import Datasets, caller, folder_of, serving_in_process

TEXTS = [{"text": f"The {i} gardens of spring are green."} for i in range(5)]
PRUNE: dict[str, Any] = {
    "recipe": "surgery",
    "model": "eight",
    "surgery": {"action": "prune", "keep": 6},
    "data": {"dataset_id": "garden"},
    "training": {"dtype": "fp32"},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows |= {"garden": GARDEN, "sums": SUMS, "texts": TEXTS}
    with serving_in_process(tmp_path_factory.mktemp("surgery"), datasets) as made:
        surgery_models.build("granitemoe", made.config.models_dir / "eight")
        tiny_models.build("llama", made.config.models_dir / "dense")
        yield made


@pytest.fixture(scope="module")
def pruned(service: PostTrainingService) -> str:
    with caller("ann"):
        job_id, code = run(service, PRUNE | {"job_uuid": "pruned"})
    assert code == COMPLETED, reason(folder_of(service, job_id))
    return job_id


def report_of(folder: JobFolder) -> SurgeryReport:
    return SurgeryReport.model_validate_json((folder.model / REPORT_FILE).read_text())


def test_a_job_leaves_a_model_and_says_what_it_cost(service: PostTrainingService, pruned: str) -> None:
    folder = folder_of(service, pruned)
    report, manifest = report_of(folder), folder.read_manifest()
    assert manifest is not None
    assert [artifact.kind for artifact in manifest.artifacts] == ["model"]
    assert report.loss is not None
    assert report.loss.rows == len(GARDEN)
    assert manifest.summary == {
        "experts_before": 8, "experts_after": 6, "loss_before": report.loss.before, "loss_after": report.loss.after,
        "kl": report.loss.kl,
    }  # fmt: skip
    assert report.folder == str(folder.model)
    assert surgery_models.layout_of(surgery_models.load(folder.model)).num_experts == 6


def test_the_next_job_trains_it_and_an_old_adapter_does_not_fit(service: PostTrainingService, pruned: str) -> None:
    adapter = {"adapter": {"rank": 2, "alpha": 4}}
    with caller("ann"):
        trained, code = run(service, SFT | adapter | {"model": pruned, "job_uuid": "trained"})
        assert code == COMPLETED, reason(folder_of(service, trained))
        old, code = run(service, SFT | adapter | {"model": "eight", "job_uuid": "old"})
        assert code == COMPLETED, reason(folder_of(service, old))
        sets = {"recipe": "routing_analysis", "data": {"sets": {"a": "garden", "b": "sums"}}}
        with pytest.raises(InvalidInput, match="the base of the adapter"):
            asyncio.run(service.submit(sets | {"model": pruned, "adapter_folder": "old"}))
    found = load_file(folder_of(service, trained).adapter / "adapter_model.safetensors")
    assert {each.shape[0] for name, each in found.items() if "experts" in name and "lora_A" in name} == {12}


def test_a_list_needs_no_rows_and_loads_no_model(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from llama_stack_provider_moe.compute.recipes import surgery

    monkeypatch.setattr(surgery, "load_rows", None)
    body = {name: value for name, value in PRUNE.items() if name != "data"}
    body |= {"surgery": {"action": "prune", "drop": {"0": "0,7", "1": "2-3"}}, "job_uuid": "listed"}
    with caller("ann"):
        job_id, code = run(service, body)
    folder = folder_of(service, job_id)
    assert code == COMPLETED, reason(folder)
    report = report_of(folder)
    assert [layer.dropped for layer in report.layers] == [[0, 7], [2, 3]]
    assert report.loss is None
    assert folder.read_spec().resources.gpus == 0
    old = load_file(service.config.models_dir / "eight" / "model.safetensors")
    new = load_file(folder.model / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.router.layer.weight"
    assert torch.equal(new[name], old[name][[0, 1, 4, 5, 6, 7]])


def test_plain_texts_are_rows_too(service: PostTrainingService) -> None:
    with caller("ann"):
        job_id, code = run(service, PRUNE | {"data": {"dataset_id": "texts"}, "job_uuid": "of-texts"})
    folder = folder_of(service, job_id)
    assert code == COMPLETED, reason(folder)
    found = report_of(folder).loss
    assert found is not None
    assert found.rows == len(TEXTS)


def test_a_model_is_split(service: PostTrainingService) -> None:
    body = {name: value for name, value in PRUNE.items() if name != "data"}
    with caller("ann"):
        job_id, code = run(service, body | {"surgery": {"action": "split"}, "job_uuid": "twins"})
    folder = folder_of(service, job_id)
    assert code == COMPLETED, reason(folder)
    assert (report_of(folder).experts_after, report_of(folder).top_k) == (16, 4)
    old, new = surgery_models.load(service.config.models_dir / "eight"), surgery_models.load(folder.model)
    assert gap(logits(new), logits(old)) <= 3e-6


def test_experts_are_merged(service: PostTrainingService) -> None:
    body = PRUNE | {"surgery": {"action": "merge", "keep": 5, "by": "outputs"}, "job_uuid": "joined"}
    with caller("ann"):
        job_id, code = run(service, body)
    folder = folder_of(service, job_id)
    assert code == COMPLETED, reason(folder)
    report, manifest = report_of(folder), folder.read_manifest()
    assert (report.experts_after, report.by) == (5, "outputs")
    assert manifest is not None
    assert report.loss is not None
    assert manifest.summary["kl"] == report.loss.kl > 0
    assert surgery_models.layout_of(surgery_models.load(folder.model)).num_experts == 5


def test_experts_of_a_domain_are_added_from_a_job_of_ones_own(service: PostTrainingService, pruned: str) -> None:
    added = {"router": "domain", "mlp_from": pruned, "mlp_expert": 2}
    body = PRUNE | {"surgery": {"action": "add", "add": added}, "job_uuid": "wider"}
    body["data"] = {"dataset_id": "garden", "general_dataset_id": "sums"}
    with caller("ann"):
        job_id, code = run(service, body)
    folder = folder_of(service, job_id)
    assert code == COMPLETED, reason(folder)
    report, manifest = report_of(folder), folder.read_manifest()
    assert manifest is not None
    assert report.general_loss is not None
    assert report.general_loss.rows == len(SUMS)
    assert manifest.summary["general_loss_after"] == report.general_loss.after
    donor = folder_of(service, pruned).model
    assert folder.read_spec().surgery.add.mlp_from == str(donor)  # type: ignore[union-attr]
    theirs, ours = load_file(donor / "model.safetensors"), load_file(folder.model / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.output_linear.weight"
    assert torch.equal(ours[name][8], theirs[name][2])
    with caller("bob"):
        seen = asyncio.run(service.validate(body | {"job_uuid": "stolen"})).spec
    assert seen["surgery"]["add"]["mlp_from"] == pruned, "to others, the name of a job is a hub id"


def test_a_teacher_is_a_model_that_the_caller_may_use(service: PostTrainingService, pruned: str) -> None:
    """The model before a surgery teaches the one after it; a folder outside of the server's is refused."""
    body = SFT | {"model": pruned, "adapter": {"rank": 2}, "distill": {"model": "eight", "weight": 0.9}}
    with caller("ann"):
        job_id, code = run(service, body | {"job_uuid": "healed"})
        assert code == COMPLETED, reason(folder_of(service, job_id))
        own = asyncio.run(service.validate(SFT | {"model": "eight", "distill": {"model": pruned}})).spec
        with pytest.raises(Forbidden) as caught:
            asyncio.run(service.submit(body | {"distill": {"model": "/etc"}}))
    assert folder_of(service, job_id).read_spec().distill.model == str(  # type: ignore[union-attr]
        service.config.models_dir / "eight"
    )
    assert own["distill"]["model"] == str(folder_of(service, pruned).model)
    assert "distill.model" in str(caught.value)
    with caller("bob"), pytest.raises(InvalidInput, match=r"distill.model: 'pruned' is not valid"):
        asyncio.run(service.validate(SFT | {"model": "eight", "distill": {"model": pruned}}))


def test_a_teacher_of_on_policy_distillation_is_named_in_the_same_way(
    service: PostTrainingService, pruned: str
) -> None:
    body = {**SFT, "recipe": "distill", "model": "eight", "teacher": pruned, "adapter": {"rank": 2},
            "training": {"batch_size": 2}, "options": {"max_length": 64},
            "generation": {"max_completion_length": 8}}  # fmt: skip
    with caller("ann"):
        own = asyncio.run(service.validate(body)).spec
        assert own["teacher"] == str(folder_of(service, pruned).model)
        with pytest.raises(Forbidden, match="teacher"):
            asyncio.run(service.submit(body | {"teacher": "/etc"}))
        submitted = asyncio.run(service.submit(body | {"job_uuid": "later"}))
        with pytest.raises(Conflict, match="later"):
            asyncio.run(service.delete(pruned))
        asyncio.run(service.cancel(submitted.job_uuid))
    with caller("bob"), pytest.raises(InvalidInput, match=r"teacher: 'pruned' is not valid"):
        asyncio.run(service.validate(body))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"surgery": {"action": "prune", "keep": 1}}, "surgery.keep: 1 is not valid; expected 2 to 7 experts to keep"),
        ({"model": "dense"}, "'llama' is a dense model; expected one with experts"),
        ({"surgery": {"action": "prune", "drop": {"9": "1"}}}, "surgery.drop: 9 is not valid; expected layers"),
    ],
)
def test_what_only_the_model_shows_fails_before_its_weights_are_read(
    service: PostTrainingService, changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_stack_provider_moe.compute.recipes import surgery

    monkeypatch.setattr(surgery, "load_rows", None)
    with caller("ann"):
        job_id, code = run(service, PRUNE | changes)
    folder = folder_of(service, job_id)
    assert code == FAILED
    assert expected in reason(folder)
    assert not folder.model.exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": None}, "data: is missing; expected rows, because surgery.keep chooses"),
        ({"surgery": {"action": "prune"}}, "keep: None is not valid without `drop`"),
        ({"surgery": {"action": "grow", "keep": 4}}, "surgery.action: 'grow' is not valid"),
        ({"surgery": {"action": "prune", "keep": 4, "kept": 4}}, "surgery.kept"),
        ({"surgery": {"action": "split"}}, "data: has no effect with surgery.action 'split'"),
        ({"surgery": {"action": "split", "factor": 1}}, "surgery.factor: 1 is not valid"),
        ({"surgery": {"action": "merge"}}, "keep: is missing; expected the number of experts"),
        ({"surgery": {"action": "merge", "keep": 4, "by": "reap"}}, "by: 'reap' is not valid with action 'merge'"),
        (
            {"surgery": {"action": "prune", "keep": 4, "by": "outputs"}},
            "by: 'outputs' is not valid with action 'prune'",
        ),
        ({"surgery": {"action": "prune", "keep": 4, "align": False}}, "align: False has no effect with action 'prune'"),
        ({"surgery": {"action": "merge", "keep": 4}, "data": None}, "surgery.by 'outputs' is measured on them"),
        ({"surgery": {"action": "add", "add": {"router": "domain"}}}, "data.general_dataset_id: is missing"),
        ({"data": {"dataset_id": "garden", "general_dataset_id": "sums"}}, "data.general_dataset_id: 'sums' has no"),
        ({"surgery": {"action": "add", "keep": 4}}, "keep: 4 has no effect with action 'add'"),
        ({"options": {"seed": 1}}, "options.seed"),
        ({"adapter": None}, "adapter"),
        ({"resources": {"gpus": 2}}, "gpus: 2 is not valid with this recipe"),
    ],
)
def test_a_job_is_checked_at_the_door(service: PostTrainingService, changes: dict[str, Any], expected: str) -> None:
    with caller("ann"), pytest.raises(InvalidInput) as caught:
        asyncio.run(service.submit(PRUNE | changes))
    assert expected in str(caught.value)
