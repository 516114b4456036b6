"""The planner: what a process holds under each strategy, the strategy that a job gets, and changes that make it fit."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.planning import plan_command
from llama_stack_provider_moe.compute.planning.dry_run import Device
from llama_stack_provider_moe.compute.planning.engine_memory import engine_bytes
from llama_stack_provider_moe.compute.planning.estimated_time import UTILISATION, estimated, flops_a_token
from llama_stack_provider_moe.compute.planning.meta_model import blank, read_config
from llama_stack_provider_moe.compute.planning.per_process import process_memory, transient_memory, weights_of
from llama_stack_provider_moe.compute.planning.planner import Machine, Planner, changed, refusal
from llama_stack_provider_moe.compute.train import strategy
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.control.cli.plan import bytes_of, timed
from llama_stack_provider_moe.errors import InvalidInput, MoeError
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter, Distill, Moe, Optimizer, TrainingSpec
from tests.support import tiny_models
from tests.support.cli_support import moe_train
from tests.support.every_family import tiny_config
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

FAMILY = "mixtral"
# So large that weights, not the head's tiles, take most of a step's memory.
WIDE = {"hidden_size": 512, "intermediate_size": 1024}
CONFIG = tiny_models.config(FAMILY, **WIDE)


def job(**blocks: Any) -> TrainingSpec:
    """SFT with LoRA on four GPUs, in micro-batches of 8 x 64."""
    body = {"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, "training": {"batch_size": 8},
            "adapter": {"rank": 4}, "options": {"max_length": 64}, "resources": {"gpus": 4}}  # fmt: skip
    for name, block in blocks.items():
        body[name] = {**body[name], **block} if isinstance(block, dict) and isinstance(body.get(name), dict) else block
    made: TrainingSpec = JOB_SPEC.validate_python(body)  # type: ignore[assignment]
    return made


@pytest.fixture(scope="module")
def roomy() -> Planner:
    """A planner for GPUs of 80 GB."""
    return Planner(CONFIG, Machine("cuda", 80 * 10**9))


def of(planner: Planner, memory_bytes: int) -> Planner:
    """The same planner for other GPUs; dry runs are kept."""
    other = Planner(CONFIG, Machine("cuda", memory_bytes))
    other._seen = planner._seen
    return other


def peaks(planner: Planner, spec: TrainingSpec) -> dict[str, int]:
    return {option.strategy: option.peak_bytes for option in planner.plan(spec).options}


@pytest.mark.parametrize("adapter", [Adapter(rank=4), None], ids=["lora", "whole"])
def test_one_of_n_processes_holds_its_share(adapter: Adapter | None) -> None:
    """One of n holds an n-th of the base under FSDP, an n-th of the experts under EP, and else everything."""
    adapted = blank(CONFIG, adapter, Moe())
    weights = weights_of(adapted)
    alone = process_memory(weights, "ddp", 1, Optimizer())
    assert alone.weights == adapted.weight_bytes
    size = 2 if adapter is None else 4
    assert alone.gradients == adapted.report.trainable_parameters * size == alone.optimizer // 2
    buffers = sum(weight.bytes for weight in weights if weight.kind == "buffer")
    for processes in (2, 4):
        several = {way: process_memory(weights, way, processes, Optimizer()) for way in ("ddp", "fsdp", "ep")}
        assert several["ddp"] == replace(alone, buckets=alone.gradients)
        assert (several["fsdp"].weights - buffers) * processes == alone.weights - buffers
        assert several["fsdp"].adapter == alone.adapter
        assert several["fsdp"].gradients == (alone.gradients if adapter else alone.gradients // processes)
        experts = sum(weight.bytes for weight in weights if weight.kind == "expert" and not weight.added)
        assert alone.weights - several["ep"].weights == experts - experts // processes
        assert transient_memory(adapted, weights, "ddp", processes, 64).layer == 0
        # Two layers of the base in bf16, whatever trains.
        layer = sum(weight.bytes for weight in weights if weight.layer == 0 and not weight.added)
        assert transient_memory(adapted, weights, "fsdp", processes, 64).layer >= 2 * layer


def test_rows_that_do_not_divide_are_filled_up() -> None:
    weights = weights_of(blank(CONFIG, Adapter(rank=4), Moe()))
    fifth = process_memory(weights, "fsdp", 5, Optimizer()).weights
    assert fifth == sum(weight.of_one("fsdp", 5) for weight in weights if not weight.added)
    assert 5 * fifth > process_memory(weights, "ddp", 1, Optimizer()).weights


def test_memory_grows_with_the_batch_and_falls_with_processes(roomy: Planner) -> None:
    by_batch = [peaks(roomy, job(training={"batch_size": size})) for size in (2, 4, 8)]
    for way in ("ddp", "fsdp"):
        assert by_batch[0][way] < by_batch[1][way] < by_batch[2][way]
    by_gpus = [peaks(roomy, job(resources={"gpus": gpus})) for gpus in (2, 4, 8)]
    assert by_gpus[0]["fsdp"] > by_gpus[1]["fsdp"] > by_gpus[2]["fsdp"]
    assert by_gpus[0]["ddp"] == by_gpus[1]["ddp"] == by_gpus[2]["ddp"]
    accumulated = peaks(roomy, job(training={"gradient_accumulation_steps": 2}))
    assert accumulated["ddp"] >= by_batch[2]["ddp"]


def test_memory_of_settings(roomy: Planner) -> None:
    lora, whole = job(resources={"gpus": 1}), job(adapter=None, resources={"gpus": 1})
    assert peaks(roomy, whole)["ddp"] > peaks(roomy, lora)["ddp"]
    plain = roomy.estimate(whole, "ddp")
    moments = roomy.estimate(job(adapter=None, resources={"gpus": 1}, optimizer={"optimizer_type": "sgd"}), "ddp")
    assert plain[1] - moments[1] == plain[0].terms.optimizer == pytest.approx(2 * plain[0].terms.weights, rel=1e-3)
    wide = roomy.estimate(job(adapter=None, resources={"gpus": 1}, training={"dtype": "fp32"}), "ddp")
    assert wide[1] == pytest.approx(2 * plain[1], rel=1e-3)  # buffers are fp32 in both
    there, away = (job(adapter=None, resources={"strategy": "fsdp", "cpu_offload": offloaded}) for offloaded in (0, 1))
    terms = [roomy.estimate(spec, "fsdp")[0].terms for spec in (there, away)]
    assert [each.gathered for each in terms] == [terms[0].gathered] * 2
    assert terms[1].optimizer == terms[1].gradients == 0 < terms[0].optimizer
    assert terms[1].weights < terms[0].weights
    assert "cpu_offload: true is not valid" in str(roomy.plan(away).options[0].refused)
    pairs = {"recipe": "dpo", "adapter": None, "resources": {"gpus": 1}}
    copies = [roomy.estimate(job(**pairs, options={"precompute_ref_log_probs": ahead}), "ddp")[0].terms.weights
              for ahead in (False, True)]  # fmt: skip
    assert copies == [2 * plain[0].terms.weights, plain[0].terms.weights]
    thumbs = roomy.estimate(job(recipe="kto", adapter=None, resources={"gpus": 1}), "ddp")[0]
    assert thumbs.terms.weights == copies[0], "a copy is the reference"
    judged = roomy.estimate(job(recipe="reward", adapter=None, resources={"gpus": 1}), "ddp")[0]
    head = (CONFIG.vocab_size - 1) * CONFIG.hidden_size * 2  # bf16
    assert judged.terms.weights == plain[0].terms.weights - head, "one number in place of the vocabulary"
    codes = {bits: roomy.estimate(job(adapter={"quantize_base": True, "quantize_bits": bits}), "ddp")[0].terms.weights
             for bits in (8, 4)}  # fmt: skip
    assert codes[4] < codes[8] < roomy.estimate(lora, "ddp")[0].terms.weights
    nested = job(adapter={"quantize_base": True, "quantize_scales": True})
    assert roomy.estimate(nested, "ddp")[0].terms.weights < codes[4]
    refused = {option.strategy: option.refused for option in roomy.plan(job(adapter={"quantize_base": True})).options}
    assert refused["ddp"] is None
    assert "adapter.quantize_base true" in str(refused["fsdp"]), "as the door says it"
    (three,) = [option for option in roomy.plan(job(resources={"gpus": 3})).options if option.strategy == "ep"]
    assert three.refused == "4 experts can't be divided equally among 3 processes"
    longcat = Planner(tiny_config("longcat_flash"), Machine("cuda", 80 * 10**9))
    (ep,) = [option for option in longcat.plan(job(resources={"gpus": 2})).options if option.strategy == "ep"]
    assert "LongcatFlashExperts is a stack of 6 matrices for 4 experts" in str(ep.refused)


def test_memory_of_the_optimisers_of_bitsandbytes(roomy: Planner) -> None:
    """Moments of 2 bytes and a scale for 256, in 32 bits for embeddings and small weights; paged ones are elsewhere."""

    def planned(kind: str, **blocks: Any) -> Any:
        return roomy.estimate(job(resources={"gpus": 1}, optimizer={"optimizer_type": kind}, **blocks), "ddp")[0]

    plain, coded, paged = (planned(kind) for kind in ("adamw", "adamw_8bit", "paged_adamw_8bit"))
    assert coded.terms.optimizer < 0.4 * plain.terms.optimizer, "a few weights are below 4,096 numbers"
    assert coded.machine_bytes == plain.machine_bytes == 0
    assert paged.terms.optimizer + paged.machine_bytes == coded.terms.optimizer
    wide = [planned("adamw_8bit", adapter={"dtype": dtype}).terms for dtype in ("fp32", "bf16")]
    assert wide[1].adapter * 2 == wide[0].adapter == plain.terms.adapter
    assert wide[1].optimizer == wide[0].optimizer
    whole = planned("adamw_8bit", adapter=None).terms
    config = text_config(blank(CONFIG, None, Moe()).model)
    looked_up = config.vocab_size * config.hidden_size
    assert whole.optimizer > 8 * looked_up + 2 * (whole.weights // 2 - looked_up)
    several = {
        each.strategy: str(each.refused) for each in roomy.plan(job(optimizer={"optimizer_type": "adamw_8bit"})).options
    }
    assert "whose state can't be divided" in several["fsdp"]
    assert "whose state can't be divided" in several["ep"]
    assert several["ddp"] == "None"


def test_auto_is_the_first_that_fits(roomy: Planner) -> None:
    spec = job()
    whole, shared = peaks(roomy, spec)["ddp"], peaks(roomy, spec)["fsdp"]
    assert max(shared, peaks(roomy, spec)["ep"]) < whole
    assert roomy.plan(spec).chosen == roomy.plan(spec).options[0]
    smaller = of(roomy, int((whole - 1) / 0.9)).plan(spec)
    assert (smaller.verdict, smaller.as_json()["strategy"]) == ("fits", "fsdp")
    asked = of(roomy, int((whole - 1) / 0.9)).plan(job(resources={"strategy": "ddp"}))
    assert (asked.verdict, asked.as_json()["strategy"]) == ("tight", "ddp"), "what was asked for is not overruled"
    on_cpu = Planner(CONFIG, Machine("cpu", 10**8)).plan(job(resources={"gpus": 0, "processes": 2}))
    assert on_cpu.chosen is not None
    assert on_cpu.chosen.strategy == "ddp"
    assert [option.strategy for option in roomy.plan(job(resources={"gpus": 1})).options] == ["ddp"]


@pytest.mark.wide
def test_every_suggested_change_fits(roomy: Planner) -> None:
    """Each change gives a valid job that fits; settings that are refused are never among them."""
    spec = job(adapter=None, training={"batch_size": 1}, resources={"gpus": 2, "strategy": "ddp"})
    certain = roomy.plan(spec).options[0].certain_bytes
    small = of(roomy, int(0.7 * certain))
    plan = small.plan(spec)
    assert plan.chosen is None
    changes = small.changes(spec)
    assert {next(iter(change.fields)) for change in changes} >= {"adapter", "resources.strategy"}
    for change in changes:
        again = small.plan(changed(spec, change.fields))
        assert again.verdict == "fits"
        assert again.chosen is not None
        assert (again.chosen.strategy, again.chosen.peak_bytes) == (change.strategy, change.peak_bytes)
    told = refusal(plan, changes)
    assert told.startswith("the job can't fit on 2 devices of ")
    assert "ddp needs" in told
    assert "fsdp needs" not in told, "which would do"
    assert all(change.text() in told for change in changes)
    tight = of(roomy, int((min(peaks(roomy, job()).values()) - 1) / 0.9))
    kinds = {next(iter(change.fields)) for change in tight.changes(job())}
    assert {"efficiency.enable_activation_checkpointing", "training.batch_size", "options.max_length"} <= kinds
    assert of(roomy, 1000).changes(spec) == ()


def test_several_settings_are_suggested_if_no_single_one_is_enough(roomy: Planner) -> None:
    spec = job(resources={"gpus": 1})
    alone = peaks(roomy, changed(spec, {"training.batch_size": 1, "training.gradient_accumulation_steps": 8}))["ddp"]
    for room in range(alone, 0, -alone // 10):
        found = of(roomy, room).changes(spec)
        if not found or len(found[0].fields) > 2:
            break
    assert len(found) == 1
    assert of(roomy, room).plan(changed(spec, found[0].fields)).verdict == "fits"


def test_a_job_that_can_not_fit_ends_before_its_weights_are_read(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine with very little memory; with more, the job reports the estimate and trains."""
    folder = workshop.job("sft", FAMILY, adapter=None)
    spec: Any = folder.read_spec()
    certain = Planner(read_config(spec.model)[0], Machine("cpu", 10**12)).plan(spec).options[0].certain_bytes
    (weights,) = Path(spec.model).glob("*.safetensors")
    hidden = weights.rename(weights.with_suffix(".hidden"))
    monkeypatch.setattr(strategy, "_weights_on_disk", lambda model: 10**12)
    monkeypatch.setattr(strategy, "_machine_bytes", lambda: certain - 1)
    ended = workshop.again(Run(folder, 0))
    assert ended.exit_code == FAILED
    assert ended.reason.startswith("the job can't fit on 1 device of "), ended.reason
    hidden.rename(weights)
    monkeypatch.setattr(strategy, "_machine_bytes", lambda: certain + 1)
    tight = workshop.run("sft", FAMILY, adapter=None)
    assert tight.exit_code == COMPLETED, tight.reason
    assert any(event.text.startswith("memory is tight") for event in tight.events("message"))
    assert (tight.resolved["strategy"], tight.resolved["memory"]["verdict"]) == ("ddp", "tight")
    assert "memory    ddp: 0.1" in capsys.readouterr().out


def test_a_small_job_on_a_cpu_is_not_estimated(workshop: Workshop) -> None:
    spec = workshop.job("sft", FAMILY).read_spec()
    assert strategy._decide(spec, "cpu", strategy._machine_bytes()) == ("ddp", None, ())  # type: ignore[arg-type]
    taught = spec.model_copy(update={"distill": Distill(model="a/large-one")})  # type: ignore[union-attr]
    assert not strategy._is_small(taught, strategy._machine_bytes()), "a teacher whose size is not known"  # type: ignore[arg-type]
    told = strategy._decide(job(), "cuda", 80 * 10**9)  # no such model
    assert (told.strategy, told.forecast) == ("ddp", None)
    assert told.warnings[0].startswith("memory could not be estimated (ModelError: model: the config of")


@pytest.mark.parametrize(
    ("adapter", "max_length", "largest"), [(None, 256, 1 / 64), ({}, 256, 1 / 32), ({}, 257, 1 / 64)]
)
def test_what_is_small_depends_on_what_trains_and_on_the_batch(
    adapter: dict[str, Any] | None, max_length: int, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most an eighth of the memory for weights, gradients and moments; under an adapter a sixteenth for weights."""
    spec = changed(job(adapter=adapter), {"training.batch_size": 8, "options.max_length": max_length})
    memory = 64 * 10**9
    for files, is_estimated in ((largest * memory, False), (largest * memory + 1, True)):
        monkeypatch.setattr(strategy, "_weights_on_disk", lambda model, files=files: files)
        decided = strategy._decide(spec, "cpu", memory)  # no such model: an estimate ends with a warning
        assert bool(decided.warnings) is is_estimated


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.save_pretrained(tmp_path)
    template = tmp_path / "job.json"
    template.write_text(json.dumps({**job().model_dump(mode="json"), "model": str(tmp_path)}))
    done = moe_train("plan", str(template), "--gpus", "2", "--memory", "1GB")
    assert done.code == 0, done.err
    assert "it fits, with ddp (resources.strategy auto)" in done.out
    assert "2 GPUs of 1 GB" in done.out
    assert "time not known: no job like it was measured" in done.out
    assert "vision tower" not in done.out
    for body, problem in (
        ({**job().model_dump(mode="json"), "model": "/nowhere"}, "model: the config of '/nowhere'"),
        ({"recipe": "sft", "model": "a/b"}, "data: "),
        (
            {"recipe": "routing_analysis", "model": "a/b", "data": {"sets": {"a": "d", "b": "e"}}},
            "recipe: 'routing_analysis' is not valid",
        ),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(body)))
        assert plan_command.main(["--memory", "1000000000"]) == 2
        assert problem in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "blocks",
    [
        {"adapter": {"dropout": 0.1}},
        {"moe": {"expert_dropout": 0.1}},
        {"adapter": None, "moe": {"expert_dropout": 0.1}},
    ],
)
def test_dropout_on_experts_takes_no_less(device: Device, blocks: dict[str, Any]) -> None:
    """Its seed is a number, and tensors of a plan have none."""
    planner = Planner(CONFIG, Machine(device, 80 * 10**9))
    one = {"gpus": 1 if device == "cuda" else 0}
    plain = {"adapter": None} if blocks.get("adapter", 0) is None else {}
    (without,) = peaks(planner, job(resources=one, **plain)).values()
    (with_dropout,) = peaks(planner, job(resources=one, **blocks)).values()
    assert without <= with_dropout < 1.5 * without


def test_a_time_is_estimated_from_operations_and_a_devices_peak(roomy: Planner) -> None:
    spec = job()
    a_token = flops_a_token(roomy, spec)
    found = estimated(roomy, spec, "NVIDIA H200", rows=1000)
    speed = UTILISATION * 989.4e12 * 4 / a_token
    assert found["source"] == "estimated"
    assert found["tokens_per_s"] == pytest.approx(speed)
    rows = 1000  # of an epoch, without those that are held out
    assert found["seconds"] == pytest.approx(rows * 64 / speed)
    assert "20% of the peak of NVIDIA H200" in found["basis"]
    assert timed(found).startswith("about 0s at ")
    assert flops_a_token(roomy, job(adapter={"quantize_base": True})) == a_token, "the products are the same"
    assert flops_a_token(roomy, job(adapter=None)) > a_token, "all weights have gradients"
    dpo = estimated(roomy, job(recipe="dpo"), "NVIDIA H200", rows=1000)
    assert dpo["seconds"] is not None
    assert dpo["seconds"] > 2 * rows * 64 / speed, "pairs, and a reference's pass"
    one = {"gpus": 1}
    passes = flops_a_token(roomy, job(recipe="kto", resources=one)) / flops_a_token(roomy, job(resources=one))
    assert 1.5 < passes < 3, "three passes without gradients beside the policy's own"
    longer = estimated(roomy, job(training={"n_epochs": 3, "max_steps_per_epoch": 5}), "NVIDIA H200")
    assert longer["seconds"] == pytest.approx(3 * 5 * 8 * 4 * 64 / speed)


@pytest.mark.parametrize(
    ("device", "blocks", "why"),
    [
        (None, {}, "the peak of a CPU or an absent GPU is not known"),
        ("NVIDIA GeForce 9", {}, "the peak of NVIDIA GeForce 9 in bf16 is not known"),
        ("NVIDIA H200", {"training": {"dtype": "fp32"}}, "the peak of NVIDIA H200 in fp32 is not known"),
    ],
)
def test_a_time_that_nothing_tells(roomy: Planner, device: str | None, blocks: dict[str, Any], why: str) -> None:
    found = estimated(roomy, job(**blocks), device, rows=10)
    assert (found["seconds"], found["tokens_per_s"], found["source"]) == (None, None, None)
    assert why in found["basis"]
    assert timed(found) == f"time not known: {found['basis']}"


def test_a_speed_without_rows(roomy: Planner) -> None:
    found = estimated(roomy, job(), "NVIDIA H200")
    assert found["seconds"] is None
    assert "the number of rows is not known" in found["basis"]
    assert timed(found).startswith(f"time not known at {found['tokens_per_s']:,.0f} tokens/s (estimated from ")


@pytest.mark.parametrize(("written", "found"), [("80GB", 80 * 10**9), ("79.5 GiB", int(79.5 * 2**30)), ("1tb", 10**12)])
def test_sizes(written: str, found: int) -> None:
    assert bytes_of(written) == found


@pytest.mark.parametrize("written", ["80", "80 PB", "GB", "-1GB", "1e3GB", "0.01GB"])
def test_no_sizes(written: str) -> None:
    with pytest.raises(InvalidInput, match="--memory"):
        bytes_of(written)


def test_a_longer_context_is_built_or_refused_as_when_the_job_starts(roomy: Planner) -> None:
    asked = {"options": {"rope_scaling": {"factor": 4}}}
    longer = roomy.adapted(job(**asked)).model
    assert text_config(longer).rope_parameters["rope_type"] == "yarn"
    assert roomy.plan(job(**asked)).chosen is not None
    scaled = Planner(tiny_config("gpt_oss"), Machine("cuda", 80 * 10**9))
    with pytest.raises(MoeError, match=r"options\.rope_scaling: is not valid for this gpt_oss model"):
        scaled.plan(job(**asked))


def test_routers_alone_need_little_beside_the_weights(roomy: Planner) -> None:
    whole, alone = job(adapter=None), job(adapter=None, moe={"train_router_only": True})
    assert set(roomy.adapted(alone).report.by_group) == {"router"}
    assert roomy.estimate(alone, "ddp")[1] < 0.5 * roomy.estimate(whole, "ddp")[1]


def test_colocated_vllm_takes_its_share_of_the_gpu() -> None:
    reward = [{"grader": {"type": "length", "name": "short", "most": 9}}]
    body = {"recipe": "grpo", "model": "m", "data": {"dataset_id": "a"}, "reward": reward}
    engine = {"type": "vllm_colocate", "gpu_memory_utilization": 0.25}
    assert engine_bytes(JOB_SPEC.validate_python({**body, "rl": {"engine": engine}}), 80 * 10**9) == 20 * 10**9
    assert engine_bytes(JOB_SPEC.validate_python(body), 80 * 10**9) == 0
    planner = Planner(CONFIG, Machine("cuda", 80 * 10**9))
    here, elsewhere = (
        planner.estimate(JOB_SPEC.validate_python({**body, "rl": rl}), "ddp")[0] for rl in ({"engine": engine}, {})
    )
    assert here.peak_bytes - elsewhere.peak_bytes == 20 * 10**9
