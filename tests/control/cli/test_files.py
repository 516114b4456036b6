"""Files that a user starts from, and job files in JSON and YAML."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_stack_provider_moe.control.cli import packaged
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.hosts import HOSTS, HostName
from llama_stack_provider_moe.control.cli.template import read_template
from llama_stack_provider_moe.control.config_check.run_yaml import read_run_config
from llama_stack_provider_moe.errors import InvalidInput
from tests.support.cli_support import moe_train

ROOT = Path(__file__).parents[3]
COPIED = ("run_configs", "job_templates", "constraints.txt", "constraints-ogx.txt", "constraints-llama-stack-0.7.txt")
# The body of a job that uses every kind of value.
BODY: dict[str, Any] = {
    "recipe": "sft",
    "model": "a/b",
    "data": {"dataset_id": "no"},
    "optimizer": {"lr": 2e-4},
    "training": {"n_epochs": 3, "max_steps_per_epoch": None},
    "moe": {"train_router": True},
    "adapter": {"lora_attn_modules": ["q_proj", "on"]},
    "eval": {"masked_experts": {"3": "0-3,7"}},
}
YAML = """\
# A comment, which JSON does not have.
recipe: sft
model: a/b
data: {dataset_id: no}      # in YAML 1.1 this was false
optimizer:
  lr: 2e-4                  # and this was text
training:
  n_epochs: 3
  max_steps_per_epoch: null
moe: {train_router: true}
adapter:
  lora_attn_modules:
  - q_proj
  - on
eval:
  masked_experts:
    3: "0-3,7"
"""


# Job files.


def test_yaml_says_what_json_says(tmp_path: Path) -> None:
    for name, content in (("job.json", json.dumps(BODY)), ("job.yaml", YAML), ("job.yml", json.dumps(BODY))):
        (tmp_path / name).write_text(content)
        assert read_template(str(tmp_path / name), []) == BODY, name


@pytest.mark.parametrize("content", [YAML, json.dumps(BODY, indent=2)])
def test_standard_input_may_be_either(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert read_template("-", []) == BODY


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("job.yaml", "a: 1\nb:\n  lr: 1\n  lr: 2\n", "line 4: key 'lr' is given twice"),
        ("job.yaml", "a: 1\nb: [1\nc: 2\n", "line 3: "),
        ("job.yaml", "a: 1\n\tb: 2\n", "line 2: "),
        ("job.yaml", "a: &x {b: 1}\nc: *x\n", "line 2: alias *x of line 1 is not supported; write the value again"),
        ("job.yaml", "a: &x 1\nb: 2\nc: [3,\n  *x]\n", "line 4: alias *x of line 1"),
        ("job.yaml", "a: &x {b: 1}\nc:\n  <<: *x\n", "line 3: alias *x of line 1"),
        ("job.yaml", "a: &x [*x]\n", "line 1: alias *x of line 1"),
        ("job.yaml", "a: 1\nb: *x\n", "line 2: alias *x is not supported"),
        ("job.yaml", "a: 1\n---\nb: 2\n", "line 2: "),
        ("job.yaml", "a: !!python/name:os.system 1\n", "line 1: tag"),
        ("job.yaml", "a: !!str 3\n", "line 1: tag"),
        ("job.yaml", "a: !!binary aGVsbG8=\n", "line 1: tag"),
        ("job.yaml", "a: !x 1\n", "line 1: tag !x is not supported"),
        ("job.yaml", "? [a]\n: 1\n", "line 1: a key must be text"),
        ("job.yaml", "- a\n", "this is a list"),
        ("job.yaml", "", "the file is empty"),
        ("job.yaml", "# a comment\n", "the file is empty"),
        ("job.json", " \n", "the file is empty"),
        ("job.yaml", "just words\n", "this is text"),
        ("job.yaml", "a: \x00\n", "job.yaml"),
        ("job.yaml", "a: " + "[" * 3000, "job.yaml"),
        ("job.json", '{"a": 1,\n "lr": 2,\n "lr": 3}', "line 3: key 'lr' is given twice"),
        ("job.json", '{"a": 1,\n\t"lr": 2,\n\t"lr": 3}', "key 'lr' is given twice"),
        ("job.json", '{"a": 1,\n b: 2}', "line 2 column 2"),
        ("job.json", YAML, "JSON"),
    ],
)
def test_a_wrong_file_is_named_with_line_and_reason(
    name: str, content: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the message shortens long paths
    Path(name).write_text(content)
    with pytest.raises(InvalidInput) as raised:
        read_template(name, [])
    assert says in str(raised.value)
    assert raised.value.value == name


def test_numbers_and_words_of_yaml(tmp_path: Path) -> None:
    cases = {
        "1": 1, "-3": -3, "1.5": 1.5, "1e3": 1000.0, "2E-4": 2e-4, ".5": 0.5, "017": "017", "1_000": "1_000",
        "0x10": "0x10", "1:30": "1:30", "2024-01-01": "2024-01-01", ".nan": ".nan", ".inf": ".inf", "yes": "yes",
        "off": "off", "True": True, "~": None, "'1'": "1", '"true"': "true",
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text("".join(f"k{number}: {text}\n" for number, text in enumerate(cases)))
    found = read_template(str(tmp_path / "job.yaml"), [])
    for number, (text, value) in enumerate(cases.items()):
        assert (found[f"k{number}"], type(found[f"k{number}"])) == (value, type(value)), text


# Templates by name.


def test_a_template_by_its_name() -> None:
    path = ROOT / "job_templates/granite_moe_sft.json"
    assert read_template("@granite_moe_sft", ["job_uuid=x"]) == {**json.loads(path.read_bytes()), "job_uuid": "x"}
    done = moe_train("submit", "@granite_moe_stf")
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert "'@granite_moe_stf' is not valid" in done.err
    assert "did you mean @granite_moe_sft?" in done.err
    assert "did you mean @granite_moe_sft, @granite_moe_" in moe_train("submit", "@granite_moe").err
    unlike = moe_train("submit", "@zzzzzz").err
    assert (
        unlike == "moe-train: FILE: '@zzzzzz' is not valid; expected the name of a job template; `moe-train "
        "templates` lists them\n"
    )
    assert moe_train("submit", "@../constraints").code == Exit.REFUSED


def test_every_file_is_listed_with_what_it_says() -> None:
    document = moe_train("templates", "--json").document
    assert list(document["run_configs"]) == sorted(path.stem for path in (ROOT / "run_configs").glob("*.yaml"))
    assert list(document["job_templates"]) == sorted(path.stem for path in (ROOT / "job_templates").glob("*.json"))
    for name, told in document["run_configs"].items():
        comment = " ".join(
            line.removeprefix("#").strip() for line in (ROOT / f"run_configs/{name}.yaml").read_text().splitlines()
        )
        assert told, name
        assert comment.startswith(told), name
    told = list(document["job_templates"].values())
    for name, each in zip(document["job_templates"], told, strict=True):
        body = json.loads((ROOT / f"job_templates/{name}.json").read_bytes())
        assert each.startswith(f"{body['recipe']} of "), name
    lines = moe_train("templates").out.splitlines()
    assert any(line.split()[0] == "quickstart" for line in lines if line)
    assert any("moe-train submit @NAME" in line for line in lines)
    assert "moe-train pipeline @NAME" in lines[-1]


# moe-train init.


@pytest.mark.parametrize("server", packaged.run_configs())
def test_init_writes_what_a_server_and_a_job_need(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    runs_jobs = "post_training" in yaml.safe_load((ROOT / f"run_configs/{server}.yaml").read_text())["providers"]
    done = moe_train("init", str(folder), "--server", server, *(["--job", "mixtral_dpo"] if runs_jobs else []))
    assert done.code == Exit.OK, done.err
    host = next(
        (each for each in HOSTS.values() if server in (each.server, *each.guarded)), HOSTS[HostName.LLAMA_STACK_0_6]
    )
    is_guarded, has_probe = server in host.guarded, server == host.guarded[0]
    files = {f"{server}.yaml", "constraints.txt"} | ({"mixtral_dpo.json"} if runs_jobs else set())
    apis = f"external_apis{'_guarded' if is_guarded else ''}"
    folders = {apis} if host.is_external else set()
    assert {path.name for path in folder.iterdir()} == files | folders | ({"shields"} if is_guarded else set())
    written = (folder / f"{server}.yaml").read_text()
    expected = yaml.safe_load((ROOT / f"run_configs/{server}.yaml").read_text())
    if host.is_external:
        expected["external_apis_dir"] = str(folder / apis)
    if is_guarded:
        config = expected["providers"]["safety"][0]["config"]
        config["rules"]["default"] = f"${{env.MOE_RULES:={folder}/shields/tools.yaml}}"
    for inner in (*folders, *(["shields"] if is_guarded else [])):
        for path in (ROOT / "run_configs" / inner).iterdir():
            assert (folder / inner / path.name).read_bytes() == path.read_bytes()
    assert yaml.safe_load(written) == expected
    assert "run_configs/" not in written
    assert "job_templates/" not in written
    if runs_jobs:
        read_run_config(folder / f"{server}.yaml", None, {"MOE_STATE_DIR": str(tmp_path)})
    assert (folder / "constraints.txt").read_bytes() == (ROOT / host.constraints).read_bytes()
    extras = f"{host.extra},train" if runs_jobs or has_probe else host.extra
    extras = f"dashboard,{extras}" if runs_jobs else extras
    assert f"[{extras}]' -c {folder / 'constraints.txt'}" in done.out
    assert host.command.format(file=folder / f"{server}.yaml") in done.out
    assert (f"moe-train guard check {folder / 'shields/tools.yaml'}" in done.out) == is_guarded
    assert ("MOE_PROBE=PROBE" in done.out, "Probe:" in done.out) == (has_probe, has_probe)
    assert ("Train:" in done.out) == runs_jobs
    if runs_jobs:
        assert read_template(str(folder / "mixtral_dpo.json"), []) == read_template("@mixtral_dpo", [])
        assert f"moe-train submit {folder / 'mixtral_dpo.json'} --follow" in done.out


def test_init_in_the_folder_of_another_server_keeps_what_is_the_same(tmp_path: Path) -> None:
    assert moe_train("init", str(tmp_path)).code == Exit.OK
    done = moe_train("init", str(tmp_path), "--server", "guarded")
    assert (done.code, done.err) == (Exit.OK, "")
    assert f"kept {tmp_path / 'constraints.txt'} (unchanged)" in done.out
    assert f"wrote {tmp_path / 'guarded.yaml'}" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {
        "quickstart.yaml", "granite_moe_sft.json", "constraints.txt", "guarded.yaml", "shields",
    }  # fmt: skip
    again = moe_train("init", str(tmp_path), "--server", "guarded", "--json").document
    assert set(again) == {"server", "constraints", "rules", "kept"}
    assert again["kept"] == [again["server"], again["constraints"], again["rules"]]


def test_init_for_a_server_without_jobs_takes_no_job(tmp_path: Path) -> None:
    done = moe_train("init", str(tmp_path / "new"), "--server", "guarded", "--job", "granite_moe_sft")
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert "--job: 'granite_moe_sft' is not valid; expected no --job, because server 'guarded' runs no jobs" in done.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", HostName)
def test_init_for_a_host_writes_its_run_config(name: HostName, tmp_path: Path) -> None:
    host = HOSTS[name]
    assert moe_train("init", str(tmp_path / "host"), "--host", name).code == Exit.OK
    assert moe_train("init", str(tmp_path / "server"), "--server", host.server).code == Exit.OK
    for path in (tmp_path / "host").iterdir():
        twin = tmp_path / "server" / path.name
        if path.is_file():
            assert path.read_text() == twin.read_text().replace(str(tmp_path / "server"), str(tmp_path / "host"))


def test_init_refuses_the_run_config_of_another_host(tmp_path: Path) -> None:
    done = moe_train("init", str(tmp_path / "new"), "--host", "ogx", "--server", "granite_moe")
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert "--server: 'granite_moe' is not valid; expected ogx, the run config for OGX 1.5.0" in done.err
    assert "this one is for Llama Stack 0.6.1" in done.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["quickstart.yaml", "granite_moe_sft.json", "constraints.txt"])
@pytest.mark.parametrize("is_link", [False, True])
def test_init_overwrites_nothing(name: str, is_link: bool, tmp_path: Path) -> None:
    if is_link:
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / name).write_text("mine")
    done = moe_train("init", str(tmp_path), "--json")
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert f"{tmp_path / name} exists with other content" in done.error["message"]
    assert "`moe-train init DIR --server quickstart`" in done.error["message"]
    assert os.listdir(tmp_path) == [name]
    assert is_link or (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--server", "quickstrt"], "--server: 'quickstrt' is not valid; expected the name of a run config; did you"),
        (["--job", "granite"], "--job: 'granite'"),
        (["--job", "@granite_moe_stf"], "--job: '@granite_moe_stf' is not valid"),
    ],
)
def test_init_with_an_unknown_name_writes_nothing(words: list[str], says: str, tmp_path: Path) -> None:
    done = moe_train("init", str(tmp_path / "new"), *words)
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert says in done.err
    assert not (tmp_path / "new").exists()


def test_init_takes_a_template_as_submit_does(tmp_path: Path) -> None:
    for number, job in enumerate(("granite_moe_dpo", "@granite_moe_dpo")):
        done = moe_train("init", str(tmp_path / str(number)), "--job", job, "--json")
        assert (done.code, done.err) == (Exit.OK, "")
        assert (tmp_path / str(number) / "granite_moe_dpo.json").is_file()


def test_init_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "can be written" in moe_train("init", str(tmp_path / "file")).err


def test_the_version() -> None:
    done = moe_train("--version")
    assert (done.code, done.err) == (Exit.OK, "")
    assert done.out.startswith("moe-train")


# The wheel.


_BUILD = """
import os, sys
from setuptools import build_meta
source, out = sys.argv[1:]
os.chdir(source)
print(build_meta.build_sdist(out) if out.endswith("sdist") else build_meta.build_wheel(out))
"""


def built(source: Path, out: Path) -> Path:
    """Build the distribution of a folder with setuptools."""
    out.mkdir()
    command = [sys.executable, "-c", _BUILD, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def test_a_wheel_from_a_source_distribution_has_every_file(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".venv", ".cache", ".git", ".*_cache", "__pycache__", "build", "dist", "*.egg-info"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    with tarfile.open(built(source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for folder in ("tests", *COPIED[:2], "examples"):
        wanted = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts}
        assert all((unpacked / path).exists() for path in wanted), folder
    for origin in (unpacked, source):
        with zipfile.ZipFile(built(origin, tmp_path / f"wheel-{origin.name}")) as wheel:
            data = [ROOT / name for name in COPIED[2:]] + [
                each for name in COPIED[:2] for each in (ROOT / name).rglob("*")
            ]
            for path in filter(Path.is_file, data):
                assert wheel.read(f"llama_stack_provider_moe/{path.relative_to(ROOT)}") == path.read_bytes()
            assert not any(name.startswith(("tests/", "run_configs/")) for name in wheel.namelist())
