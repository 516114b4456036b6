"""`moe-train config check` and the start of a server report the same mistakes, with the same text."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.config_check import run_yaml, start, surroundings
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import child_environment
from llama_stack_provider_moe.control.supervisor.supervisor import supervise
from llama_stack_provider_moe.errors import InvalidConfig, InvalidInput
from llama_stack_provider_moe.spec.default_blocks import DEFAULT_BLOCKS
from llama_stack_provider_moe.spec.defaults import JobDefaults, block_of
from llama_stack_provider_moe.spec.engines_config import ENGINES, ENGINES_VARIABLE
from llama_stack_provider_moe.spec.server_config import ProviderConfig, SupervisorConfig
from tests.control.cli.test_words import moe_train
from tests.support.free_ports import free_port
from tests.support.host_harness import QUICKSTART, RUN_CONFIGS, run_config
from tests.support.host_support import serving_in_process

LLAMA = Path(sys.executable).parent / "llama"


def written(folder: Path, *settings: Any, **entry: Any) -> Path:
    """Write a run YAML with a provider for each of `settings`, named p0, p1, ..."""
    listed = [
        {"provider_id": f"p{number}", "provider_type": "inline::moe", "module": "llama_stack_provider_moe",
         "config": each, **entry}
        for number, each in enumerate(settings)
    ]  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"providers": {"post_training": listed}}))
    return path


def problems(settings: Any, folder: Path) -> tuple[str, ...]:
    with pytest.raises(InvalidConfig) as caught:
        run_yaml.read_run_config(written(folder, settings), None, {"SET": "7"})
    assert caught.value.where == f"{folder / 'run.yaml'}: provider 'p0' (inline::moe)"
    return caught.value.problems


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stat_dir": "/x"}, "stat_dir: unknown key (did you mean state_dir?)"),
        ({"supervisor": {"pol_s": 1}}, "supervisor.pol_s: unknown key (did you mean poll_s?)"),
        ({"executors": {"ray": {"address": "http://h:1", "token": "x"}}},
         "executors.ray.token: unknown key (did you mean token_file?)"),
        ({"supervisor": {"poll_s": 0}}, "supervisor.poll_s: 0 is not valid; expected > 0"),
        ({"supervisor": {"poll_s": "${env.SET}0s"}}, "supervisor.poll_s: '70s' is not valid; expected a number"),
        ({"supervisor": "on"}, "supervisor: 'on' is not valid; expected an object"),
        ({"supervisor": {"devices": ["gpu0"]}}, "supervisor.devices: 'gpu0' is not a GPU's index or UUID"),
        ({"executors": {"default": "ray"}}, "executors: default: 'ray' is not valid without a cluster"),
        ({"models": {"allowed": ["a/b/c"]}}, "models.allowed: 'a/b/c' is not a hub id"),
        ({"defaults": {"optimizer": {"lr": "fast"}}}, "defaults.optimizer.lr: 'fast' is not valid; expected a number"),
        ({"defaults": {"optimizer": {"learning": 1}}}, "defaults.optimizer.learning: unknown key; expected "),
        ({"defaults": {"training": {"n_epoch": 1}}}, "defaults.training.n_epoch: unknown key (did you mean n_epochs?)"),
        ({"defaults": {"adapter": {"rank": 0}}}, "defaults.adapter.rank: 0 is not valid; expected >= 1"),
        ({"defaults": {"export": {"dtype": "q8"}}}, "defaults.export.dtype: 'q8' is not valid; expected "),
        ({"defaults": {"eval": {"judge": {"kind": "x"}}}}, "defaults.eval.judge.kind: 'x' is not valid; expected "),
        ({"defaults": {"eval": {"masked_experts": {"0": "1"}}}}, "defaults.eval: masked_experts: fits one model only"),
        ({"defaults": {"trackers": {"wandb": {"projekt": "x"}}}}, "defaults.trackers.wandb.projekt: unknown key (did"),
        ({"defaults": {"optimiser": {}}}, "defaults.optimiser: unknown key (did you mean optimizer?)"),
        ({"state_dir": "${env.UNSET}"}, "state_dir: '${env.UNSET}' has no value; expected environment variable UNSET"),
        ({"state_dir": ""}, "state_dir: '' is not valid; expected a path"),
        ({"state_dir": " "}, "state_dir: ' ' is not valid; expected a path"),
        ({"state_dir": "."}, "state_dir: '.' is not valid; expected a folder for the server alone, not the current"),
        ({"state_dir": "x/../.."}, "state_dir: 'x/../..' is not valid; expected a folder for the server alone"),
        ({"allowed_roots": ["/x", ""]}, "allowed_roots: '' is not valid; expected a path"),
        ({"store_password_file": ""}, "store_password_file: '' is not valid; expected a path"),
        ({"executors": {"ray": {"address": "http://h:1", "token_file": ""}}},
         "executors.ray.token_file: '' is not valid; expected a path"),
        (["state_dir"], "config: is not valid; expected a block of settings"),
        ({"allowed_roots": "/x"}, "allowed_roots: '/x' is not valid; expected a list"),
    ],
)  # fmt: skip
def test_each_mistake_names_its_path_and_what_is_right(settings: Any, expected: str, tmp_path: Path) -> None:
    (found,) = problems(settings, tmp_path)
    assert found.startswith(expected)


def test_all_mistakes_are_reported_without_secrets(tmp_path: Path) -> None:
    wrong = {"child_env": {"WANDB_API_KEY": ["planted"]}, "store_url": ["planted"], "store_pasword": "planted",
             "supervisor": {"poll_s": 0, "lease_s": 0}, "max_rows": 0}  # fmt: skip
    found = problems(wrong, tmp_path)
    assert len(found) == 6
    assert "planted" not in str(found)
    assert "store_pasword: unknown key (did you mean store_password_file?)" in found


def test_the_folder_that_is_left_out_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, it was `~/.llama/moe` below the folder that the server was started in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ProviderConfig().state_dir == tmp_path / ".llama" / "moe"


def test_each_default_belongs_to_its_block() -> None:
    assert {part: block_of(part) for part in JobDefaults.model_fields} == DEFAULT_BLOCKS


@pytest.mark.parametrize("block", list(DEFAULT_BLOCKS))
def test_a_default_is_refused_by_its_own_path(block: str) -> None:
    """Once, the error said `defaults.lr` for `defaults.optimizer.lr`."""
    with pytest.raises(ValidationError) as caught:
        ProviderConfig.model_validate({"defaults": {block: {"no_such_key": 1}}})
    assert [each["loc"] for each in caught.value.errors()] == [("defaults", block, "no_such_key")]
    assert block in JobDefaults.model_fields


def test_which_of_several_providers(tmp_path: Path) -> None:
    path = written(tmp_path, {"state_dir": str(tmp_path)}, {"max_rows": 0}, {"max_rows": -1})
    with pytest.raises(InvalidInput, match="--provider-id"):
        run_yaml.read_run_config(path, None, {})
    assert run_yaml.read_run_config(path, "p0", {}).state_dir == tmp_path.resolve()
    done = moe_train("config", "check", str(path))
    assert done.code == Exit.REFUSED
    for number, value in ((1, 0), (2, -1)):
        assert f"{path}: provider 'p{number}' (inline::moe): max_rows: {value} is not valid; expected >= 1" in done.err
    assert "'p0'" not in done.err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1\nstore_url: planted\n b: c", "expected YAML at line "),
        ("a: {b: planted, b", "expected YAML at line "),
        ("[]", "expected a run YAML with a list of providers.post_training or providers.safety; this is a list"),
        ("# a comment", "providers.safety; the file is empty"),
        ("providers: {}", "expected a run YAML with a list of providers.post_training"),
        ("providers: {post_training: []}", "expected a run YAML with a provider_type inline::moe"),
        ("\0", "expected a run YAML that can be read"),
    ],
)
def test_a_file_that_is_not_a_run_config(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    done = moe_train("config", "check", str(path), "--json")
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert done.error["message"].startswith(f"FILE: '{path}' is not valid; expected "[:60])
    assert expected in done.error["message"]
    assert "planted" not in done.err
    missing = moe_train("config", "check", str(tmp_path / "absent.yaml"))
    assert (missing.code, "No such file" in missing.err) == (Exit.REFUSED, True)


def test_the_host_would_not_find_us_without_our_module(tmp_path: Path) -> None:
    path = written(tmp_path, {"state_dir": str(tmp_path), "supervisor": {"start": False}}, module=None)
    done = moe_train("config", "check", str(path))
    assert done.code == Exit.REFUSED
    assert "module: None is not valid; expected 'llama_stack_provider_moe' beside provider_type" in done.err


# What a configuration needs on its machine.


def looked_at(folder: Path, thoroughly: bool = False, **settings: Any) -> surroundings.Findings:
    config = ProviderConfig.model_validate({"state_dir": folder / "state"} | settings)
    return surroundings.check(config, {"SET": "x"}, thoroughly)


def test_serving_needs_its_folder_and_llama_cpp(tmp_path: Path) -> None:
    serving = {"kind": "llama_cpp", "provider_id": "llama-cpp", "url": "http://127.0.0.1:9",
               "models_dir": str(tmp_path / "models")}  # fmt: skip
    child_env = {"MOE_TRAIN_CACHE": str(tmp_path / "cache")}
    found = looked_at(tmp_path, serving=serving, child_env=child_env).problems
    assert [each.partition(":")[0] for each in found] == ["serving.models_dir", "serving"]
    assert "expected a folder that the server can write in (there is no such folder)" in found[0]
    assert "run `moe-train export setup`" in found[1]
    (tmp_path / "models").mkdir()
    elsewhere = {"supervisor": {"start": False}, "serving": serving, "child_env": child_env}
    problems, warnings = looked_at(tmp_path, **elsewhere)
    assert (problems, [each.partition(":")[0] for each in warnings]) == ([], ["serving"])
    (tmp_path / "models").rmdir()
    (tmp_path / "models").touch()
    assert "there is no such folder" in looked_at(tmp_path, **elsewhere).problems[0]
    vllm = {"kind": "vllm", "provider_id": "vllm", "url": "http://127.0.0.1:9"}
    assert looked_at(tmp_path, serving=vllm, child_env=child_env) == ([], [])


def test_engines_need_their_folder_and_their_key(tmp_path: Path) -> None:
    fast = {"url": "http://127.0.0.1:9", "weights_dir": str(tmp_path / "weights"), "key_variable": "VLLM_KEY"}
    assert looked_at(tmp_path, engines={"fast": fast}).problems == [
        f"engines.fast.weights_dir: {str(tmp_path / 'weights')!r} is not valid; expected a folder that the server can "
        "write in (there is no such folder)",
        "engines.fast.key_variable: VLLM_KEY is not set; expected the vLLM server's key",
    ]
    (tmp_path / "weights").mkdir()
    assert looked_at(tmp_path, engines={"fast": fast | {"key_variable": "SET"}}) == ([], [])
    config = ProviderConfig.model_validate({"state_dir": tmp_path / "state", "engines": {"fast": fast}})
    given = child_environment({"VLLM_KEY": "x", "OTHER": "y"}, config, tmp_path)
    assert given["VLLM_KEY"] == "x"
    assert "OTHER" not in given
    assert ENGINES.validate_json(given[ENGINES_VARIABLE]) == config.engines


def test_a_configuration_that_has_all_it_needs(tmp_path: Path) -> None:
    assert looked_at(tmp_path, store_url=f"sqlite:///{tmp_path}/a/jobs.db", child_secrets=["SET"]) == ([], [])
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"state_dir": "/proc/moe"}, "state_dir: '/proc/moe' is not valid; expected a folder that the server can"),
        ({"state_dir": "{here}/file/state"}, "state_dir: '{here}/file/state' is not valid; expected a folder that the "
         "server can write in ('{here}/file' is not a folder)"),
        ({"mirror": {"url": "file:///proc/mirror"}}, "mirror.url: '/proc/mirror' is not valid; expected a folder"),
        ({"store_url": "sqlite:////proc/x/jobs.db"}, "store_url: 'sqlite:////proc/x/jobs.db' can't be used; expected"),
        ({"store_url": "nonsense"}, "store_url: 'nonsense' is not valid; expected an SQLAlchemy URL"),
        ({"store_url": "foo://h/db"}, "store_url: 'foo://h/db' is not valid; expected a database that SQLAlchemy"),
        ({"store_url": "mssql+pymssql://a@h/db"}, "store_url: 'mssql+pymssql://a@h/db' is not valid; expected a "
         "database whose driver is installed (package 'pymssql' is missing"),
        ({"store_url": "postgresql+psycopg://moe@127.0.0.1:1/db"},
         "store_url: 'postgresql+psycopg://moe@127.0.0.1:1/db' can't be used; expected a database that"),
        ({"store_url": "postgresql://m@h/db", "store_password_file": "{here}/absent"}, "store_password_file: "
         "'{here}/absent' is not valid; expected a file that the server can read (No such file or directory)"),
        ({"store_url": "postgresql://m@h/db", "store_password_file": "{here}/empty"}, "store_password_file: "
         "'{here}/empty' is empty; expected a password"),
        ({"executors": {"ray": {"address": "http://h:1", "token_file": "{here}/absent"}}},
         "executors.ray.token_file: '{here}/absent' is not valid; expected a file that the server can read"),
        ({"training_python": "/no/python"}, "training_python: '/no/python' is not valid; expected a Python interp"),
        ({"training_python": "{here}/file"}, "training_python: '{here}/file' is not valid; expected a Python interp"),
        ({"unsloth_python": "/no/python"}, "unsloth_python: '/no/python' is not valid; expected a Python interpreter"),
        ({"child_secrets": ["UNSET", "SET"]}, "child_secrets: UNSET is not set; expected environment variables of"),
    ],
)  # fmt: skip
def test_missing_things_are_named(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra `postgres`)")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").write_text("\n")
    filled = json.loads(json.dumps(settings).replace("{here}", str(tmp_path)))
    found = looked_at(tmp_path, **filled)
    assert len(found.problems) == 1, found.problems
    assert found.problems[0].startswith(expected.replace("{here}", str(tmp_path)))


def test_a_database_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    """An address that never answers (RFC 5737), and one that refuses at once, are both reported within seconds."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra `postgres`)")
    began = time.monotonic()
    found = looked_at(tmp_path, store_url="postgresql+psycopg://moe@192.0.2.1/db")
    assert len(found.problems) == 1
    assert time.monotonic() - began < 60, "the kernel alone would try for two minutes"


def test_what_is_only_a_warning(tmp_path: Path) -> None:
    elsewhere = {"supervisor": {"start": False}, "training_python": "/no/python", "child_secrets": ["UNSET"]}
    found = looked_at(tmp_path, allowed_roots=[str(tmp_path / "absent")], **elsewhere)
    assert not found.problems, "a supervisor on another machine has these"
    assert [each.split(":")[0] for each in found.warnings] == ["allowed_roots", "training_python", "child_secrets"]
    assert [each.split(":")[0] for each in looked_at(tmp_path, True, child_secrets=["UNSET"]).warnings] == [
        "child_secrets"
    ]


def test_an_interpreter_that_can_not_train(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    bare.chmod(0o755)
    (found,) = looked_at(tmp_path, thoroughly=True, training_python=str(bare)).problems
    assert f"training_python: '{bare}' lacks llama_stack_provider_moe, torch, transformers, trl, peft;" in found
    bare.write_text("#!/bin/sh\nexit 1\n")
    (found,) = looked_at(tmp_path, thoroughly=True, training_python=str(bare)).problems
    assert f"training_python: '{bare}' is not valid; expected a Python interpreter" in found


# On the command line, and when a server starts.


TRAINING = sorted(path for path in RUN_CONFIGS.glob("*.yaml") if "\n  post_training:" in path.read_text())


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_our_run_configs_pass(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("MOE_LOCAL_DIR", str(tmp_path / "local"))
    if path.stem == "train_and_serve":
        (tmp_path / "models").mkdir()
        monkeypatch.setenv("MOE_MODELS_DIR", str(tmp_path / "models"))
        for part in ("convert_hf_to_gguf.py", "conversion/any.py", "gguf-py/gguf/any.py", "lib/libllama.so"):
            (tmp_path / "llama.cpp" / part).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "llama.cpp" / part).touch()
        monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "llama.cpp"))
    settings = yaml.safe_load(path.read_text())["providers"]["post_training"][0]
    if "unsloth_python" in settings["config"]:
        pytest.skip("names an environment that is made by hand")
    done = moe_train("config", "check", str(path), "--json")
    assert (done.code, done.err) == (Exit.OK, "")
    (provider,) = done.document["providers"]
    assert (done.document["file"], provider["state_dir"]) == (str(path), str(tmp_path / "state"))


def test_a_service_that_can_not_start_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"state_dir": "/proc/moe"})
    monkeypatch.setenv("LLAMA_STACK_CONFIG", str(path))
    hook = sys.excepthook
    try:
        with pytest.raises(InvalidConfig) as caught:
            asyncio.run(PostTrainingService(ProviderConfig(state_dir=Path("/proc/moe")), {}).initialize())
        assert sys.excepthook is not hook, "a process that it ends prints its text alone"
    finally:
        sys.excepthook = hook
    done = moe_train("config", "check", str(path), "--json")
    assert done.error["message"] == str(caught.value)
    assert str(caught.value).startswith(f"{path}: provider 'p0' (inline::moe): 1 problem\n  state_dir: '/proc/moe' is")


def start_and_check(config: ProviderConfig, run_yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the text of a start, which `config check` prints as well; neither changes anything."""
    before = sorted(config.state_dir.rglob("*"))
    monkeypatch.setenv("LLAMA_STACK_CONFIG", str(run_yaml_file))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(InvalidConfig) as caught:
        asyncio.run(PostTrainingService(config, {}).initialize())
    done = moe_train("config", "check", str(run_yaml_file), "--json")
    assert (done.code, done.error["message"]) == (Exit.REFUSED, str(caught.value))
    assert sorted(config.state_dir.rglob("*")) == before
    return str(caught.value)


def test_a_store_that_is_gone_is_found_before_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_in_process(tmp_path) as service:
        config, mine = service.config, service.store.identity()
    path = written(tmp_path, {"state_dir": str(config.state_dir), "supervisor": {"start": False}})
    assert moe_train("config", "check", str(path)).code == Exit.OK
    for file in config.state_dir.glob("jobs.db*"):
        file.unlink()
    told = start_and_check(config, path, monkeypatch)
    assert f"has the jobs of another store, {mine}. Put that store's file back, or set store_url" in told
    assert supervise(config) == 1
    assert not (config.state_dir / "jobs.db").exists()
    JobStore(config.url).close()  # another database
    told = start_and_check(config, path, monkeypatch)
    assert f"has the jobs of another store, {mine}. Set store_url" in told
    (config.state_dir / "jobs.db").write_bytes(b"this is no database" * 1000)
    assert "put a backup in its place" in start_and_check(config, path, monkeypatch)


def test_a_folder_of_others_is_refused_before_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ProviderConfig(state_dir=tmp_path / "shared", supervisor=SupervisorConfig(start=False))
    (config.state_dir / "other").mkdir(parents=True)
    path = written(tmp_path, {"state_dir": str(config.state_dir), "supervisor": {"start": False}})
    told = start_and_check(config, path, monkeypatch)
    assert "state_dir: '" in told
    assert "is not valid; expected an empty or new folder for this server" in told


def test_the_host_is_told_which_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_STACK_CONFIG", str(written(tmp_path, {"max_rows": 1}, {"max_rows": "${env.ROWS}"})))
    monkeypatch.setenv("ROWS", "0")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(InvalidConfig, match=r"provider 'p1' \(inline::moe\): 1 problem\n  max_rows: 0 is not valid"):
        start.HostConfig(max_rows=0)
    assert start.HostConfig(max_rows=1).max_rows == 1
    monkeypatch.delenv("LLAMA_STACK_CONFIG")
    with pytest.raises(InvalidConfig, match=r"run YAML: a provider inline::moe: 1 problem"):
        start.HostConfig(max_rows=0)


def test_other_exceptions_are_printed_as_usual() -> None:
    code = """
import sys
from llama_stack_provider_moe.control.config_check.start import HostConfig
try:
    HostConfig(max_rows=0)
except ValueError:
    raise RuntimeError("something else") from None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, "Traceback" in done.stderr, "RuntimeError: something else" in done.stderr) == (
        1,
        True,
        True,
    )


@pytest.mark.e2e
def test_a_server_ends_with_the_text_and_no_traceback(tmp_path: Path) -> None:
    wrong = {"supervisor": {"pol_s": 1}, "defaults": {"optimizer": {"lr": "fast"}}}
    path = run_config(QUICKSTART, tmp_path, provider=wrong)
    environment = {**os.environ, "MOE_STATE_DIR": str(tmp_path / "state")}
    command = [LLAMA, "stack", "run", str(path), "--port", str(free_port())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    checked = moe_train("config", "check", str(path), "--json").error["message"]
    last = "The server was not started. `moe-train config check FILE` checks a run YAML."
    assert done.stderr.endswith(f"\n{checked}\n\n{last}\n")
    assert "supervisor.pol_s: unknown key (did you mean poll_s?)\n  defaults.optimizer.lr: 'fast'" in checked
