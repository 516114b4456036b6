"""`moe-train probe fit`: the words of its options, and of a job's errors about them."""

import json
from pathlib import Path

import pytest

from llama_stack_provider_moe.errors import InvalidRows
from llama_stack_provider_moe.spec import AblationMeasureSpec, ProbeSpec
from llama_stack_provider_moe.spec.ablate_commands import MEASURE_COMMAND
from llama_stack_provider_moe.spec.local_rows import scored_rows
from llama_stack_provider_moe.spec.probe_commands import FIT_COMMAND, as_typed


def test_a_job_that_refuses_long_rows_says_so() -> None:
    for spec, command in ((ProbeSpec, FIT_COMMAND), (AblationMeasureSpec, MEASURE_COMMAND)):
        options = spec.model_fields["options"].annotation
        for field in (options.model_fields["max_length"], command.model_fields["max_length"]):  # type: ignore[union-attr]
            assert field.description == "Maximum number of tokens of a row; longer ones are refused."


def test_an_error_of_a_job_names_options() -> None:
    told = "data.sets.baseline: 3 rows for probe.false_positive_rate 0.01, more than options.max_length; probe.json"
    assert (
        as_typed(told) == "--rows baseline: 3 rows for --false-positive-rate 0.01, more than --max-length; probe.json"
    )


def test_a_bad_row_is_told_the_forms_that_are_taken(tmp_path: Path) -> None:
    """Each form in the error, without an answer, is taken; a plain text is not, and not in the error."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"x": "a"}\n')
    with pytest.raises(InvalidRows) as refused:
        scored_rows(file)
    told = str(refused.value)
    said = [{"role": "user", "content": "a"}]
    rows = {"messages": said, "dialog": said, "conversations": said, "instruction": "a", "prompt": "a",
            "chat_completion_input": json.dumps(said)}  # fmt: skip
    for column, value in rows.items():
        assert f"{{{column}}}" in told
        file.write_text(json.dumps({column: value}) + "\n")
        assert len(scored_rows(file)) == 1
    assert "an answer (output or expected_answer or completion) may be left out" in told
    assert "{text}" not in told
    file.write_text('{"text": "a"}\n')
    with pytest.raises(InvalidRows):
        scored_rows(file)
