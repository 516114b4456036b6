"""Commands that need torch: one parser, and mistakes that are reported before torch is imported."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main

from llama_stack_provider_moe.control.cli import commands
from llama_stack_provider_moe.control.cli.ablate import read_plan
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import word_of
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.ablate_commands import MEASURE_COMMAND, AnalyzeCommand, ApplyCommand
from llama_stack_provider_moe.spec.command_words import CommandLine, checked, read, words, written
from llama_stack_provider_moe.spec.local_commands import (
    EVALUATION_COMMAND,
    ROUTING_COMMAND,
    GgufCommand,
    LoadCheckCommand,
    MergeCommand,
    MixCommand,
    UpcycleCommand,
)
from llama_stack_provider_moe.spec.probe_commands import FIT_COMMAND, ScoreCommand
from tests.support.cli_support import moe_train
from tests.support.probe_cards import write_card

COMMANDS: dict[str, type[CommandLine]] = {
    "upcycle": UpcycleCommand,
    "eval": EVALUATION_COMMAND,
    "analyze routing": ROUTING_COMMAND,
    "ablate measure": MEASURE_COMMAND,
    "ablate analyze": AnalyzeCommand,
    "ablate apply": ApplyCommand,
    "probe fit": FIT_COMMAND,
    "probe score": ScoreCommand,
    "mix": MixCommand,
    "export merge": MergeCommand,
    "export check": LoadCheckCommand,
    "export gguf": GgufCommand,
}


def every_command(group: Any, name: str = "") -> list[tuple[str, Any]]:
    """Each command of `moe-train` that is not a group, with its whole name."""
    found = []
    for word, each in group.commands.items():
        inner = f"{name} {word}".strip()
        found += every_command(each, inner) if isinstance(each, typer.core.TyperGroup) else [(inner, each)]
    return found


ALL = every_command(typer.main.get_command(commands.app_of()))


def test_each_module_that_a_command_starts_runs_its_main() -> None:
    """A command is `python -m MODULE`: without these lines it would do nothing, and say that all went well."""
    cli = Path(commands.__file__).parent
    package = cli.parents[1]
    named = {
        name for path in cli.glob("*.py") for name in re.findall(r'"(compute(?:\.\w+)+)"', path.read_text("utf-8"))
    }
    assert len(named) > 8
    for name in named:
        text = (package / f"{name.replace('.', '/')}.py").read_text("utf-8")
        _, _, last = text.rpartition('\nif __name__ == "__main__":\n')
        assert last.endswith("    sys.exit(main())\n"), name


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.run", started)
    monkeypatch.setenv("MOE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "command"), ALL, ids=[name for name, _ in ALL])
def test_every_command_has_the_same_help(name: str, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = moe_train(*name.split(), "--help")
    assert done.code == Exit.OK
    assert f"Usage: moe-train {name}" in done.out
    # Every help line says something, and names every option that is parsed.
    for each in command.params:
        assert each.help, each.name
        assert all(option in done.out for option in each.opts if option.startswith("--"))
    assert not re.search(r"--help lists them", done.out)
    # One style for the words that stand for values: none that typer makes of a type, and none beside a flag.
    assert not re.search(r"<\w+( range)?>", done.out)
    assert re.search(r"--help +Show this message", done.out)
    assert all(re.fullmatch(r"|[A-Z][A-Z.=:/,]*|[a-z0-9_.]+(\|[a-z0-9_.]+)+", word_of(each)) for each in command.params
               if each.param_type_name == "option"), [word_of(each) for each in command.params]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_both_sides_know_the_same_options(name: str) -> None:
    command = dict(ALL)[name]
    typed = {option for each in command.params for option in each.opts if option.startswith("--")}
    fields = COMMANDS[name].model_fields.items()
    options = {written(key, field) for key, field in fields if not field.is_required()}
    assert typed - {"--json", "--help"} == options - {"--json"}
    defaults = {each.name: each.default for each in command.params}
    for key, field in fields:
        default = field.get_default(call_default_factory=True)
        if not field.is_required() and key != "as_json" and not isinstance(default, list):
            assert defaults[key] == (default if default is None or isinstance(default, bool) else str(default)), key


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (UpcycleCommand, {"source": "a", "out": "b", "experts": "4", "router_std": "0.5"}),
        (
            EVALUATION_COMMAND,
            {
                "model": "m",
                "mask": ["3:0-3,7", "4:1"],
                "fail_if": ["refusal_drop=1"],
                "ablate": ["0-3:2:0.5"],
                "ablate_experts": True,
                "ablate_gate_scale": "0.25",
            },
        ),
        (ROUTING_COMMAND, {"model": "m", "rows": ["a=x", "b=y"], "tokens": "prompt", "out": "-odd"}),
        (MergeCommand, {"base": "a", "adapter": "b", "out": "c", "dtype": "bf16", "as_json": True}),
        (MEASURE_COMMAND, {"model": "m", "rows": ["target=x", "baseline=y"], "quantize_bits": "4", "position": "-2"}),
        (ApplyCommand, {"plan": "p.yaml", "out": "o", "dry_run": True}),
    ],
)
def test_a_command_line_is_read_as_it_was_written(kind: type[CommandLine], given: dict[str, Any]) -> None:
    line = checked(kind, given)
    again = read(kind, words(line), "test")
    assert again == line
    assert again.model_fields_set == line.model_fields_set == set(given)


def test_several_mistakes_are_all_named() -> None:
    with pytest.raises(InvalidInput) as raised:
        checked(UpcycleCommand, {"source": "a", "out": "b", "experts": "1", "router_std": "x"})
    assert str(raised.value) == (
        "--experts: '1' is not valid; expected >= 2; --router-std: 'x' is not valid; expected a number"
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["upcycle", "./nosuch", "OUT"], "SOURCE: './nosuch' is not valid"),
        (["upcycle", "{empty}", "OUT"], "a folder with config.json"),
        (["upcycle", "{file}", "OUT"], "this is a file"),
        (["upcycle", "{model}", "{empty}"], "OUT: "),
        (["upcycle", "{model}", "OUT", "--experts", "1"], "--experts: '1' is not valid; expected >= 2"),
        (["export", "merge", "{model}", "nosuch", "OUT"], "ADAPTER: 'nosuch' is not valid"),
        (
            ["export", "merge", "{model}", "{empty}", "OUT", "--dtype", "int4"],
            "--dtype: 'int4' is not valid; expected one",
        ),
        (["export", "merge", "{model}", "{empty}", "OUT", "--shard-size", "big"], "--shard-size: 'big'"),
        (["export", "gguf", "{model}", "OUT"], "--type: is missing"),
        (["export", "gguf", "{model}", "{file}", "--type", "q8_0"], "OUT: "),
        (["export", "check", "nosuch"], "JOBFOLDER|ADAPTER: 'nosuch'"),
        (["export", "check", "{empty}", "--merged", "/nosuch"], "--merged: '/nosuch'"),
        (["analyze", "routing", "{model}", "--rows", "a={file}"], "1 set(s) can't be compared"),
        (["analyze", "routing", "{model}", "--rows", "a={file}", "--rows", "b=nosuch"], "--rows: 'nosuch'"),
        (["analyze", "routing", "{model}", "--rows", "a={file}", "--rows", "b={file}", "--top", "x"], "analysis.top"),
        (["analyze", "routing", "../m", "--rows", "a={file}", "--rows", "b={file}"], "MODEL: '../m'"),
        (["upcycle", "{model}", "OUT", "--experts", "2", "--top-k", "3"], "--top-k: 3 is not valid; expected 1 to 2"),
        (["upcycle", "{model}", "OUT"], "SOURCE: '{model}' is not valid; expected a folder with model.safetensors"),
        (["upcycle", "{torn}", "OUT"], "a model with a readable config.json; it is not JSON"),
        (["upcycle", "{coded}", "OUT"], "a model with unquantised weights"),
        (["upcycle", "{sparse}", "OUT"], "type llama, mistral, qwen3; its model_type is 'mixtral'"),
        (["upcycle", "{biased}", "OUT"], "a model without attention_bias"),
        (["upcycle", "{partial}", "OUT"], "a complete model; b.safetensors of its index is missing"),
        (["upcycle", "owner/never-downloaded", "OUT"], "HF_HUB_OFFLINE is set, and the cache has no such model"),
        (["upcycle", "{adapter}", "OUT"], "with config.json; this one holds an adapter, which needs its base model"),
        (["eval", "{sparse}", "--refuse", "{file}"], "--refuse: '{file}' is not valid; expected a file with rows"),
        (["eval", "{sparse}", "--refuse", "{rows}"], "1 problem(s) in 1 row(s)"),
        (["eval", "{torn}", "--refuse", "{file}"], "MODEL: '{torn}'"),
        (["eval", "{sparse}", "--refuse", "{file}", "--adapter", "{empty}"], "a folder with adapter_config.json"),
        (["eval", "{sparse}", "--refuse", "{file}", "--adapter", "{adapter}"], "a folder with adapter_model"),
        (["eval", "m", "--url", "127.0.0.1:8000", "--refuse", "{file}"], "--url: '127.0.0.1:8000' is not valid"),
        (["eval", "m", "--url", "http://h/v1", "--refuse", "{file}", "--mask", "0:1"], "no --adapter, --mask"),
        (
            ["eval", "m", "--url", "http://h/v1", "--refuse", "{file}", "--judge-model", "j", "--judge-url", "h"],
            "--judge-url: 'h' is not valid; expected an http or https URL",
        ),
        (["eval", "{model}"], "something to measure: at least one of --refuse"),
        (["eval", "{model}", "--refuse", "nosuch"], "--refuse: 'nosuch'"),
        (["eval", "{model}", "--refuse", "{file}", "--adapter", "nosuch"], "--adapter: 'nosuch'"),
        (["eval", "{model}", "--refuse", "{file}", "--judge-model", "/nosuch"], "--judge-model: '/nosuch'"),
        (["eval", "{model}", "--refuse", "{file}", "--out", "{done}"], "--out: "),
        (
            ["eval", "m", "--url", "http://127.0.0.1:9/v1", "--task", "piqa"],
            "--task: 'piqa' is not valid; expected no --url with it: run lm-eval itself against the server",
        ),
        (["report", "lora", "/nosuch"], "MODEL: '/nosuch'"),
        (["plan", "{job}"], "model: '/nosuch'"),
        (["plan", "{job}", "--model", "./nosuch"], "--model: './nosuch'"),
        (["plan", "{job}", "--model", "{empty}"], "--model: '{empty}' is not valid; expected a folder with config"),
        (["plan", "{job}", "--model", "{torn}/config.json"], "a readable config.json; it is not JSON"),
        (["plan", "{job}", "--model", "{model}"], "this one has no model_type"),
        (["plan", "{job}", "--model", "{coded}"], "a model with unquantised weights"),
        (["plan", "{job}", "--set", "training.epochs=1"], "training.epochs"),
        (["plan", "{job}", "--memory", "2"], "--memory: '2'"),
        (["plan", "@granite_moe_sft", "--model", "owner/never-downloaded"], "HF_HUB_OFFLINE is set"),
        (["plan", "@granite_moe_sftt"], "did you mean @granite_moe_sft?"),
        (["plan", "@granite_moe_sft", "--set", "recipe=export"], "recipe"),
        (["plan", "{analysis}"], "recipe: 'routing_analysis' is not valid; expected one that trains: sft"),
    ],
)
def test_mistakes_start_no_process(
    command: list[str], says: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # `root` has a short name: errors quote at most 80 characters of a value
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = places(root)
    done = moe_train(*(word.format(**named) for word in command))
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert says.format(**named) in " ".join(done.err.split())


def places(folder: Path) -> dict[str, str]:
    """What a user may name by mistake."""
    configs = {
        "model": "{}",
        "torn": '{"model_type": ',
        "coded": '{"model_type": "llama", "quantization_config": {}}',
        "sparse": '{"model_type": "mixtral"}',
        "biased": '{"model_type": "llama", "attention_bias": true}',
        "partial": '{"model_type": "llama"}',
    }
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    for name in ("sparse", "biased"):
        (folder / name / "model.safetensors").touch()
    (folder / "partial/a.safetensors").touch()
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "partial/model.safetensors.index.json").write_text(json.dumps(index))
    for name, file in (("empty", None), ("done", "eval.json"), ("adapter", "adapter_config.json")):
        (folder / name).mkdir()
        if file is not None:
            (folder / name / file).write_text("{}")
    (folder / "file").write_text("")
    (folder / "rows").write_text('{"question": "?"}')
    job = {"recipe": "sft", "model": "/nosuch", "data": {"dataset_id": "d"}}
    (folder / "job").write_text(json.dumps(job))
    analysis = {"recipe": "routing_analysis", "model": "/nosuch", "data": {"sets": {"a": "d", "b": "e"}}}
    (folder / "analysis").write_text(json.dumps(analysis))
    others = ("empty", "done", "adapter", "file", "rows", "job", "analysis")
    return {name: str(folder / name) for name in (*configs, *others)}


def test_a_task_without_lm_eval_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without the figures that the user asked for would have looked like a success."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    done = moe_train("eval", "model", "--task", "piqa", "--task", "arc_easy")
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert done.err == (
        "moe-train: --task: 'piqa, arc_easy' is not valid; expected an environment with lm-eval, which this one lacks: "
        "pip install 'llama-stack-provider-moe[eval]'\n"
    )
    assert not (tmp_path / "evaluation").exists()


def test_a_plan_with_an_evaluation_is_a_job(tmp_path: Path) -> None:
    """The command would write the model and measure nothing."""
    plan = {"model": "m", "measurements": "f", "ablate": [{"layer": 0, "measurement": 0}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"eval": None}))
    assert read_plan(str(tmp_path / "plan.json")).eval is None
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"eval": {"retain_dataset_id": "d"}}))
    with pytest.raises(InvalidInput, match=r"eval: .* expected none in a plan that this command applies; a job"):
        read_plan(str(tmp_path / "plan.json"))


def test_a_probe_is_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model/model.safetensors").touch()
    for name, count in (("many", 300), ("few", 299)):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": f"Row {i}"}) + "\n" for i in range(count)))

    def refusal(*words: str) -> str:
        done = moe_train("probe", *words)
        assert (done.code, done.out) == (Exit.REFUSED, "")
        return done.err

    fit = ("fit", "model", "--rows", "target=many", "--rows")
    few = refusal(*fit, "baseline=few")
    assert "at least 300 rows, because a third of them sets the threshold for --false-positive-rate 0.01" in few
    assert "--layers: 'x' is not valid; expected numbers and ranges from 0 to 9999" in refusal(
        *fit, "baseline=few", "--layers", "x"
    )
    assert "this file has 299" in refusal(*fit, "baseline=few")
    assert "has no effect with tokens 'content'" in refusal(*fit, "baseline=many", "--span", "2")
    assert "can't fit a probe; expected target" in refusal(*fit, "other=many")
    write_card(tmp_path / "kept")
    assert "--out: 'kept' is not valid" in refusal(*fit, "baseline=many", "--out", "kept")
    assert "PROBE: 'nothing' is not valid; expected a folder with probe.json" in refusal("score", "nothing", "many")
    write_card(tmp_path / "weak", negatives=5)
    assert "PROBE: 5 is not valid; expected a probe with at least 100 negatives" in refusal("score", "weak", "many")
    assert "FILE: 'missing' is not valid" in refusal("score", "kept", "missing")


def test_a_mix_is_checked_without_torch(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / name / "model.safetensors").touch()
    branches = [{"name": name, "model": name} for name in ("a", "b")]
    file = tmp_path / "plan.json"

    def refusal(*options: str, **changes: Any) -> str:
        file.write_text(json.dumps({"model": "base", "method": "btx", "branches": branches} | changes))
        done = moe_train("mix", str(file), *options)
        assert (done.code, done.out) == (Exit.REFUSED, "")
        return done.err

    (tmp_path / "out").mkdir()
    assert "--out: " in refusal("--out", str(tmp_path / "out"))
    assert "branches.1.model: '/nosuch' is not valid; expected a folder that exists" in refusal(
        branches=[branches[0], branches[1] | {"model": "/nosuch"}]
    )
    assert "top_k: 3 is not valid; expected 1 to 2, the number of experts" in refusal(top_k=3)
    rows = [branch | {"dataset_id": "rows.jsonl"} for branch in branches]
    assert "branches.0.dataset_id: 'rows.jsonl' is not valid" in refusal(branches=rows, router="domains")
    (tmp_path / "rows.jsonl").write_text('{"question": "?"}')
    assert "rows.jsonl" in refusal(branches=rows, router="domains")
