"""Every generation of the SDKs with post-training submits, follows, cancels and lists jobs of a live server.

Each SDK gets an environment of its own, from the package registries. SDK_ENVS names a folder that keeps them between
runs. `make test-sdks` prints the table.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.bad_inputs import DATASETS, DPO, GOOD_BODIES, SFT
from tests.support.host_harness import QUICKSTART, Server, run_config, serving, tiny_interpreter

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SUPPORT = Path(__file__).parents[1] / "support"
PYTHON = ("0.2.23", "0.3.5", "0.4.7", "0.5.4", "0.6.1", "0.7.0")
NPM = ("0.2.23", "0.3.0")
# SDKs of these generations lost the parameter for the job's name.
WITHOUT_PARAMETER = ("0.5.4", "0.6.1")
TABLE: list[str] = []


@pytest.fixture(scope="module")
def envs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("SDK_ENVS")
    return Path(given) if given else tmp_path_factory.mktemp("sdks")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("matrix")
    provider = {"training_python": tiny_interpreter(folder), "supervisor": {"poll_s": 0.1}}
    config = run_config(QUICKSTART, folder, provider=provider)
    # llama-stack answers 426 to an SDK of another version otherwise.
    with serving(config, folder / "state", env={"LLAMA_STACK_DISABLE_VERSION_CHECK": "1"}) as running:
        for name in ("words", "pairs"):
            running.register(name, DATASETS[name])
        yield running
    print("\n| SDK | Version | Calls | Name of the job | SFT | Status, cancel | DPO | Artifacts | List | Errors |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(TABLE))


def program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def python_of(envs: Path, version: str) -> str:
    """The interpreter of an environment that has this SDK alone."""
    python = envs / f"py-{version}" / "bin" / "python"
    if not (python.parent.parent / "installed").exists():
        uv = program("uv")
        run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(python.parent.parent))
        run(uv, "pip", "install", "--quiet", "--python", str(python), f"llama-stack-client=={version}")
        (python.parent.parent / "installed").touch()
    return str(python)


def node_folder(envs: Path, version: str) -> Path:
    """A folder with this SDK in its node_modules."""
    folder = envs / f"npm-{version}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        run(
            program("npm"), "install", "--silent", "--no-audit", "--no-fund", f"llama-stack-client@{version}", at=folder
        )
        (folder / "installed").touch()
    return folder


def run(*command: str, at: Path | None = None) -> str:
    # Not our PYTHONPATH: the SDK's environment has nothing of ours.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=at, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)[:300]}\n{done.stderr[-3000:]}"
    return done.stdout


def must_have_worked(found: dict[str, Any], sdk: str, version: str, mode: str) -> None:
    style = found.pop("style")
    yes = {True: "yes", False: "NO"}
    TABLE.append(
        f"| {sdk} | {version} | {mode} | `{style}` | {yes[found['sft']]} | {found['status']}, {found['cancelled']} | "
        f"{found['completed']} | {found['artifacts']} | {yes[found['listed']]} | {yes[found.get('error', False)]} |"
    )
    assert style == ("extra_query" if sdk == "Python" and version in WITHOUT_PARAMETER else "job_uuid")
    assert found["status"] in ("in_progress", "completed")
    assert found["artifacts"] > 0
    expected = {"sft": True, "cancelled": "cancelled", "dpo": True, "completed": "completed", "listed": True}
    assert {name: found.get(name) for name in expected} == expected
    assert found.get("error") is True, "the SDK raises its NotFoundError with our message"


def bodies() -> str:
    return json.dumps({"sft": GOOD_BODIES[SFT], "dpo": GOOD_BODIES[DPO]})


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("version", PYTHON)
def test_python(server: Server, envs: Path, version: str, mode: str) -> None:
    name = f"{version.replace('.', '-')}-{mode}"
    script = str(SUPPORT / "sdk_script.py")
    out = run(python_of(envs, version), script, server.url, mode, name, bodies())
    must_have_worked(json.loads(out.splitlines()[-1]), "Python", version, mode)


@pytest.mark.parametrize("version", NPM)
def test_npm(server: Server, envs: Path, version: str) -> None:
    folder = node_folder(envs, version)
    name = f"npm-{version.replace('.', '-')}"
    out = run(program("node"), str(SUPPORT / "sdk_script.mjs"), server.url, "async", name, bodies(), at=folder)
    must_have_worked(json.loads(out.splitlines()[-1]), "npm", version, "async")
