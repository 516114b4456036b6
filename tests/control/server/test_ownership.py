"""Tests that a job's files belong to its owner, under roots above the state folder, behind links, and elsewhere."""

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.control.server import ownership
from llama_stack_provider_moe.control.server.allowed_paths import (
    resolve_adapter_folder,
    resolve_checkpoint_dir,
    resolve_model,
)
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput, MoeError, NotFound
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.control.server.test_allowed_paths import model_at
from tests.support.host_support import BODY, Datasets, caller, serving_in_process, submit

MINE, THEIRS = "mine", "theirs"


def may_use(job_id: str) -> None:
    """The caller has one job; answers about another user's job are those for a missing one."""
    if job_id != MINE:
        raise NotFound(f"job {job_id!r} does not exist")


@pytest.fixture
def config(tmp_path: Path) -> ProviderConfig:
    """A root above the state folder, as in a setup with everything on one disk."""
    made = ProviderConfig(state_dir=tmp_path / "disk" / "state", allowed_roots=[tmp_path / "disk"])
    for folder in (made.models_dir, made.jobs_dir, tmp_path / "disk" / "models"):
        folder.mkdir(parents=True)
    return made


def resolve(model: str | Path, config: ProviderConfig) -> str:
    return resolve_model(str(model), "model", config, may_use)


def checkpoints(directory: str | Path, config: ProviderConfig, job_id: str = "new") -> str:
    return resolve_checkpoint_dir(str(directory), job_id, "checkpoint_dir", config)


def job_with(config: ProviderConfig, job_id: str, **settings: Any) -> JobFolder:
    """A job's folder with the spec of one that trains."""
    folder = JobFolder(config.jobs_dir / job_id)
    folder.root.mkdir(parents=True, exist_ok=True)
    write_atomic(folder.spec, JOB_SPEC.validate_python(BODY | settings))
    return folder


def test_a_root_above_the_state_folder_opens_no_job(config: ProviderConfig) -> None:
    mine = model_at(config.jobs_dir / MINE / "artifacts" / "merged")
    theirs = model_at(config.jobs_dir / THEIRS / "artifacts" / "merged")
    assert resolve(mine, config) == str(mine)
    for spelling in (theirs, f"{theirs}/", f"{theirs}/.", mine / ".." / ".." / ".." / THEIRS / "artifacts" / "merged"):
        with pytest.raises(NotFound, match="job 'theirs' does not exist"):
            resolve(spelling, config)
    adapter = theirs.with_name("adapter")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(NotFound):
        resolve_adapter_folder(str(adapter), "adapter_folder", config, may_use)
    own = model_at(config.allowed_roots[0] / "models" / "shared")
    assert resolve(own, config) == str(own), "the root itself still works"


def test_nothing_else_of_the_state_folder_is_opened(config: ProviderConfig) -> None:
    for name in ("staging/abc", "deleted/theirs.1", "jobs", "checkpoints/x", "anything"):
        folder = config.state_dir / name
        if name != "jobs":
            model_at(folder)
        with pytest.raises(Forbidden, match="outside the folders that jobs may read models from"):
            resolve(folder, config)
    shared = model_at(config.models_dir / "every-jobs")
    assert resolve(shared, config) == str(shared)


@pytest.mark.parametrize("place", ["jobs/theirs", "jobs/theirs/checkpoints", "jobs/mine", "jobs", "", "staging",
                                   "models", "models/planted", "elsewhere"])  # fmt: skip
def test_a_root_above_the_state_folder_allows_no_checkpoints_there(place: str, config: ProviderConfig) -> None:
    for job_id in (MINE, THEIRS):
        job_with(config, job_id)
    with pytest.raises(Forbidden):
        checkpoints(config.state_dir / place, config)
    assert checkpoints(config.state_dir / "checkpoints" / "a", config).endswith("/checkpoints/a")
    assert checkpoints(config.allowed_roots[0] / "runs", config) == str(config.allowed_roots[0] / "runs")


def test_checkpoints_elsewhere_belong_to_their_job(config: ProviderConfig) -> None:
    runs = config.allowed_roots[0] / "runs"
    for job_id in (MINE, THEIRS):
        job_with(config, job_id, checkpoint_dir=str(runs))
        model_at(runs / job_id / "epoch-1")
    job_with(config, "export-1")
    assert resolve(runs / MINE / "epoch-1", config) == str(runs / MINE / "epoch-1")
    with pytest.raises(NotFound) as theirs:
        resolve(runs / THEIRS / "epoch-1", config)
    with pytest.raises(NotFound) as nobodys:
        resolve(runs / "absent" / "epoch-1", config)
    assert str(nobodys.value) == str(theirs.value).replace(THEIRS, "absent"), (
        "the answer must not reveal that it exists"
    )
    for folder in (runs / THEIRS, runs / THEIRS / "epoch-1", runs / MINE):
        with pytest.raises(Forbidden, match="in the folder of a job"):
            checkpoints(folder, config)
    assert checkpoints(runs, config) == str(runs), "folders side by side are allowed"
    lookalike = model_at(runs / "export-1" / "epoch-1")
    assert resolve(lookalike, config) == str(lookalike), "a folder that only has the name of a job"


def test_links_within_a_root_open_no_job(config: ProviderConfig) -> None:
    theirs = model_at(config.jobs_dir / THEIRS / "artifacts" / "merged")
    root = config.allowed_roots[0]
    (root / "link").symlink_to(theirs)
    with pytest.raises(NotFound, match="job 'theirs' does not exist"):
        resolve(root / "link", config)
    disguised = model_at(root / "models" / "disguised", files=())
    (disguised / "model.safetensors").symlink_to(theirs / "model.safetensors")
    with pytest.raises(Forbidden, match=r"'model\.safetensors', that leads into a job's folder"):
        resolve(disguised, config)
    (root / "runs").symlink_to(config.jobs_dir / THEIRS)
    with pytest.raises(Forbidden, match="in the folder of a job"):
        checkpoints(root / "runs" / "deep", config)


def test_a_jobs_folder_behind_a_link_of_the_operator(config: ProviderConfig) -> None:
    """`jobs` is on a larger disk that is under a root."""
    large = config.allowed_roots[0] / "large"
    shutil.move(config.jobs_dir, large)
    config.jobs_dir.symlink_to(large)
    theirs = model_at(large / THEIRS / "artifacts" / "merged")
    for spelling in (theirs, config.jobs_dir / THEIRS / "artifacts" / "merged"):
        with pytest.raises(NotFound, match="job 'theirs' does not exist"):
            resolve(spelling, config)
    mine = model_at(large / MINE / "artifacts" / "merged")
    assert resolve(config.jobs_dir / MINE / "artifacts" / "merged", config) == str(mine)
    with pytest.raises(Forbidden):
        checkpoints(large / THEIRS, config)
    with pytest.raises(ValidationError, match="is in state_dir"):
        ProviderConfig(state_dir=config.state_dir, allowed_roots=[large])


def test_a_bind_mount_has_the_same_owners(config: ProviderConfig) -> None:
    """A comparison of names can't find this; the same goes for a file system that ignores case."""
    theirs = model_at(config.jobs_dir / THEIRS / "artifacts" / "merged")
    mine = model_at(config.jobs_dir / MINE / "artifacts" / "merged")
    alias = config.allowed_roots[0] / "ALIAS"
    alias.mkdir()
    program = shutil.which("mount")
    done = subprocess.run([program or "false", "--bind", config.state_dir, alias], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here (only root may): {done.stderr.strip()}")
    try:
        inside = alias / theirs.relative_to(config.state_dir)
        with pytest.raises(NotFound, match="job 'theirs' does not exist"):
            resolve(inside, config)
        inside = alias / mine.relative_to(config.state_dir)
        assert resolve(inside, config) == str(inside)
        for place in ("jobs/theirs", "staging", ""):
            with pytest.raises(Forbidden):
                checkpoints(alias / place, config)
    finally:
        subprocess.run(["umount", alias], check=True)


def test_nobody_may_read_the_copies_of_a_mirror(tmp_path: Path) -> None:
    root, mirror = tmp_path / "disk", tmp_path / "disk" / "mirror"
    config = ProviderConfig(
        state_dir=tmp_path / "state",
        allowed_roots=[root],
        mirror={"url": f"file://{mirror}"},  # type: ignore[arg-type]
    )
    config.models_dir.mkdir(parents=True)
    copy = model_at(mirror / "theirs.0123" / "artifacts" / "merged")
    with pytest.raises(Forbidden):
        resolve(copy, config)
    with pytest.raises(Forbidden):
        checkpoints(mirror / "theirs.0123", config)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"allowed_roots": ["{state}/jobs"]}, "is in state_dir"),
        ({"allowed_roots": ["{state}/jobs/theirs/artifacts"]}, "is in state_dir"),
        ({"allowed_roots": ["{state}/checkpoints"]}, "is in state_dir"),
        ({"allowed_roots": ["{state}/x/../jobs/"]}, "is in state_dir"),
        ({"mirror": {"url": "file://{state}/mirror"}}, "overlap"),
        ({"mirror": {"url": "file://{above}"}}, "overlap"),
        ({"mirror": {"url": "file://{above}/m"}, "allowed_roots": ["{above}/m/x"]}, "the folder of mirror.url"),
    ],
)
def test_an_unsafe_configuration_does_not_start(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    filled = json.loads(json.dumps(settings).replace("{state}", str(state)).replace("{above}", str(tmp_path)))
    with pytest.raises(ValidationError, match=text):
        ProviderConfig(state_dir=state, **filled)
    ProviderConfig(state_dir=state, allowed_roots=[tmp_path, state, state / "models" / "x"])


@pytest.mark.parametrize(
    "spelling",
    ["{path}", "file://{path}", "file:{path}", "FILE://{path}", "file://localhost{path}", "local://{path}",
     "simplecache::file://{path}", "file://{quoted}", "{relative}"],
)  # fmt: skip
def test_a_data_set_does_not_expose_a_job(spelling: str, config: ProviderConfig) -> None:
    path = config.jobs_dir / THEIRS / "data" / "rows.csv"
    path.parent.mkdir(parents=True)
    path.write_text("prompt,completion\na,b\n")
    uri = spelling.format(path=path, quoted=str(path).replace("jobs", "%6Aobs"), relative=os.path.relpath(path))
    with pytest.raises(Forbidden, match="data set 'd' is a file of a job"):
        ownership.refuse_private_source(uri, "data.dataset_id", "d", config)
    for fine in (f"file://{config.allowed_roots[0]}/rows.csv", "https://host/state/jobs/x.csv", "data:text/csv,a"):
        ownership.refuse_private_source(fine, "data.dataset_id", "d", config)


HUB = "huggingface://datasets/"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("json?data_files={path}&split=train", "data_files: expected a data set with its owner"),
        ("o/n?data_files={path}&split=train", "data_files: expected a path in the data set"),
        ("o/n?data_files=../{relative}&split=train", "data_files: expected a path in the data set"),
        ("o/n?data_files=file://{path}&split=train", "data_files: expected a path in the data set"),
        ("o/n?data_dir=%2Fetc&split=train", "data_dir: expected a path in the data set"),
        ("o/n?cache_dir=/tmp/elsewhere&split=train", "cache_dir: expected arguments among split, name"),
        ("o/n?split=train&storage_options=x", "storage_options: expected arguments among split, name"),
        ("../../{relative}?split=train", "expected huggingface://datasets/OWNER/NAME"),
        ("o/n/m?split=train", "expected huggingface://datasets/OWNER/NAME"),
    ],
)
def test_an_address_of_the_hub_names_rows_of_the_hub(address: str, says: str, config: ProviderConfig) -> None:
    """`load_dataset` would read any file with these arguments, and write to any folder."""
    path = config.jobs_dir / THEIRS / "data" / "train.jsonl"
    uri = HUB + address.format(path=path, relative=os.path.relpath(path))
    with pytest.raises(InvalidInput, match=re.escape(says)):
        ownership.refuse_private_source(uri, "data.dataset_id", "d", config)


def test_an_id_of_the_hub_is_no_folder_of_the_server(config: ProviderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` reads a folder of that name where the server was started, and everything below it."""
    jobs = config.jobs_dir / THEIRS / "data"
    jobs.mkdir(parents=True)
    (config.state_dir.parent / "beside" / "rows").mkdir(parents=True)
    for started, name in ((config.state_dir.parent, "state/jobs"), (config.state_dir, "jobs"),
                          (config.state_dir.parent, "state"), (config.state_dir.parent.parent, "")):  # fmt: skip
        monkeypatch.chdir(started)
        name = name or config.state_dir.parent.name
        with pytest.raises(Forbidden, match="data set 'd' is a "):
            ownership.refuse_private_source(f"{HUB}{name}?split=train", "data.dataset_id", "d", config)
    monkeypatch.chdir(config.state_dir.parent)
    for fine in ("beside/rows?split=train", "owner/name?split=train[:20]&name=a&revision=v1&data_dir=x/y"):
        ownership.refuse_private_source(HUB + fine, "data.dataset_id", "d", config)


class CsvDatasets(Datasets):
    """A registry whose data set `stolen` is a file."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.uri = uri

    async def get_dataset(self, request: Any) -> SimpleNamespace:
        if request.dataset_id != "stolen":
            return await super().get_dataset(request)
        return SimpleNamespace(provider_id="localfs", source=SimpleNamespace(type="uri", uri=self.uri))


def answers(act: Callable[[], Any]) -> str:
    """The status and text of a refusal."""
    with pytest.raises(MoeError) as caught:
        act()
    return f"{caught.value.status}: {caught.value}"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    datasets = CsvDatasets(str(tmp_path / "state" / "jobs" / "annes" / "rows.csv"))
    with serving_in_process(tmp_path, datasets, allowed_roots=[tmp_path]) as made:
        yield made


def test_two_callers_on_one_disk(service: PostTrainingService) -> None:
    """Checks every name in a request, with a root that covers everything."""
    with caller("anne"):
        submit(service, job_uuid="annes", checkpoint_dir=str(service.config.allowed_roots[0] / "runs"))
    jobs = service.config.jobs_dir
    merged = str(model_at(jobs / "annes" / "artifacts" / "merged"))
    saved = str(model_at(service.config.allowed_roots[0] / "runs" / "annes" / "epoch-1"))
    (jobs / "annes" / "rows.csv").write_text("prompt,completion\na,b\n" * 3)
    judged = {"judge": {"kind": "model", "model": merged}, "refuse_dataset_id": "good"}
    asked: list[dict[str, Any]] = [
        {"model": merged}, {"model": saved}, {"eval": judged}, {"data": {"dataset_id": "stolen"}},
        {"checkpoint_dir": str(jobs / "annes")}, {"checkpoint_dir": saved},
    ]  # fmt: skip
    for changes in asked:
        with caller("bert"):
            refusal = answers(lambda changes=changes: submit(service, **changes))  # type: ignore[misc]
        assert refusal[:3] in ("403", "404"), f"{changes}: {refusal}"
    with caller("anne"):
        assert submit(service, model=merged)
        assert submit(service, model=saved)


def test_a_taken_name_reveals_nothing_about_its_owner(service: PostTrainingService) -> None:
    """Names are unique on a server, so a 409 is inevitable; it is the same whoever has the name."""
    with caller("anne"):
        submit(service, job_uuid="taken")
        own = answers(lambda: submit(service, job_uuid="taken"))
        with pytest.raises(Conflict):
            asyncio.run(service.validate(BODY | {"job_uuid": "taken"}))
    with caller("bert"):
        strangers = answers(lambda: submit(service, job_uuid="taken"))
        generated = submit(service)
    assert own == strangers == "409: job_uuid: 'taken' is taken; leave it out, or choose another name"
    assert len(generated.removeprefix("sft-")) >= 12, "48 random bits can't be guessed"
