"""What output.log says about an error: a user's is one line, a bug leaves its traceback."""

import pytest

from llama_stack_provider_moe.compute.worker import main
from llama_stack_provider_moe.errors import InvalidInput, ModelError


def raised(error: Exception, cause: Exception | None) -> Exception:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "cause", "is_line"),
    [
        (InvalidInput("model", "m", "another"), None, True),
        (ModelError("model: renamed"), InvalidInput("base", "m", "another"), True),
        (ModelError("model: can't be read"), KeyError("a"), False),
        (KeyError("a"), None, False),
    ],
)
def test_a_users_error_is_one_line_and_a_bug_a_traceback(
    error: Exception, cause: Exception | None, is_line: bool
) -> None:
    told = main._output(raised(error, cause))
    assert ("Traceback" not in told, told == f"error: {error}") == (is_line, is_line)
    assert str(error) in told
