"""What a user's screen gets from the imports of a command with torch: nothing but real warnings."""

import logging
import subprocess
import sys

import pytest

import llama_stack_provider_moe.compute  # noqa: F401  (installs the filter)

LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")
TEXT = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."


def test_the_imports_of_a_command_say_nothing() -> None:
    """bitsandbytes speaks up only on a CPU with AVX512-BF16, so on others the test below is the one that counts."""
    code = "import llama_stack_provider_moe.compute.evaluation.command, bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_the_missing_package_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    LOGGER.warning(TEXT, ModuleNotFoundError("No module named 'kernels'", name="kernels"))
    LOGGER.warning(TEXT, OSError("the hub does not answer"))
    LOGGER.warning(TEXT, ModuleNotFoundError("No module named 'other'", name="other"))
    LOGGER.warning("no native library")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "the hub does not answer.", "No module named 'other'.", ""
    ]  # fmt: skip


def test_a_warning_that_no_user_can_mend_is_left_out() -> None:
    code = (
        "import warnings, llama_stack_provider_moe.compute\n"
        "for name in ('is_gradient_checkpointing', 'other'):\n"
        "    warnings.warn(f'`{name}` is deprecated and will be removed in v6.', FutureWarning)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "`other` is deprecated" in done.stderr
    assert "is_gradient_checkpointing" not in done.stderr
