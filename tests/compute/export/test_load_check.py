"""A load check: the saved files equal what was trained; any other content is reported with figures."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_stack_provider_moe.compute.export import probe
from llama_stack_provider_moe.compute.export.load_check import (
    AS_TRAINED,
    PLAIN,
    NotRecorded,
    check,
    check_adapter,
    check_merged,
    judged,
    main,
)
from llama_stack_provider_moe.compute.export.load_figures import Gap, LoadCheck
from llama_stack_provider_moe.compute.export.merge import merge
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import DType, SFTSpec
from tests.support import tiny_models
from tests.support.training_support import Run, Workshop, workshop  # noqa: F401

WEIGHTS = "adapter_model.safetensors"
# Every way experts are saved and run, and every recipe that trains.
JOBS: dict[str, dict[str, Any]] = {
    "fused": {"family": "granitemoe"},
    "per expert on disk": {"family": "mixtral", "moe": {"train_router": True}},
    "transposed, biased": {"family": "gpt_oss"},
    "own blocks": {"family": "llama4_text"},
    "moved biases": {
        "family": "deepseek_v3",
        "moe": {"moe_load_balancing": "aux_free", "router_bias_rate": 0.1},
        "training": {"batch_size": 16},  # one step: a second one may move them back to 0
    },
    "folded by PEFT": {"family": "mixtral", "moe": {"experts_backend": "peft"}},
    "unequal ranks": {
        "family": "granitemoe",
        "adapter": {"plan": "per_expert", "rules": [{"layers": "0", "experts": {"1": 2, "3": 4}}]},
    },
    "head": {"family": "llama", "adapter": {"apply_lora_to_output": True}},
    "4-bit base": {"family": "granitemoe", "adapter": {"quantize_base": True}},
    "4-bit base, 8-bit scales": {"family": "mixtral", "adapter": {"quantize_base": True, "quantize_scales": True}},
    "bf16": {"family": "mixtral", "training": {"dtype": "bf16"}},
    "dpo": {"recipe": "dpo", "family": "granitemoe"},
    "circuit breaker": {"recipe": "circuit_breaker", "family": "mixtral"},
    "expert choice": {"family": "mixtral", "moe": {"moe_load_balancing": "expert_choice"}},
    "all weights": {"family": "granitemoe", "adapter": None},
}


@pytest.fixture(scope="module")
def run_of(workshop: Workshop) -> Callable[[str], Run]:  # noqa: F811
    """A job of `JOBS`, run once."""
    done: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in done:
            done[name] = workshop.run(**{"recipe": "sft", **JOBS[name]})
            assert done[name].exit_code == 0, done[name].reason
        return done[name]

    return run


@pytest.mark.parametrize("name", JOBS)
def test_what_was_saved_is_what_was_trained(run_of: Callable[[str], Run], name: str) -> None:
    run = run_of(name)
    found = check(run.folder.root)
    assert found.arithmetic == found.here
    # Bit by bit in this process, whose threads are as many as the job's.
    assert (found.as_trained.greatest, found.plain_tolerance) == (0, PLAIN[found.arithmetic.dtype])
    assert found.plain.share <= found.plain_tolerance
    if name == "all weights":
        assert found.effect is None
        card = (run.folder.model / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: transformers\n---\n")
        assert "with all its weights trained. Fill in the licence" in card
        return
    assert found.effect is not None
    assert found.effect.share > 0.005
    assert found.tensors == len(run.adapter())
    card = (run.folder.adapter / "README.md").read_text(encoding="utf-8")
    assert [line for line in card.splitlines() if line.startswith("- vLLM: ")] == [f"- {found.servers[1].text()}"]
    assert card.splitlines()[:3] == ["---", "library_name: peft", "---"]
    assert f"\n| Recipe | {JOBS[name].get('recipe', 'sft')} |\n" in card
    assert re.search(r"^\| Adapter \| LoRA, rank \d+, alpha \d+", card, re.MULTILINE)
    assert re.search(r"^\| Rows \| \d+ trained on; \d+ held out \|$", card, re.MULTILINE)
    assert re.search(r"^\| Versions \| python .*, llama-stack-provider-moe .*, peft \d", card, re.MULTILINE)
    assert "[More Information Needed]" not in card
    assert str(run.folder.root.parent) not in card
    assert ("PEFT does not read `router_bias" in card) == (name == "moved biases")
    assert "README.md" not in {path.name for path in run.folder.root.glob("checkpoints/*/*")}
    assert found.router_biases == (1 if name == "moved biases" else 0)
    assert (found.rounding_of_base is not None) == name.startswith("4-bit base")
    if found.rounding_of_base is not None:  # 4 bits round: 0.1 of the spread, measured
        assert 0.01 < found.rounding_of_base.share < 0.5
        assert found.plain_against == "16-bit adapter model"


def test_the_card_of_an_adapter_loads_it(run_of: Callable[[str], Run]) -> None:
    """The Python code of the card, with the places filled in, gives the adapter on its base."""
    run = run_of(next(iter(JOBS)))
    card = (run.folder.adapter / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    spec = run.folder.read_spec()
    assert isinstance(spec, SFTSpec)
    base = spec.model
    assert f'"path/to/{Path(base).name}"' in code
    code = code.replace(f"path/to/{Path(base).name}", base).replace("path/to/this", str(run.folder.adapter))
    made: dict[str, Any] = {}
    exec(code, made)  # noqa: S102  our own card
    assert made["model"].peft_config["default"].r == 4
    assert made["tokenizer"].chat_template


def _double_the_scale(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def _edit(adapter: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / WEIGHTS)


def _swap_experts(adapter: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:  # two experts' B, columns k*E + e
        name = next(name for name in sorted(tensors) if "experts" in name and "lora_B" in name)
        columns = torch.arange(tensors[name].shape[1]).view(-1, 4)
        tensors[name] = tensors[name][:, columns[:, [1, 0, 2, 3]].flatten()]

    _edit(adapter, swap)


def _silence_experts(adapter: Path) -> None:
    """As a loader does that knows no LoRA on experts."""

    def silence(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "experts" in name and "lora_B" in name:
                tensors[name] = torch.zeros_like(tensors[name])

    _edit(adapter, silence)


def _drop_one(adapter: Path) -> None:
    _edit(adapter, lambda tensors: tensors.__delitem__(min(tensors)))


def _add_one(adapter: Path) -> None:
    _edit(adapter, lambda tensors: tensors.update({sorted(tensors)[0].replace("layers.0", "layers.9"): torch.ones(1)}))


def _narrow_the_targets(adapter: Path) -> None:
    """A config that names no experts: PEFT itself would load it, and say nothing."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_parameters"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def _lose_the_biases(adapter: Path) -> None:
    (adapter / ROUTER_BIAS).unlink()


def _still_the_biases(adapter: Path) -> None:
    biases = load_file(adapter / ROUTER_BIAS)
    assert all(bias.any() for bias in biases.values())
    save_file({name: torch.zeros_like(bias) for name, bias in biases.items()}, adapter / ROUTER_BIAS)


@pytest.mark.parametrize(
    ("name", "corrupt", "told"),
    [
        ("per expert on disk", _double_the_scale, "does not hold what was trained"),
        ("per expert on disk", _swap_experts, "does not hold what was trained"),
        ("per expert on disk", _silence_experts, "does not hold what was trained"),
        ("per expert on disk", _drop_one, "lacks 1 tensor"),
        ("per expert on disk", _add_one, "finds no place for 1 of its tensors"),
        ("per expert on disk", _narrow_the_targets, "finds no place for"),
        ("bf16", _double_the_scale, "does not hold what was trained"),
        ("bf16", _swap_experts, "does not hold what was trained"),
        ("4-bit base", _silence_experts, "does not hold what was trained"),
        ("moved biases", _lose_the_biases, "the router biases that it was trained with"),
        ("moved biases", _still_the_biases, "does not hold the router biases that"),
    ],
)
def test_any_other_content_of_the_files_is_reported(
    run_of: Callable[[str], Run], name: str, corrupt: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    run = run_of(name)
    adapter = shutil.copytree(run.folder.adapter, tmp_path / "adapter")
    corrupt(adapter)
    with pytest.raises(AdapterError, match=told) as raised:
        check_adapter(adapter)
    if "lora" not in str(raised.value) and "biases that" not in str(raised.value):
        assert "logits differ by" in str(raised.value)


def test_another_base_is_reported(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    other = tiny_models.build("mixtral", tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="does not hold what was trained"):
        check_adapter(run_of("per expert on disk").folder.adapter, str(other))


@pytest.mark.parametrize("name", ["per expert on disk", "moved biases", "bf16", "4-bit base"])
def test_a_merged_folder_equals_its_adapter(run_of: Callable[[str], Run], name: str, tmp_path: Path) -> None:
    run = run_of(name)
    base = run.folder.read_spec().model
    merge(base, run.folder.adapter, tmp_path / "merged")
    found = check_merged(tmp_path / "merged", run.folder.root)
    assert found.gap.share <= found.tolerance == PLAIN["fp32"]
    with pytest.raises(AdapterError, match="differs from the adapter on its base"):
        check_merged(base, run.folder.root)


def test_a_merge_rounded_to_16_bits(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    run = run_of("per expert on disk")
    base = run.folder.read_spec().model
    merge(base, run.folder.adapter, tmp_path / "merged", dtype="bf16")
    found = check_merged(tmp_path / "merged", run.folder.root)
    assert (found.dtype, found.weights, found.tolerance) == ("fp32", "bf16", PLAIN["bf16"])
    assert AS_TRAINED["fp32"] < found.gap.share < PLAIN["bf16"]


def test_the_probe_is_small_fixed_and_whole(run_of: Callable[[str], Run]) -> None:
    run = run_of("fused")
    found = probe.read_probe(run.folder.adapter)
    assert found is not None
    assert [row.tokens for row in found.rows] == probe.sequences(tiny_models.tokenizer())
    assert len(found.rows) == 4
    assert all(0 < len(row.tokens) <= probe.LENGTH for row in found.rows)
    assert (run.folder.adapter / probe.PROBE).stat().st_size < 200_000
    for row in found.rows:
        assert {len(ids) for ids in row.ids} == {probe.TOP + probe.SPREAD}
        assert all(ids[probe.TOP] == 0 and ids[-1] == tiny_models.VOCAB_SIZE - 1 for ids in row.ids)
    without = tiny_models.tokenizer()
    without.chat_template = None
    assert len(probe.sequences(without)) == 4


def test_an_older_jobs_adapter_has_nothing_to_compare(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    adapter = shutil.copytree(run_of("fused").folder.adapter, tmp_path / "adapter")
    (adapter / probe.PROBE).unlink()
    with pytest.raises(NotRecorded, match="from a job of an earlier version"):
        check_adapter(adapter)
    (adapter / probe.PROBE).write_text('{"rows": 1}')
    with pytest.raises(AdapterError, match=r"load_check\.json can't be read"):
        check_adapter(adapter)


def test_the_command(run_of: Callable[[str], Run], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = run_of("fused")
    capsys.readouterr()
    assert main([str(run.folder.root)]) == 0
    said = capsys.readouterr().out
    assert "as trained (fp32, cpu, experts moe_torch): logits differ by 0 at most" in said
    assert main([str(run.folder.adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loaded"]["as_trained"]["greatest"] == 0
    assert main([str(tmp_path)]) == 1
    assert "holds no logits of the trained model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "plain", "effect", "right"),
    [
        ("bf16", 0.021, 0.053, True),  # the demo's, a model of 30 layers
        ("bf16", 0.05, 0.053, False),  # hardly nearer than the base
        ("bf16", 0.04, 0.4, True),
        ("bf16", 0.06, 0.4, False),  # more than bf16 ever rounds
        ("bf16", 0.04, 0.045, True),  # told, not judged: rounding alone may be as much
        ("fp32", 2e-6, 1e-4, True),
        ("fp32", 5e-5, 1e-4, False),
    ],
)
def test_rounding_differs_from_an_adapter_that_is_not_applied(
    dtype: DType, plain: float, effect: float, right: bool
) -> None:
    def apart(share: float) -> Gap:
        return Gap(greatest=share, mean=share, share=share)

    arithmetic = probe.Arithmetic(dtype=dtype, device="cpu", quantize_bits=None, experts_implementation=None)
    found = LoadCheck(
        kind="adapter", positions=1, arithmetic=arithmetic, here=arithmetic, as_trained=apart(0.0),
        as_trained_tolerance=AS_TRAINED[dtype], plain=apart(plain), plain_tolerance=PLAIN[dtype],
        plain_against="recorded", effect=apart(effect), tensors=1, router_biases=0,
    )  # fmt: skip
    if right:
        assert judged(found, "it") is found
    else:
        with pytest.raises(AdapterError, match="loaded plainly, it differs from what was trained"):
            judged(found, "it")
