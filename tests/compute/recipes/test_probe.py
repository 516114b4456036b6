"""A probe as a job, from the request to its artifact; and what the server refuses."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from llama_stack_provider_moe.compute.probing.score_command import main as score_main
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.jobdir.local_names import STATE_VARIABLE, probe_folder
from llama_stack_provider_moe.shields.probe_card import ProbeCard, read_card
from llama_stack_provider_moe.spec.probe import CARD_FILE, WEIGHTS_FILE
from tests.compute.recipes.test_routing_analysis import reason, run
from tests.support import tiny_models
from tests.support.host_support import Datasets, ask, caller, folder_of, serving_in_process
from tests.support.tiny_probe import OTHERS, SETTINGS, TARGETS

PROBE: dict[str, Any] = SETTINGS | {"model": "granite"}


def prompts(texts: list[str]) -> list[dict[str, str]]:
    return [{"prompt": text} for text in texts]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows |= {
        "boil": prompts(TARGETS), "add": prompts(OTHERS), "few": prompts(OTHERS[:29]),
        "boil-too": prompts([f"How long do {i} eggs boil?" for i in range(12)]),
        "add-too": prompts([f"What is {i} and 9?" for i in range(15)]), "same": prompts(OTHERS[:20] * 2),
    }  # fmt: skip
    with serving_in_process(tmp_path_factory.mktemp("probe"), datasets) as made:
        tiny_models.build("granitemoe", made.config.models_dir / "granite")
        yield made


def test_a_job_leaves_a_probe_that_commands_can_name(
    service: PostTrainingService,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = PROBE["data"]["sets"] | {"test_target": "boil-too", "test_baseline": "add-too"}
    with caller("ann"):
        job_id, code = run(service, PROBE | {"data": {"sets": sets}, "job_uuid": "guard"})
        assert code == COMPLETED, reason(folder_of(service, job_id))
        artifacts = asyncio.run(service.artifacts(job_id)).checkpoints
        detail = asyncio.run(service.detail(job_id))
        sent = ask(service, "GET", f"/jobs/{job_id}/artifacts/probe/{CARD_FILE}")
    assert [(each.kind, each.identifier) for each in artifacts] == [("analysis", "guard/probe")]
    card = ProbeCard.model_validate(sent.json())
    assert {path.name for path in folder_of(service, job_id).probe.iterdir()} >= {CARD_FILE, WEIGHTS_FILE}
    assert card.test is not None
    assert (card.test.probe.detected.rows, card.test.probe.false_positives.rows) == (12, 15)
    assert {name: (each.source, each.rows) for name, each in card.sets.items()} == {
        "target": ("boil", 45), "baseline": ("add", 60), "test_target": ("boil-too", 12),
        "test_baseline": ("add-too", 15),
    }  # fmt: skip
    assert detail.summary is not None
    assert detail.summary["threshold"] == card.threshold
    assert detail.summary["detected"] == card.test.probe.detected.value
    monkeypatch.setenv(STATE_VARIABLE, str(service.config.state_dir))
    assert read_card(probe_folder("guard", "PROBE"), "PROBE") == card
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text('{"prompt": "Boil 3 eggs in 4 minutes."}\n{"prompt": "Add 3 to 9 and tell me."}\n')
    capsys.readouterr()
    assert score_main(["guard", str(file)]) == 0
    first, second, total = capsys.readouterr().out.splitlines()
    assert float(first.split()[2]) > float(second.split()[2])
    assert total.endswith(f"threshold {card.threshold:.6f}")


def test_equal_rows_fail_the_job_by_name(service: PostTrainingService) -> None:
    with caller("ann"):
        job_id, code = run(service, PROBE | {"data": {"sets": {"target": "boil", "baseline": "same"}}})
    assert code == FAILED
    assert "data.sets.baseline: has 20 different rows; expected at least 30" in reason(folder_of(service, job_id))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"sets": {"target": "boil", "baseline": "few"}}},
         "at least 30 rows, because a third of them sets the threshold for probe.false_positive_rate 0.1"),
        ({"data": {"sets": {"target": "boil", "other": "add"}}}, "can't fit a probe; expected target"),
        ({"data": {"sets": {"target": "boil", "baseline": "add", "test_target": "boil-too"}}}, "both or neither"),
        ({"probe": {"position": -2}}, "position: -2 has no effect with tokens 'content'"),
        ({"probe": {"layers": "0-16"}}, "names 17 blocks; expected at most 16"),
        ({"probe": {"false_positive_rate": 0}}, "probe.false_positive_rate"),
        ({"probe": {"layers_read": 3}}, "probe.layers_read"),
        ({"probe": {"depth": 3}}, "probe.depth"),
    ],
)  # fmt: skip
def test_what_the_server_refuses(service: PostTrainingService, changes: dict[str, Any], words: str) -> None:
    with caller("ann"), pytest.raises((InvalidInput, InvalidBody)) as caught:
        asyncio.run(service.validate(PROBE | changes))
    assert words in str(caught.value)
