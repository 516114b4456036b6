"""`spec` loads a name's module when the name is asked for."""

import subprocess
import sys
from types import ModuleType

import pytest

from llama_stack_provider_moe import spec
from llama_stack_provider_moe.spec import rows


@pytest.mark.parametrize("package", [spec, rows], ids=lambda package: package.__name__)
def test_every_name_is_in_the_table_and_loads(package: ModuleType) -> None:
    assert sorted(name for names in package._NAMES.values() for name in names) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Wrong'"):
        _ = package.Wrong


def test_a_block_does_not_load_every_job() -> None:
    code = (
        "import sys\n"
        "from llama_stack_provider_moe.spec import Block\n"
        "print([name for name in sys.modules if name.endswith(('spec.job_spec', 'spec.training_jobs'))])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert ended.stdout.strip() == "[]"
