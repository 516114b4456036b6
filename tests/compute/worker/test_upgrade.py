"""A training process that is older than the server: it names the settings that it ignores."""

import json

from llama_stack_provider_moe.compute.worker.main import COMPLETED
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]


def test_settings_that_are_not_known_are_named(workshop: Workshop) -> None:
    folder = workshop.job("sft", "granitemoe")
    spec = json.loads(folder.spec.read_text())
    spec["moe"]["of_a_later_version"] = 0.5
    folder.spec.write_text(json.dumps(spec))
    run = workshop.again(Run(folder, 0))
    assert run.exit_code == COMPLETED, run.reason
    (said,) = [each.text for each in run.events("message") if each.level == "warning"]
    assert said == "ignored, because this version does not know these settings: moe.of_a_later_version = 0.5"
    sound = workshop.run("sft", "granitemoe")
    assert not [each.text for each in sound.events("message") if "does not know" in each.text]
