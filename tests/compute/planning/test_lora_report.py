"""The LoRA report: counts against hand arithmetic, the dry run's laws, and peaks against measured steps."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from llama_stack_provider_moe.compute.moe.adapters import injected
from llama_stack_provider_moe.compute.moe.layout import outside_text
from llama_stack_provider_moe.compute.planning.dry_run import Meter, Rehearsal
from llama_stack_provider_moe.compute.planning.lora_report import main, report, targets_of
from llama_stack_provider_moe.compute.planning.memory import Batch, estimate, hidden_state_bytes
from llama_stack_provider_moe.compute.planning.meta_model import blank, read_config
from llama_stack_provider_moe.control.cli.report import shown
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import Adapter, Moe, TrainingRecipe
from tests.support import tiny_models
from tests.support.chosen import few
from tests.support.cli_support import moe_train
from tests.support.every_family import tiny_config
from tests.support.measured_memory import Case, estimated, run

CONFIGS = Path(__file__).parents[2] / "configs"
RANK = 16
# Published sizes of the language models, if their makers state the exact number of parameters.
PUBLISHED = {"llama-3-8b": 8_030_261_248, "mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624}


def values(stem: str) -> dict[str, Any]:
    """The language model's part of the published config."""
    found: dict[str, Any] = json.loads((CONFIGS / f"{stem}.json").read_text())
    return {**found, **found.get("text_config", {})}


def by_hand(stem: str) -> dict[str, int]:
    """Matches, adapters and parameters of LoRA on everything, and the base's size: only from the config's numbers."""
    c = values(stem)
    hidden, layers, vocabulary = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    head = c.get("head_dim", hidden // c["num_attention_heads"])
    queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    experts = c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts") or 0
    dense_layers = c.get("first_k_dense_replace", 0) if experts else layers
    moe_layers = layers - dense_layers
    inner = c.get("moe_intermediate_size", c["intermediate_size"])  # of an expert
    shared_inner = {"llama-4-scout-17b-16e": inner, "glm-4.5-air": inner * c.get("n_shared_experts", 0)}.get(stem, 0)
    # A (r, in) and B (out, r): r (in + out) a linear layer. Queries, keys, values, output:
    attention = RANK * ((hidden + queries) + 2 * (hidden + keys) + (queries + hidden))
    # A fused expert: hidden to twice its inner size, and back.
    routed = experts * RANK * ((hidden + 2 * inner) + (inner + hidden))
    shared = 3 * RANK * (hidden + shared_inner) if shared_inner else 0
    dense = 3 * RANK * (hidden + c["intermediate_size"])
    biases = queries + 2 * keys if c.get("attention_bias") else 0
    norms = 2 * hidden + (2 * head if stem == "qwen3-30b-a3b" else 0)  # Qwen3 has one for queries, one for keys
    base_layer = hidden * queries + 2 * hidden * keys + queries * hidden + biases + norms
    base_moe = experts * 3 * hidden * inner + experts * hidden + 3 * hidden * shared_inner
    embeddings = vocabulary * hidden * (1 if c["tie_word_embeddings"] else 2) + hidden
    return {
        "routed_matches": 2 * moe_layers if experts else 0,
        "routed_adapters": 2 * moe_layers * experts,
        "routed": moe_layers * routed,
        "shared_matches": 3 * moe_layers if shared_inner else 0,
        "shared": moe_layers * shared,
        "trunk_matches": 4 * layers + 3 * dense_layers,
        "trunk": layers * attention + dense_layers * dense,
        "base": embeddings + layers * base_layer + moe_layers * base_moe + dense_layers * 3 * hidden
        * c["intermediate_size"],
    }  # fmt: skip


STEMS = sorted(path.stem for path in CONFIGS.glob("*.json") if path.stem != "sources")


def everything(stem: str) -> Adapter:
    return Adapter(rank=RANK, plan=None if stem in ("llama-3-8b", "mistral-nemo-12b") else "all_experts")


@pytest.mark.parametrize("stem", STEMS)
def test_counts_are_those_by_hand(stem: str) -> None:
    config, notes = read_config(str(CONFIGS / f"{stem}.json"))
    adapted = blank(config, everything(stem), Moe())
    assert all(parameter.is_meta for parameter in adapted.model.parameters())
    rows, wanted = list(targets_of(adapted)), by_hand(stem)
    for part, key in (("routed experts", "routed"), ("shared experts", "shared"), ("trunk", "trunk")):
        mine = [row for row in rows if row.part == part]
        assert sum(row.count for row in mine) == wanted[f"{key}_matches"], part
        assert sum(row.parameters for row in mine) == wanted[key], part
        expected = wanted["routed_adapters"] if key == "routed" else wanted[f"{key}_matches"]
        assert sum(row.adapters for row in mine) == expected, part
    assert {row.sharing for row in rows} == {"distinct"}
    trainable = wanted["routed"] + wanted["shared"] + wanted["trunk"]
    assert adapted.report.trainable_parameters == trainable == sum(row.bytes for row in rows) // 4
    outside = sum(adapted.model.get_base_model().get_parameter(name).numel() for name in outside_text(adapted.model))
    assert bool(outside) == (stem == "llama-4-scout-17b-16e")  # its vision tower
    assert adapted.report.total_parameters - trainable - outside == wanted["base"]
    assert wanted["base"] == PUBLISHED.get(stem, wanted["base"])
    # In addition to the 16-bit weights there are only embeddings, norms and small buffers.
    assert adapted.weight_bytes == pytest.approx(2 * (wanted["base"] + outside), rel=1e-3)
    assert bool(notes) == (stem == "llama-4-scout-17b-16e")


def test_a_model_that_can_not_be_rehearsed_is_counted_all_the_same(tmp_path: Path) -> None:
    """GLM-5's next attention keeps as many blocks as a mask says."""
    tiny_config("glm5_next").save_pretrained(tmp_path)
    found = report(str(tmp_path), Adapter(rank=4), Moe(), Batch(1, 16), (16,), None, "cpu", load=False)
    assert found.memory == ()
    assert found.targets
    assert any("depend on the numbers" in note for note in found.notes)
    assert shown(json.loads(json.dumps(asdict(found)))) is not None


def test_every_config_says_where_it_is_from() -> None:
    sources = json.loads((CONFIGS / "sources.json").read_text())
    assert {name for name in sources if name != "_about"} == set(STEMS)
    assert all(each["of"] and each["_source"] for name, each in sources.items() if name != "_about")


def test_scout_is_not_what_the_old_note_guessed() -> None:
    c, counted = values("llama-4-scout-17b-16e"), by_hand("llama-4-scout-17b-16e")
    assert (c["hidden_size"], c["num_experts_per_tok"]) == (5120, 1)  # not 3072, not top-2
    # 4 + 3 * 16 modules a layer would be 2,496; fused experts are two parameters a layer.
    assert counted["routed_matches"] + counted["shared_matches"] + counted["trunk_matches"] == 48 * (2 + 3 + 4) == 432
    assert 48 * (4 + 3 * 16) == 2496


def test_shared_weights_are_distinguished_from_equal_ones() -> None:
    adapted = blank(tiny_models.config("llama"), Adapter(rank=4), Moe())
    first, second = [layer for name, layer in injected(adapted.model).items() if name.endswith("q_proj")]
    second.lora_A["default"].weight = first.lora_A["default"].weight
    told = {row.name: row.sharing for row in targets_of(adapted)}
    assert told["self_attn.q_proj"] == "shared"
    assert {sharing for name, sharing in told.items() if name != "self_attn.q_proj"} == {"distinct"}


def test_experts_of_unequal_ranks_count_what_trains() -> None:
    rules = [{"experts": {"0": 8, "1-2": 2}}]
    adapter = Adapter.model_validate({"plan": "per_expert", "rank": 4, "rules": rules})
    config = tiny_models.config("mixtral")
    rows = {row.name: row for row in targets_of(blank(config, adapter, Moe()))}
    row = rows["mlp.experts.down_proj"]
    ends = config.hidden_size + config.intermediate_size
    assert row.adapters == 3 * config.num_hidden_layers  # expert 3 has none
    assert row.parameters == config.num_hidden_layers * (8 + 2 + 2) * ends
    assert row.bytes == 4 * config.num_hidden_layers * 8 * config.num_local_experts * ends  # including padding


def test_a_meter_counts_storages_once_while_they_exist() -> None:
    older = torch.zeros(8)
    with Meter() as meter:
        made = torch.zeros(10)  # 40 bytes
        view = made[2:].view(2, 4)
        older.add_(1)
        assert (meter.live, meter.peak) == (40, 40)
        twice = made * 2
        assert meter.live == 80
        del twice, made
        assert (meter.live, meter.peak) == (40, 80)
        del view
        assert meter.live == 0


def test_a_linear_layer_keeps_its_input_for_backward() -> None:
    layer = nn.Linear(16, 16, bias=False)
    with Meter() as meter:
        hidden = torch.zeros(5, 16).requires_grad_()
        before = meter.live
        out = torch.relu(layer(hidden))
        del hidden
        # Its input, for the weight's gradient; relu's output, for relu's gradient.
        assert before == 5 * 16 * 4
        assert meter.live == 2 * 5 * 16 * 4
        del out


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text", "glm4_moe", "gpt_oss", "llama"])
def test_every_adapter_weight_has_its_gradient_in_the_dry_run(family: str) -> None:
    adapted = blank(tiny_models.config(family), Adapter(rank=4), Moe())
    trainable = sum(parameter.numel() for parameter in adapted.model.parameters() if parameter.requires_grad)
    rehearsal = Rehearsal(adapted.model, "cpu")
    one, two = rehearsal.run(1, 64, with_head=False), rehearsal.run(2, 64, with_head=False)
    assert sum(layer.gradients for layer in one.layers) == 4 * trainable
    for single, double in zip(one.layers, two.layers, strict=True):
        assert double.output == 2 * single.output == 2 * 64 * 32 * 2
        # The part that does not grow with the batch: the adapter in 16 bits, and weights that PEFT merges it into.
        assert single.kept < double.kept <= 2 * single.kept
        assert single.backward >= single.kept
        assert single.without_graph < single.forward


def test_terms_of_the_estimate() -> None:
    config, batch = tiny_models.config("mixtral"), Batch(2, 64)
    by_bits = {}
    for bits in (16, 4):
        adapted = blank(config, Adapter(rank=4), Moe(), bits)
        trainable = adapted.report.trainable_parameters
        found, _ = estimate(adapted, bits, batch, (0,), "cuda")
        by_bits[bits] = {(each.recipe, each.checkpointing): each for each in found}
        for each in found:
            assert each.terms.adapter == 4 * trainable
            assert each.terms.optimizer == 8 * trainable
            assert each.peak_bytes == sum(asdict(each.terms).values())
        for recipe in ("sft", "dpo", "circuit_breaker"):
            assert by_bits[bits][recipe, True].peak_bytes <= by_bits[bits][recipe, False].peak_bytes
        assert by_bits[bits]["dpo", False].terms.activations > by_bits[bits]["sft", False].terms.activations
    # Only the experts: two bytes a number, against half a byte plus four for each 64 begun.
    numbers = 3 * config.num_local_experts * config.intermediate_size * config.hidden_size
    saved = by_bits[16]["sft", False].terms.weights - by_bits[4]["sft", False].terms.weights
    assert saved > config.num_hidden_layers * numbers * (2 - 0.5 - 4 / 64 * 1.1)


def test_blank_codes_have_the_size_of_real_ones() -> None:
    from llama_stack_provider_moe.compute.moe.codes import Coding
    from llama_stack_provider_moe.compute.moe.derive import find_layout
    from llama_stack_provider_moe.compute.moe.quantize import quantize, resident_bytes

    real = tiny_models.model("granitemoe").to(torch.bfloat16)
    quantize(real, find_layout(real), Coding(4), torch.device("cpu"))
    counted = blank(tiny_models.config("granitemoe"), Adapter(rank=4), Moe(), 4).weight_bytes
    assert counted == pytest.approx(resident_bytes(real), rel=0.01)


def test_hidden_states() -> None:
    assert hidden_state_bytes(48, 5120, Batch(4, 1024)) == 48 * 4 * 1024 * 5120 * 2
    assert hidden_state_bytes(3, 5120, Batch(4, 1024)) / hidden_state_bytes(48, 5120, Batch(4, 1024)) == 3 / 48


NARROW = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "case",
    few([
        Case("sft", "qwen3_moe", {**NARROW, "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16,
                                  "num_local_experts": 16, "head_dim": 64},
             {"plan": "all_experts", "rank": 8}, bits=4, nested=True),
        Case("sft", "granitemoe", {**NARROW, "hidden_size": 256, "intermediate_size": 128, "num_local_experts": 8,
                                   "num_hidden_layers": 4}, {"plan": "all_experts", "rank": 8}),
        Case("dpo", "mixtral", {**NARROW, "hidden_size": 256, "intermediate_size": 512},
             {"plan": "all_experts", "rank": 8}, bits=4),
        Case("sft", "llama", {**NARROW, "hidden_size": 1024, "intermediate_size": 2816}, {"rank": 8}, length=64,
             checkpointing=True),
    ], 1),
    ids=lambda case: f"{case.recipe}-{case.family}-{case.bits}",
)  # fmt: skip
def test_peak_is_what_a_real_step_takes(case: Case) -> None:
    told, measured = estimated(case), run(case)
    assert told.static_bytes == pytest.approx(measured.static, rel=0.01)
    assert told.peak_bytes == pytest.approx(measured.peak, rel=0.15)
    # The same without the terms that are easy to count: weights, adapter and optimiser.
    assert told.peak_bytes - told.static_bytes == pytest.approx(measured.dynamic, rel=0.15)


@pytest.mark.wide
def test_loaded_weights_give_the_same_report(tmp_path: Path) -> None:
    folder = tiny_models.build("granitemoe", tmp_path / "model")
    told = [
        report(str(folder), Adapter(rank=4), Moe(), Batch(2, 32), (16,), None, "cuda", load=load)
        for load in (False, True)
    ]
    assert [each.source for each in told] == ["config", "weights"]
    assert told[0].targets == told[1].targets
    assert (told[0].base_parameters, told[0].memory) == (told[1].base_parameters, told[1].memory)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["no-such-folder"], "config.json"),
        (["{model}", "--rank", "0"], "adapter.rank: 0"),
        (["{model}", "--plan", "some"], "adapter.plan: 'some'"),
        (["{model}", "--plan", "all_experts"], "it has no experts"),
        (["{model}", "--targets", "0,7"], "--targets: 7"),
        (["{model}", "--adapter", "{"], "is not JSON"),
        (["{model}", "--adapter", "[]"], "JSON object"),
        (["{model}", "--train-router"], "train_router"),
    ],
)
def test_mistakes_are_reported(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_models.config("llama").save_pretrained(tmp_path)
    assert main([word.replace("{model}", str(tmp_path)) for word in words]) == 2
    assert says in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    config = tiny_models.config("llama").to_dict()
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="unquantised"):
        read_config(str(tmp_path))


@pytest.mark.wide
def test_the_command_line_shows_it_and_writes_json(tmp_path: Path) -> None:
    tiny_models.config("mixtral").save_pretrained(tmp_path)
    out = tmp_path / "report.json"
    told = moe_train("report", "lora", str(tmp_path), "--rank", "4", "--bits", "16", "--json", str(out))
    assert told.code == 0, told.err
    document = json.loads(out.read_text())
    assert "mlp.experts.gate_up_proj" in told.out
    assert f"{document['trainable_parameters']:,} parameters" in told.out
    assert {each["recipe"] for each in document["memory"]} == {*get_args(TrainingRecipe)} - {"distill"}
    refused = moe_train("report", "lora", str(tmp_path), "--bits", "8")
    assert (refused.code, refused.out) == (2, "")
    assert "--bits: 8" in refused.err
