"""The sample of the LoRA report in its guide has lines of the report that the command makes, in their order."""

import json
import re
import shlex
from dataclasses import asdict

import pytest

from llama_stack_provider_moe.compute.planning.lora_report import report_of
from llama_stack_provider_moe.control.cli.report import shown
from llama_stack_provider_moe.control.cli.screen import Screen
from tests.contracts.doc_blocks import ROOT

GUIDE = ROOT / "docs" / "guides" / "memory-planning.md"
SAMPLE = re.compile(r"```sh\nmoe-train report lora (?P<words>.*?)\n```\n\n```text\n(?P<lines>.*?)\n```", re.DOTALL)
LEFT_OUT = "..."


def test_the_sample_report_is_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    found = SAMPLE.search(GUIDE.read_text(encoding="utf-8"))
    assert found is not None
    document = json.loads(json.dumps(asdict(report_of(shlex.split(found["words"])))))
    Screen(False).say(shown(document))
    whole = capsys.readouterr().out
    printed = iter(whole.splitlines())
    for line in found["lines"].splitlines():
        # A search in an iterator goes on from the line before.
        assert line in (LEFT_OUT, "") or line in printed, f"{line!r} is not the report's next line of:\n{whole}"
    assert "VISION" in found["lines"], "a model that sees images"
    assert "vision tower of sft" in found["lines"]
