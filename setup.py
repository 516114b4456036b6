"""The part of the build that pyproject.toml has no field for: files of the top level go into the package.

`moe-train init` and `moe-train templates` read run_configs, job_templates and the constraints. In a wheel they lie in
the package. An editable installation reads them where they are, at the top level: the only copies in the repository.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "llama_stack_provider_moe"
FOLDERS = ("job_templates", "run_configs")


class BuildWithTopLevelFiles(build_py):
    """Copies the files after those of the package."""

    def run(self) -> None:
        """Build the package, and copy the files unless it is editable."""
        super().run()
        if self.editable_mode:
            return
        into = Path(self.build_lib) / PACKAGE
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, into / folder, dirs_exist_ok=True)
        for path in ROOT.glob("constraints*.txt"):
            if "unsloth" not in path.name:  # of another environment, which this package does not set up
                shutil.copy(path, into / path.name)


setup(cmdclass={"build_py": BuildWithTopLevelFiles})
