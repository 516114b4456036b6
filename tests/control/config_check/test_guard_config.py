"""`moe-train config check` and the start of a server: what is wrong with `inline::moe-guard`, all of it at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.hosts import HOSTS
from llama_stack_provider_moe.control.config_check.guard_start import HostGuardConfig, plain_guard_errors
from llama_stack_provider_moe.errors import InvalidConfig
from tests.support.cli_support import moe_train
from tests.support.host_harness import RUN_CONFIGS
from tests.support.probe_cards import write_card

RULES = str(RUN_CONFIGS / "shields" / "tools.yaml")
PROBE = {"type": "rep_monitor", "probe": "p"}


def written(folder: Path, settings: dict[str, Any], **entry: Any) -> str:
    provider = {"provider_id": "guard", "provider_type": "inline::moe-guard", "module": "llama_stack_provider_moe",
                "config": settings, **entry}  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"providers": {"safety": [provider]}}))
    return str(path)


def test_a_right_one_is_shown(tmp_path: Path) -> None:
    done = moe_train("config", "check", written(tmp_path, {"on_failure": "block", "rules": {"default": RULES}}))
    assert (done.code, done.err) == (Exit.OK, "")
    assert "provider 'guard' can start\n  without a score: block\n  rules: default\n  probes: none" in done.out


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "on_failure: is missing"),
    ({"on_failure": "open"}, "on_failure: 'open' is not valid; expected 'block' or 'allow'"),
    ({"on_failure": "block", "rule": {}}, "rule: unknown key (did you mean rules?)"),
    ({"on_failure": "block", "rules": {"a b": RULES}}, "rules.a b"),
    ({"on_failure": "block", "rules": {"a": ""}}, "expected a path"),
    ({"on_failure": "block", "rules": {"a": "/no/such.yaml"}}, "rules.a: '/no/such.yaml' is not valid"),
    ({"on_failure": "block", "probes": {"p": "/no/such"}}, "probes.p: '/no/such' is not valid; expected a probe"),
    ({"on_failure": "block", "shields": {"a": {"type": "other"}}}, "shields.a"),
    ({"on_failure": "block", "shields": {"a": PROBE}}, "shields.a.probe: 'p' is not valid"),
    ({"on_failure": "block", "shields": {"a": {"type": "tool_guard"}}}, "shields.a.rules: 'default' is not valid"),
    (
        {"on_failure": "block", "shields": {"a": {"type": "trajectory", "shields": ["b"], "max_sum": 1}}},
        "shields.a.shields: 'b' is not valid; expected the id of another shield here",
    ),
    ({"on_failure": "block", "default_shield": "a"}, "default_shield: 'a' is not valid"),
    (
        {"on_failure": "block", "rules": {"default": RULES}, "shields": {"a": {"type": "tool_guard"}},
         "default_shield": "a"},
        "a moderation has no tool calls",
    ),
    ({"on_failure": "block", "feedback": {"folder": "/tmp/x"}}, "feedback.consent: is missing"),
    ({"on_failure": "block", "feedback": {"folder": "/tmp/x", "consent": 0}}, "feedback.consent: 0 is not valid"),
    ({"on_failure": "block", "scorer": {"child_env": {"HF_TOKEN": "hf_" + "a" * 34}}}, "HF_TOKEN would be shown"),
    ({"on_failure": "block", "sessions": {"most": 0}}, "sessions.most: 0 is not valid; expected >= 1"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_wrong_is_named(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    done = moe_train("config", "check", written(tmp_path, settings))
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert says in done.err, done.err
    with pytest.raises(InvalidConfig) as refused, plain_guard_errors(HostGuardConfig(**settings)):
        pass
    assert says in str(refused.value)


def test_the_module_must_be_ours(tmp_path: Path) -> None:
    path = written(tmp_path, {"on_failure": "block"}, module="other")
    assert "module: 'other' is not valid; expected 'llama_stack_provider_moe'" in moe_train("config", "check", path).err


def test_problems_of_both_providers_are_told_together(tmp_path: Path) -> None:
    entries = {
        "post_training": [{"provider_id": "moe", "provider_type": "inline::moe", "module": "llama_stack_provider_moe",
                           "config": {"max_rows": 0}}],
        "safety": [{"provider_id": "guard", "provider_type": "inline::moe-guard", "module": "llama_stack_provider_moe",
                    "config": {}}],
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"providers": entries}))
    told = moe_train("config", "check", str(path)).err
    assert "max_rows: 0 is not valid" in told
    assert "on_failure: is missing" in told


def test_warnings(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("version: 1\ntools: {a: {parameters: {properties: {b: {type: string}}}}}\n")
    settings = {"on_failure": "block", "rules": {"default": str(rules)}}
    done = moe_train("config", "check", written(tmp_path, settings))
    assert done.code == Exit.OK
    assert "warning: rules.default: nothing limits these texts: a.b" in done.out


@pytest.mark.parametrize(
    ("of_jobs", "warns"), [("kept", None), ("other", "is not that of provider 'moe' ({}/other)"), (None, "(none)")]
)
def test_flagged_conversations_that_jobs_do_not_find(tmp_path: Path, of_jobs: str | None, warns: str | None) -> None:
    def block(folder: str) -> dict[str, Any]:
        return {"feedback": {"consent": True, "folder": str(tmp_path / folder)}}

    ours = {"module": "llama_stack_provider_moe"}
    jobs = {"state_dir": str(tmp_path / "state"), **(block(of_jobs) if of_jobs else {})}
    entries = {
        "post_training": [{"provider_id": "moe", "provider_type": "inline::moe", "config": jobs, **ours}],
        "safety": [{"provider_id": "guard", "provider_type": "inline::moe-guard",
                    "config": {"on_failure": "block", **block("kept")}, **ours}],
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"providers": entries}))
    done = moe_train("config", "check", str(path), "--json")
    assert done.code == Exit.OK, done.err
    (guard,) = done.document["guards"]
    assert [warns.format(tmp_path) in each for each in guard["warnings"]] == [True] if warns else not guard["warnings"]


@pytest.mark.parametrize("name", sorted({name for host in HOSTS.values() for name in host.guarded}))
def test_our_run_configs_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(tmp_path / "probe")
    monkeypatch.setenv("MOE_PROBE", str(tmp_path / "probe"))
    monkeypatch.setenv("MOE_STATE_DIR", str(tmp_path / "state"))
    done = moe_train("config", "check", str(RUN_CONFIGS / f"{name}.yaml"), "--json")
    assert done.code == Exit.OK, done.err
    probes = [] if name.endswith("tool_guard") else ["refused"]
    assert done.document["guards"] == [
        {"provider_id": "moe-guard", "on_failure": "block", "rules": ["default"], "probes": probes, "warnings": []}
    ]


def registering(folder: Path, shields: list[Any]) -> Any:
    path = Path(written(folder, {"on_failure": "block", "rules": {"default": RULES}}))
    content = yaml.safe_load(path.read_text()) | {"registered_resources": {"shields": shields}}
    path.write_text(yaml.safe_dump(content))
    return moe_train("config", "check", str(path))


def shield(shield_id: Any, params: Any, **more: Any) -> dict[str, Any]:
    return {"shield_id": shield_id, "provider_id": "guard", "params": params, **more}


TOOLS = {"type": "tool_guard"}
SUMS = {"type": "trajectory", "shields": ["a"], "max_sum": 1}
UNREGISTERED: list[tuple[list[Any], str]] = [
    ([shield("a", {"type": "toolguard"})], "shields.0.params.type: 'toolguard' is not valid"),
    ([shield("a", None)], "shields.0.params.type: None is not valid"),
    ([shield("a", "x")], "shields.0.params: 'x' is not valid; expected an object"),
    ([shield("a", {**TOOLS, "rules": "defalt"})], "shields.0.params.rules: 'defalt' is not valid"),
    ([shield("a", PROBE)], "shields.0.params.probe: 'p' is not valid"),
    ([shield("a", {**TOOLS, "rulse": 1})], "shields.0.params.rulse: unknown key"),
    (
        [shield("b", SUMS), shield("a", TOOLS)],
        "shields.0.params.shields: 'a' is not valid; expected shields that stand",
    ),
    ([shield("x", {**SUMS, "shields": ["of-an-earlier-start"]})], ""),
    ([shield("a", SUMS)], "shields.0.params.shields: 'a' is not valid; expected shields of type"),
    ([shield("a", SUMS), shield("b", SUMS)], "shields.1.params.shields: 'a' is not valid; expected shields of type"),
    ([shield("a", TOOLS), shield("a", TOOLS)], "shields.1.shield_id: 'a' is named twice"),
    (
        [shield("a", TOOLS), shield("b", TOOLS, provider_shield_id="a")],
        "shields.1.provider_shield_id: 'a' is not valid",
    ),
    ([shield("a b", TOOLS)], "shields.0.shield_id: 'a b' is not valid"),
    ([shield(3, TOOLS)], "shields.0.shield_id: 3 is not valid"),
    ([shield("a", TOOLS), 7], "shields.1: 7 is not valid; expected an object"),
    ([shield("a", TOOLS, provider_id="llama-guard"), shield("b", TOOLS)], ""),
    ([shield("${env.NO_SHIELD:=}", PROBE)], ""),
]


@pytest.mark.parametrize(("shields", "says"), UNREGISTERED, ids=[str(number) for number in range(len(UNREGISTERED))])
def test_a_shield_that_the_host_could_not_register_is_named(tmp_path: Path, shields: list[Any], says: str) -> None:
    done = registering(tmp_path, shields)
    assert done.code == (Exit.REFUSED if says else Exit.OK), done.err
    assert says in done.err


def test_a_shield_that_the_host_leaves_out_is_told(tmp_path: Path) -> None:
    done = registering(tmp_path, [{"shield_id": "a", "params": TOOLS}])
    assert done.code == Exit.OK
    assert "shields.0.provider_id: is missing, so the host leaves shield 'a' out" in " ".join(done.out.split())
