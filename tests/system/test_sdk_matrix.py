"""Every generation of the SDKs with post-training, and of the openai packages, does what a user does, on a live server.

Each SDK gets an environment of its own, from the package registries. SDK_ENVS names a folder that keeps them between
runs. `make test-sdks` runs it, and writes `tests/results/sdks.json`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llama_stack_provider_moe.control.cli.hosts import HostName
from tests.support import sdk_results
from tests.support.bad_inputs import DATASETS, DPO, GOOD_BODIES, SFT, WORDS
from tests.support.host_harness import Server, tiny_interpreter
from tests.support.other_hosts import ALL, HostUnderTest, register, required, serving_on
from tests.support.sdk_results import Case

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SUPPORT = Path(__file__).parents[1] / "support"
OLD, OGX = HostName.LLAMA_STACK_0_6, HostName.OGX
BOTH = ("sync", "async")
# SDKs of these generations lost the parameter for the job's name.
WITHOUT_PARAMETER = ("0.5.4", "0.6.1")
PYTHON = [Case(OLD, "Python", version, mode) for version in ("0.2.23", "0.3.5", "0.4.7", "0.5.4", "0.6.1", "0.7.0")
          for mode in BOTH]  # fmt: skip
PYTHON += [Case(OGX, "Python", version, mode) for version in ("0.6.1", "0.7.0") for mode in BOTH]
NPM = [Case(host, "npm", version, "async") for host, version in ((OLD, "0.2.23"), (OLD, "0.3.0"), (OGX, "0.3.0"))]
OPENAI = [Case(host, "openai (Python)", asked, mode) for host in (OLD, OGX) for asked in ("<3", "newest")
          for mode in BOTH]  # fmt: skip
OPENAI_NPM = [Case(host, "openai (npm)", "newest", "async") for host in (OLD, OGX)]
CASES = sorted([*PYTHON, *NPM, *OPENAI, *OPENAI_NPM], key=lambda case: case.host == OGX)
FOUND: dict[Case, dict[str, Any]] = {}
# What the openai packages must have seen, beside numbers.
SEEN = dict.fromkeys(("created", "events", "resumed", "succeeded", "listed", "result_file", "errors"), True)
SEEN_STATES = {"paused": "cancelled", "cancelled": "cancelled"}
TYPESCRIPT = """import type OpenAI from "openai";
type Named = {
  "fine_tuning.job": OpenAI.FineTuning.Jobs.FineTuningJob;
  "fine_tuning.job.event": OpenAI.FineTuning.Jobs.FineTuningJobEvent;
  "fine_tuning.job.checkpoint": OpenAI.FineTuning.Jobs.Checkpoints.FineTuningJobCheckpoint;
};
"""


class On(NamedTuple):
    """A server on a host."""

    host: HostUnderTest
    server: Server


@pytest.fixture(scope="module")
def envs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("SDK_ENVS")
    return Path(given) if given else tmp_path_factory.mktemp("sdks")


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[None]:
    yield
    if FOUND:
        sdk_results.write(CASES, FOUND)


@pytest.fixture(scope="module")
def on(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[On]:
    host = required(next(each for each in ALL if each.name == request.param))
    folder = tmp_path_factory.mktemp("matrix")
    provider = {"training_python": tiny_interpreter(folder), "supervisor": {"poll_s": 0.1}}
    # Llama Stack answers 426 to an SDK of another version otherwise.
    environment = {"LLAMA_STACK_DISABLE_VERSION_CHECK": "1"}
    with serving_on(host, folder, provider, env=environment) as server:
        for name in ("words", "pairs"):
            if host.has_datasets:
                register(server, host, name, DATASETS[name])
            else:
                with server.http() as http:
                    http.put(f"/datasets/{name}", content=jsonl(DATASETS[name])).raise_for_status()
        yield On(host, server)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def of(cases: list[Case]) -> pytest.MarkDecorator:
    """A test of these cases, each with a server on its host."""
    params = [pytest.param(case.host, case, id=f"{case.host}-{case.name}") for case in cases]
    return pytest.mark.parametrize(("on", "case"), params, indirect=["on"])


def program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def python_of(envs: Path, package: str, asked: str) -> str:
    """The interpreter of an environment that has this SDK alone."""
    python = envs / f"py-{package}-{asked.strip('<')}" / "bin" / "python"
    if not (python.parent.parent / "installed").exists():
        uv = program("uv")
        limit = "" if asked == "newest" else asked if asked.startswith("<") else f"=={asked}"
        run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(python.parent.parent))
        run(uv, "pip", "install", "--quiet", "--python", str(python), f"{package}{limit}")
        (python.parent.parent / "installed").touch()
    return str(python)


def node_folder(envs: Path, name: str, *packages: str) -> Path:
    """A folder with these packages in its node_modules."""
    folder = envs / f"npm-{name}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        run(program("npm"), "install", "--silent", "--no-audit", "--no-fund", *packages, at=folder)
        (folder / "installed").touch()
    return folder


def run(*command: str, at: Path | None = None) -> str:
    # Not our PYTHONPATH: the SDK's environment has nothing of ours.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=at, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)[:300]}\n{done.stderr[-3000:]}{done.stdout[-2000:]}"
    return done.stdout


def must_have_worked(case: Case, found: dict[str, Any]) -> None:
    FOUND[case] = {"version": case.asked, **found}
    assert found["style"] == ("extra_query" if case.sdk == "Python" and case.asked in WITHOUT_PARAMETER else "job_uuid")
    assert found["status"] in ("in_progress", "completed")
    assert found["artifacts"] > 0
    expected = {"sft": True, "cancelled": "cancelled", "dpo": True, "completed": "completed", "listed": True}
    assert {name: found.get(name) for name in expected} == expected
    assert found.get("error") is True, "the SDK raises its NotFoundError with our message"


def bodies() -> str:
    return json.dumps({"sft": GOOD_BODIES[SFT], "dpo": GOOD_BODIES[DPO]})


@of(PYTHON)
def test_python(on: On, case: Case, envs: Path) -> None:
    python = python_of(envs, "llama-stack-client", case.asked)
    out = run(python, str(SUPPORT / "sdk_script.py"), on.server.url, case.mode, case.name, bodies())
    must_have_worked(case, json.loads(out.splitlines()[-1]))


@of(NPM)
def test_npm(on: On, case: Case, envs: Path) -> None:
    folder = node_folder(envs, case.asked, f"llama-stack-client@{case.asked}")
    script = str(SUPPORT / "sdk_script.mjs")
    out = run(program("node"), script, on.server.url, "async", case.name, bodies(), at=folder)
    must_have_worked(case, json.loads(out.splitlines()[-1]))


def training_file(on: On) -> str:
    """A file that the SDK uploads itself where the host takes files for fine-tuning, else a registered data set."""
    rows = {"training_file": "words"} if on.host.has_datasets else {"rows": jsonl(WORDS)}
    return json.dumps({"model": "owner/name", **rows})


def must_have_seen_all(on: On, case: Case, found: dict[str, Any]) -> None:
    FOUND[case] = found
    assert found["uploaded"] != on.host.has_datasets
    assert {name: found.get(name) for name in SEEN} == SEEN
    assert {name: found.get(name) for name in SEEN_STATES} == SEEN_STATES
    assert found["checkpoints"] > 0
    assert found["strict"] > 20, "so many answers parsed strictly"


@of(OPENAI)
def test_openai(on: On, case: Case, envs: Path) -> None:
    python = python_of(envs, "openai", case.asked)
    out = run(python, str(SUPPORT / "openai_script.py"), on.server.url, case.mode, case.name, training_file(on))
    must_have_seen_all(on, case, json.loads(out.splitlines()[-1]))


@of(OPENAI_NPM)
def test_openai_npm(on: On, case: Case, envs: Path) -> None:
    """TypeScript's own check of types is strict: it knows each field of a literal, and accepts no other."""
    folder = node_folder(envs, "openai", "openai", "typescript")
    script = str(SUPPORT / "openai_script.mjs")
    out = run(program("node"), script, on.server.url, "async", case.name, training_file(on), at=folder)
    found = json.loads(out.splitlines()[-1])
    about = json.loads((folder / "node_modules" / "openai" / "package.json").read_text(encoding="utf-8"))
    objects = [each for answer in found.pop("answers") for each in answer.get("data", [answer]) if "object" in each]
    compiled(folder, objects)
    with pytest.raises(AssertionError, match="unheard_of"):
        compiled(folder, [{**objects[0], "unheard_of": 1}])
    must_have_seen_all(on, case, {"version": about["version"], **found, "strict": len(objects)})


def compiled(folder: Path, objects: list[dict[str, Any]]) -> None:
    """Check objects against the published types with the TypeScript compiler."""
    lines = [f'export const a{n}: Named["{each["object"]}"] = {json.dumps(each)};' for n, each in enumerate(objects)]
    (folder / "answers.mts").write_text(TYPESCRIPT + "\n".join(lines) + "\n", encoding="utf-8")
    compiler = str(folder / "node_modules" / "typescript" / "bin" / "tsc")
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022"]
    run(program("node"), compiler, *options, "answers.mts", at=folder)
