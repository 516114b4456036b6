"""`moe-train probe fit`: the words of its options, and of a job's errors about them."""

from llama_stack_provider_moe.spec import AblationMeasureSpec, ProbeSpec
from llama_stack_provider_moe.spec.ablate_commands import MEASURE_COMMAND
from llama_stack_provider_moe.spec.probe_commands import FIT_COMMAND, as_typed


def test_a_job_that_refuses_long_rows_says_so() -> None:
    for spec, command in ((ProbeSpec, FIT_COMMAND), (AblationMeasureSpec, MEASURE_COMMAND)):
        options = spec.model_fields["options"].annotation
        for field in (options.model_fields["max_length"], command.model_fields["max_length"]):  # type: ignore[union-attr]
            assert field.description == "Maximum number of tokens of a row; longer ones are refused."


def test_an_error_of_a_job_names_options() -> None:
    told = "data.sets.baseline: 3 rows for probe.false_positive_rate 0.01, more than options.max_length; probe.json"
    assert as_typed(told) == "--set baseline: 3 rows for --false-positive-rate 0.01, more than --max-length; probe.json"
