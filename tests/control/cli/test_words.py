"""How `moe-train` reads command lines and run YAMLs, and what it never imports; no server is needed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.template import read_template
from llama_stack_provider_moe.control.config_check.run_yaml import read_run_config, substituted
from llama_stack_provider_moe.errors import InvalidInput
from tests.support.cli_support import moe_train, template_at
from tests.support.host_harness import QUICKSTART


@pytest.fixture
def template(tmp_path: Path) -> Path:
    return template_at(tmp_path)


# Mistakes in the command line.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["submit", "no-such-file.json"], "No such file"),
        (["submit", "."], "directory"),
        (["validate", "{folder}/broken.json"], "JSON"),
        (["validate", "{folder}/list.json"], "this is a list"),
        (["validate", "{folder}/twice.json"], "line 1: key 'lr' is given twice"),
        (["validate", "{folder}/nan.json"], "NaN is not a JSON value"),
        (["validate", "{folder}/job.json", "--set", "training.n_epochs"], "block.field=value"),
        (["validate", "{folder}/job.json", "--set", ".lr=1"], "block.field=value"),
        (["validate", "{folder}/job.json", "--set", "model.lr=1"], "model is text"),
        (["ls", "--url", "localhost:8321"], "http://127.0.0.1:8321"),
        (["ls", "--url", "http://"], "http://127.0.0.1:8321"),
        (["ls", "--api-key", "k\ney"], "not shown"),
        (["ls", "--limit", "0"], "--limit"),
        (["status"], "ID"),
        (["status", ""], "ID"),
        (["train"], "train"),
        (["supervisor", "--run-config", "no-such-file.yaml"], "No such file"),
        (["supervisor", "--run-config", "{folder}/job.json"], "providers.post_training"),
    ],
)
def test_mistakes_are_refused(words: list[str], says: str, tmp_path: Path, template: Path) -> None:
    (tmp_path / "broken.json").write_text('{"recipe": ')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "twice.json").write_text('{"optimizer": {"lr": 1, "lr": 2}}')
    (tmp_path / "nan.json").write_text('{"beta": NaN}')
    words = [word.replace("{folder}", str(tmp_path)) for word in words]
    told = moe_train(*words)
    assert (told.code, told.out) == (Exit.REFUSED, "")
    assert says in " ".join(told.err.split())
    as_json = moe_train(*words, "--json")
    assert (as_json.code, as_json.out, as_json.error["exit_code"]) == (Exit.REFUSED, "", 2)
    assert says in as_json.error["message"]


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("training.n_epochs=3", ["training", "n_epochs"], 3),
        ("optimizer.lr=2e-5", ["optimizer", "lr"], 2e-5),
        ("data.shuffle=false", ["data", "shuffle"], False),
        ("adapter=null", ["adapter"], None),
        ("adapter.rank=8", ["adapter", "rank"], 8),
        ('adapter.lora_attn_modules=["q_proj"]', ["adapter", "lora_attn_modules"], ["q_proj"]),
        ("model=owner/name=x", ["model"], "owner/name=x"),
        ("data.dataset_id=plain text", ["data", "dataset_id"], "plain text"),
        ('data.dataset_id="42"', ["data", "dataset_id"], "42"),
        ("optimizer.lr=NaN", ["optimizer", "lr"], "NaN"),
        ("data.dataset_id=", ["data", "dataset_id"], ""),
    ],
)
def test_a_change_changes_that_value_alone(change: str, path: list[str], value: Any, tmp_path: Path) -> None:
    body = {"model": "m", "adapter": None, "data": {"dataset_id": "d"}, "training": {"batch_size": 2}}
    (tmp_path / "job.json").write_text(json.dumps(body))
    changed = read_template(str(tmp_path / "job.json"), [change])
    found: Any = changed
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)
    block: Any = body
    for key in path[:-1]:
        if block.get(key) is None:
            block[key] = {}
        block = block[key]
    block[path[-1]] = value
    assert changed == body


# A run YAML, as the host reads it.

ENVIRONMENT = {"MOE_T_DIR": "~/dir", "MOE_T_NUMBER": "3", "MOE_T_FALSE": "False", "MOE_T_EMPTY": ""}
# The results of `replace_env_vars` of llama-stack 0.6.1, a frozen release; HOME is /home/me.
REFERENCES: list[tuple[Any, Any]] = [
    ("plain", "plain"),
    ("${env.MOE_T_DIR}", "/home/me/dir"),
    ("${env.MOE_T_UNSET:=~/default}", "/home/me/default"),
    ("${env.MOE_T_EMPTY:=full}", "full"),
    ("${env.MOE_T_NUMBER}", 3),
    ("${env.MOE_T_NUMBER:=7}", 3),
    ("${env.MOE_T_UNSET:=0.5}", 0.5),
    ("${env.MOE_T_UNSET:=}", None),
    ("${env.MOE_T_FALSE}", False),
    ("${env.MOE_T_DIR:+is set}", "is set"),
    ("${env.MOE_T_UNSET:+is set}", None),
    ("${env.MOE_T_DIR:+}", None),
    ("a ${env.MOE_T_NUMBER} b ${env.MOE_T_UNSET:=c}", "a 3 b c"),
    ("sqlite:///${env.MOE_T_DIR}/x.db", "sqlite:////home/me/dir/x.db"),
    ("~/not touched", "~/not touched"),
    ("${env.lower}", "${env.lower}"),
    ("$MOE_T_NUMBER", "$MOE_T_NUMBER"),
    (5, 5),
    (None, None),
    (True, True),
]


@pytest.mark.parametrize(("written", "filled"), REFERENCES, ids=[str(written) for written, _ in REFERENCES])
def test_references_are_filled_in_as_the_host_does(written: Any, filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = substituted({"a": [{"b": written}]}, ENVIRONMENT)
    assert found == {"a": [{"b": filled}]}
    assert type(found["a"][0]["b"]) is type(filled)


TRAINING = sorted(path for path in QUICKSTART.parent.glob("*.yaml") if "\n  post_training:" in path.read_text())


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_our_run_configs_are_read(path: Path, tmp_path: Path) -> None:
    config = read_run_config(path, None, {"MOE_STATE_DIR": str(tmp_path)})
    assert config.state_dir == tmp_path.resolve()


@pytest.mark.parametrize(
    ("settings", "provider_id", "says"),
    [
        ("{state_dir: '${env.MOE_T_UNSET}'}", None, "MOE_T_UNSET"),
        (
            "{supervisor: {poll_s: -1}, stat_dir: x}",
            None,
            r"supervisor\.poll_s: -1 is not valid; expected > 0\n  stat_dir: unknown key \(did you mean state_dir\?\)",
        ),
        ("{}", "other", "'moe'"),
    ],
)
def test_a_run_config_that_is_not_usable(settings: str, provider_id: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    entry = f"{{provider_id: moe, provider_type: 'inline::moe', config: {settings}}}"
    path.write_text(f"providers: {{post_training: [{{provider_id: x, provider_type: 'inline::other'}}, {entry}]}}")
    with pytest.raises(InvalidInput, match=says):
        read_run_config(path, provider_id, {})


# Without torch, and without slow imports.

RUN = "-m llama_stack_provider_moe.ground.run"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub ids are looked up by the process that these tests replace."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("online")
def test_upcycling_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = moe_train("upcycle", "SOURCE", "OUT", "--experts", "4")
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert "pip install 'llama-stack-provider-moe[train]' (this one lacks torch)" in done.err


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("code", [0, 1, 2])
def test_upcycling_is_another_process(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets the words that were typed; here it prints what it got."""
    stream = 1 if code == 0 else 2
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\necho "got: $*" >&{stream}\nexit {code}\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    got = f"got: {RUN} llama_stack_provider_moe.compute.models.upcycle A B --experts 4"
    done = moe_train("upcycle", "A", "B", "--experts", "4", "--json")
    assert done.code == code
    if code == 0:
        assert (done.document, done.err) == ({"report": [got]}, "")
    else:
        assert (done.out, done.error) == ("", {"message": got, "exit_code": code})


@pytest.mark.usefixtures("online")
def test_an_export_is_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prints its report as a document."""
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\nprintf \'{"got": "%s"}\' "$*"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ADAPTER").mkdir()
    done = moe_train("export", "merge", "BASE", "ADAPTER", "OUT", "--dtype", "bf16", "--json")
    got = f"{RUN} llama_stack_provider_moe.compute.export.merge BASE ADAPTER OUT --dtype bf16 --json"
    assert (done.code, done.document, done.err) == (0, {"got": got}, "")
    done = moe_train("export", "gguf", "MODEL", "OUT", "--type", "q8_0", "--json")
    got = f"{RUN} llama_stack_provider_moe.compute.export.gguf MODEL OUT --type q8_0 --json"
    assert (done.code, done.document, done.err) == (0, {"got": got}, "")


def test_a_client_loads_nothing_that_is_slow() -> None:
    code = (
        "import sys\nfrom llama_stack_provider_moe.control.cli import main\n"
        "main(['ls', '--json', '--url', 'nowhere'])\n"
        "slow = {'torch', 'sqlalchemy', 'fastapi', 'yaml', 'llama_stack', 'llama_stack_provider_moe.spec'}\n"
        "slow &= set(sys.modules)\n"
        "sys.exit(f'imported {sorted(slow)}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_mistakes_of_commands_with_torch_are_found_without_it(tmp_path: Path) -> None:
    """In a process of its own, where every import would show; each takes a fraction of a second."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe/config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "moe/model.safetensors").touch()
    commands = [
        ["upcycle", "moe", "OUT"], ["upcycle", "empty", "OUT"], ["upcycle", "moe", "empty"],
        ["upcycle", "moe", "OUT", "--experts", "1"], ["upcycle", "moe", "OUT", "--experts", "2", "--top-k", "3"],
        ["eval", "moe", "--retain", "nosuch"], ["eval", "empty", "--task", "piqa"], ["eval", "moe"],
        ["plan", "@granite_moe_sft", "--set", "training.epochs=1"], ["plan", "@granite_moe_sft", "--model", "empty"],
        ["plan", "@wrong"], ["report", "lora", "empty"],
    ]  # fmt: skip
    code = (
        "import json, sys, time\nfrom llama_stack_provider_moe.control.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    start, code = time.process_time(), None\n"
        "    try:\n        code = main([*words, '--json'])\n"
        "    except SystemExit as left:\n        code = left.code\n"
        "    print(code, time.process_time() - start < 5)\n"
        "slow = {'torch', 'transformers', 'peft', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(slow)}' if slow else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["2 True"] * len(commands), done.stdout
