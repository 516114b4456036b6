"""Directions that a job's evaluation takes out at run time: on submission, in the job, and with `moe-train eval`."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.evaluation.command import main
from llama_stack_provider_moe.compute.train.trackers import _figures
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.control.cli.local_checks import evaluate
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.references import uses_of
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput, NotFound
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.spec.ablation import MEASUREMENTS_FILE
from llama_stack_provider_moe.spec.command_words import read
from llama_stack_provider_moe.spec.local_commands import EVALUATION_COMMAND
from tests.compute.recipes.test_ablation import ABLATE, OTHER, SFT, measured, service
from tests.compute.recipes.test_routing_analysis import reason, run
from tests.support.host_support import caller, folder_of

__all__ = ["measured", "service"]

WANTED: dict[str, Any] = {"measurements": "measured", "ablate": [{"layer": "0-1", "measurement": 1}]}
STATES = {"before", "before_ablated", "after", "after_ablated"}


def asking(**changes: Any) -> dict[str, Any]:
    """An SFT job whose evaluation takes directions out."""
    block = {"retain_dataset_id": "garden", "resamples": 100, "ablated": WANTED | changes}
    return SFT | {"model": "granite", "adapter": {"plan": "trunk", "rank": 4}, "eval": block}


def command(service: PostTrainingService, rows: Path, *more: str) -> list[str]:
    """`moe-train eval` on the model of the jobs."""
    rows.write_text("".join(json.dumps(row) + "\n" for row in OTHER))
    return [
        str(service.config.models_dir / "granite"), "--retain", str(rows), "--dtype", "fp32", "--max-length", "64",
        "--resamples", "100", "--out", str(rows.parent / "out"), *more,
    ]  # fmt: skip


def test_a_job_measures_without_the_directions(service: PostTrainingService, measured: str, tmp_path: Path) -> None:
    """`moe-train eval` measures the same at run time, and so does an edited model without kept norms."""
    asked = asking(ablate_individual_experts=True)
    with caller("ann"):
        job_id, code = run(service, asked)
        edited, edit_code = run(service, ABLATE | {"model": "granite", "norm_preserving": "off"})
    folder = folder_of(service, job_id)
    assert (code, edit_code) == (COMPLETED, COMPLETED), reason(folder)
    found = json.loads((folder.evaluation / "eval.json").read_text())
    assert set(found["measured"]) == STATES
    assert set(found["differences"]) == {
        "after - before", "before_ablated - before", "after_ablated - after",
    }  # fmt: skip
    assert (found["ablated"]["measurements"], found["ablated"]["ablate"][0]["layer"]) == ("measured", "0-1")
    assert "measures again with the directions of measured taken out of blocks 0-1" in folder.events.read_text()
    values = {state: each["perplexity"]["value"] for state, each in found["measured"].items()}
    assert len(set(values.values())) == len(STATES)
    told = [each for each in events.read(folder.events).events if isinstance(each, events.Assessed)]
    assert [_figures(each)["safety/ablated/perplexity"] for each in told] == [
        values["before_ablated"], values["after_ablated"],
    ]  # fmt: skip

    file = str(folder_of(service, measured).measurements / MEASUREMENTS_FILE)
    line = command(service, tmp_path / "rows.jsonl", "--ablate", "0:1", "--ablate", "1:1:1.0", "--ablate-from", file,
                   "--ablate-experts")  # fmt: skip
    assert main(line) == 0
    alone = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert alone["measured"]["before_ablated"]["perplexity"]["value"] == pytest.approx(values["before_ablated"])
    assert main([str(folder_of(service, edited).model), *line[1:-7], "--out", str(tmp_path / "edited")]) == 0
    of_weights = json.loads((tmp_path / "edited" / "eval.json").read_text())["measured"]["before"]
    assert of_weights["perplexity"]["value"] == pytest.approx(values["before_ablated"], rel=1e-5)


def test_such_a_job_needs_its_measurement_until_it_has_completed(service: PostTrainingService, measured: str) -> None:
    with caller("ann"):
        job_id = asyncio.run(service.submit(asking())).job_uuid
        uses = uses_of(folder_of(service, job_id).read_spec(), service.config.jobs_dir)
        asyncio.run(service.cancel(job_id))
    assert (uses.always, uses.to_complete) == ((), ("measured",))


def test_what_the_server_refuses(service: PostTrainingService, measured: str) -> None:
    def refusal(kind: type[Exception] = InvalidInput, **changes: Any) -> str:
        with caller("ann"), pytest.raises(kind) as caught:
            asyncio.run(service.validate(asking(**changes)))
        return str(caught.value)

    assert "no-such-job" in refusal(NotFound, measurements="no-such-job")
    assert "eval.ablated.norm_preserving: unknown key" in refusal(norm_preserving="row")
    assert "eval.ablated.gate_scale: 2 is not valid" in refusal(gate_scale=2)
    assert "eval.ablated.ablate" in refusal(ablate=[])
    with caller("ann"):
        waiting = asyncio.run(service.submit(SFT | {"model": "granite"})).job_uuid
    assert "eval.ablated.measurements" in refusal(measurements=waiting)
    with caller("ann"):
        asyncio.run(service.cancel(waiting))
    with caller("eve"), pytest.raises(NotFound):
        asyncio.run(service.validate(asking()))


def test_measurements_of_another_model_fail_the_job_before_it_trains(
    service: PostTrainingService, measured: str
) -> None:
    with caller("ann"):
        job_id, code = run(service, asking() | {"model": "wide"})
    folder = folder_of(service, job_id)
    assert code == FAILED
    assert "eval.ablated.measurements" in reason(folder)
    assert "expected measurements of this model, whose fingerprint is" in reason(folder)
    assert not folder.before.is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ablate", "0:1"], "--ablate: '0:1' is not valid; expected also --ablate-from"),
        (["--ablate-from", "m"], "--ablate-from: 'm' is not valid; expected also --ablate"),
        (["--ablate", "0", "--ablate-from", "m"], "expected BLOCKS:BLOCK"),
        (["--ablate", "0:1:1:1", "--ablate-from", "m"], "expected BLOCKS:BLOCK"),
        (["--ablate", "a:1", "--ablate-from", "m"], "ablated.ablate.0.layer"),
        (["--ablate", "0:1:3", "--ablate-from", "m"], "ablated.ablate.0.scale"),
        (["--ablate", "0:1", "--ablate-from", "no-file"], "--ablate-from: 'no-file' is not valid; expected a measurem"),
        (["--ablate", "0:1", "--ablate-from", "m", "--url", "http://localhost"], "can't be changed from here"),
    ],
)
def test_mistakes_on_the_command_line(
    service: PostTrainingService, tmp_path: Path, words: list[str], told: str
) -> None:
    (tmp_path / "m").write_bytes(b"")
    given = [str(tmp_path / "m") if word == "m" else word for word in words]
    line = read(EVALUATION_COMMAND, command(service, tmp_path / "rows.jsonl", *given), "eval")
    with pytest.raises((InvalidInput, InvalidBody)) as caught:
        evaluate(line)
    assert told.replace("'m'", repr(str(tmp_path / "m"))) in str(caught.value)
