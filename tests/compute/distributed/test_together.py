"""Laws of jobs in two processes: their results equal those of one process, and each resumes the other's checkpoints.

They run below a real supervisor (`tests.support.together`).
"""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, STOPPED
from llama_stack_provider_moe.control.supervisor.processes import birth, with_environment
from llama_stack_provider_moe.jobdir.checkpoint_index import valid_checkpoints
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.alike import assert_alike, curve
from tests.support.chosen import OnDemand, few
from tests.support.together import Office, office
from tests.support.training_support import Run, Workshop, domains_of, dpo_rows, kept_rows, said, sft_rows, workshop

__all__ = ["workshop"]

TWO = {"gpus": 0, "processes": 2}
APART = {**TWO, "strategy": "ep"}
# Greatest measured difference of a final weight: 2.8e-5 (dpo, from the start; Adam first divides by small numbers),
# 4.5e-6 (sft-aux-free), at most 1e-6 (others). Weights change by some 1e-2.
ATOL = 1e-4
# 17 rows in steps of 8: one process gets nothing of an epoch's last row. One process takes micro-batches of `batch`
# rows, two of half as many each.
CASES: dict[str, dict[str, Any]] = {
    "sft": {"recipe": "sft", "family": "granitemoe", "batch": 4, "rows": sft_rows(17),
            "training": {"gradient_accumulation_steps": 2}, "options": {"lr_scheduler": "cosine"},
            "moe": {"train_router": True, "router_z_loss_coef": 0.01, "router_aux_loss_coef": 0.1}},
    # A bias changes by the sign of a load: one token counted in only one process would reverse it.
    "sft-aux-free": {"recipe": "sft", "family": "deepseek_v3", "batch": 8, "rows": sft_rows(17),
                     "adapter": {"rank": 4, "quantize_base": True},
                     "moe": {"moe_load_balancing": "aux_free", "router_bias_rate": 0.05}},
    "sft-whole": {"recipe": "sft", "family": "qwen3_moe", "batch": 8, "adapter": None, "optimizer": {"lr": 1e-3},
                  "efficiency": {"enable_activation_checkpointing": True}, "rows": sft_rows(17)},
    "sft-router": {"recipe": "sft", "family": "granitemoe", "batch": 8, "adapter": None, "optimizer": {"lr": 1e-3},
                   "moe": {"train_router_only": True}, "rows": sft_rows(17)},
    "dpo": {"recipe": "dpo", "family": "mixtral", "batch": 8, "rows": dpo_rows(17),
            "moe": {"moe_load_balancing": "gshard", "router_aux_loss_coef": 0.1}},
    # 7 pairs in steps of 4, so one step has 3, and one process gets none of the last; 5 held out, of unequal lengths.
    "dpo-uneven": {"recipe": "dpo", "family": "granitemoe", "batch": 2, "rows": dpo_rows(7),
                   "validation": dpo_rows(5, first=41), "training": {"gradient_accumulation_steps": 2},
                   "moe": {"router_z_loss_coef": 0.05, "router_aux_loss_coef": 0, "train_router": True}},
    # An epoch has 24 rows of one domain and 8 of the other, whose 5 rows repeat; 5 and 2 are held out.
    "dpo-domains": {"recipe": "dpo", "family": "granitemoe", "batch": 4, "domains": domains_of("dpo"),
                    "training": {"gradient_accumulation_steps": 2}},
    "sft-domains": {"recipe": "sft", "family": "granitemoe", "batch": 8, "domains": domains_of("sft")},
    # Of a pair's two rewards; the head is drawn by each process.
    "reward": {"recipe": "reward", "family": "mixtral", "batch": 4, "rows": dpo_rows(17), "center_rewards": 0.1,
               "training": {"gradient_accumulation_steps": 2}, "moe": {"router_aux_loss_coef": 0.1}},
    # The teacher is the model with its adapter off.
    "sft-distill": {"recipe": "sft", "family": "mixtral", "batch": 4, "rows": sft_rows(17),
                    "distill": {"weight": 0.5, "temperature": 2}, "training": {"gradient_accumulation_steps": 2}},
    "circuit-breaker": {"recipe": "circuit_breaker", "family": "mixtral", "batch": 4, "optimizer": {"lr": 2e-2},
                        "rows": sft_rows(9),
                        "circuit_breaker": {"target_layers": "0",
                                            "retain": {"dataset_id": "a", "ratio": 1.5, "validation_dataset_id": "b"},
                                            "safe": {"dataset_id": "c", "validation_dataset_id": "d"}}},
}  # fmt: skip
# A breaker's first step has no gradient (the model is its base); Adam would scale its rounding to full steps.
FIRST = ["sft", "dpo-uneven", "sft-aux-free", "sft-distill", "reward"]
FROM_THE_START = few([*FIRST, *(case for case in CASES if case not in (*FIRST, "circuit-breaker"))], len(FIRST))
RESUMED = few(["dpo", "sft-domains", "sft", "circuit-breaker", "reward"], 2)


def job(workshop: Workshop, case: str, processes: int, **more: Any) -> JobFolder:
    """The folder of a job of two epochs."""
    settings = {**CASES[case], **more}
    batch = settings.pop("batch") // processes
    training = {**CASES[case].get("training", {}), **settings.pop("training", {})}
    settings["training"] = {"n_epochs": 2, "batch_size": batch, **training}
    settings.setdefault("resources", TWO if processes == 2 else {})
    return workshop.job(settings.pop("recipe"), settings.pop("family"), **settings)


def after_an_epoch(
    workshop: Workshop, run: Run, case: str, processes: int, batch: int | None = None, **resources: Any
) -> JobFolder:
    """A job in the state of `run` after its first epoch, to resume with this number of processes."""
    folder = workshop.copied(run)
    shutil.rmtree(folder.root / "checkpoints" / "epoch-2")
    spec = json.loads(folder.spec.read_text())
    spec["resources"] = {"gpus": 0, "processes": processes, **resources}
    spec["training"]["batch_size"] = (batch or CASES[case]["batch"]) // processes
    folder.spec.write_text(json.dumps(spec))
    return folder


class Ran(NamedTuple):
    """Runs by their case, each made when a test first asks for it."""

    one: OnDemand[Run]
    two: OnDemand[Run]
    one_then_two: OnDemand[Run]


@pytest.fixture(scope="module")
def desk(workshop: Workshop) -> Iterator[Office]:
    """Runs the jobs of two processes."""
    with office(workshop) as made:
        yield made


@pytest.fixture(scope="module")
def ran(workshop: Workshop, desk: Office) -> Ran:
    """All runs except those that are interrupted."""

    def alone(case: str) -> Run:
        found = workshop.again(Run(job(workshop, case, 1), 0))
        assert found.exit_code == COMPLETED, found.reason
        return found

    one = OnDemand(alone)
    return Ran(one, OnDemand(lambda case: run(desk, job(workshop, case, 2))),
               OnDemand(lambda case: run(desk, after_an_epoch(workshop, one[case], case, 2))))  # fmt: skip


def run(desk: Office, folder: JobFolder) -> Run:
    """The run of a job, from its submission to its end."""
    desk.submit(folder)
    return desk.ended(folder)


def biases(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "router_bias.safetensors"))


@pytest.mark.parametrize("case", FROM_THE_START)
def test_two_processes_leave_the_same_as_one(ran: Ran, case: str) -> None:
    assert_alike(ran.two[case], ran.one[case], atol=ATOL)


@pytest.mark.parametrize("case", RESUMED)
def test_two_processes_resume_the_checkpoint_of_one(ran: Ran, case: str) -> None:
    run = ran.one_then_two[case]
    assert [event.checkpoint for event in run.events("resumed")] == ["epoch-1"]
    assert_alike(run, ran.one[case], atol=ATOL)


@pytest.mark.parametrize("case", few(["dpo", "sft"], 1))
def test_one_process_resumes_the_checkpoint_of_two(workshop: Workshop, ran: Ran, case: str) -> None:
    run = workshop.again(Run(after_an_epoch(workshop, ran.two[case], case, 1), 0))
    assert [event.checkpoint for event in run.events("resumed")] == ["epoch-1"]
    assert any("start from new random states" in event.text for event in run.events("message"))
    assert_alike(run, ran.one[case], atol=ATOL)


@pytest.mark.parametrize("case", few(["sft", "dpo"], 1))
def test_a_sharded_base_leaves_the_same_as_a_whole_one(workshop: Workshop, desk: Office, ran: Ran, case: str) -> None:
    """The base's weights are read in parts; checkpoints are whole adapters, from which one process resumes."""
    more = {"options": {"precompute_ref_log_probs": False}} if case == "dpo" else {}
    shared = run(desk, job(workshop, case, 2, resources={**TWO, "strategy": "fsdp"}, **more))
    assert "base      sharded over 2 processes (FSDP2)" in shared.folder.output.read_text()
    alone = ran.one[case] if case == "sft" else workshop.again(Run(job(workshop, case, 1, **more), 0))
    assert_alike(shared, alone, ATOL)
    folder = after_an_epoch(workshop, shared, case, 1)
    assert_alike(workshop.again(Run(folder, 0)), alone, ATOL)
    assert_alike(run(desk, after_an_epoch(workshop, alone, case, 2, strategy="fsdp")), alone, ATOL)


@pytest.mark.parametrize("case", few(["dpo", "sft", "sft-whole"], 1))
def test_shared_experts_leave_the_same_as_whole_ones(workshop: Workshop, desk: Office, ran: Ran, case: str) -> None:
    """Each process reads, trains and restores half of the experts; checkpoints contain all of them."""
    more = {"options": {"precompute_ref_log_probs": False}} if case == "dpo" else {}
    apart = run(desk, job(workshop, case, 2, resources=APART, **more))
    assert "each of 2 processes holds 2 of 4 experts per layer; " in apart.folder.output.read_text()
    alone = ran.one[case] if not more else workshop.again(Run(job(workshop, case, 1, **more), 0))
    assert apart.resolved["adapter"] == alone.resolved["adapter"], "the report describes the whole model"
    assert_alike(apart, alone, ATOL)
    if case == "dpo":
        return
    assert_alike(workshop.again(Run(after_an_epoch(workshop, apart, case, 1), 0)), alone, ATOL)
    assert_alike(run(desk, after_an_epoch(workshop, alone, case, 2, strategy="ep")), alone, ATOL)


@pytest.mark.parametrize("strategy", few(["fsdp", "ep"], 1))
def test_domains_are_the_same_if_processes_share_the_model(
    workshop: Workshop, desk: Office, ran: Ran, strategy: str
) -> None:
    """Also the analysis at the end, for which every process has to compute."""
    shared = run(desk, job(workshop, "sft-domains", 2, resources={**TWO, "strategy": strategy}))
    alone = ran.one["sft-domains"]
    assert_alike(shared, alone, ATOL)
    reports = [json.loads((each.folder.domains / "routing.json").read_text()) for each in (shared, alone)]
    assert reports[0]["sets"] == reports[1]["sets"]


def test_a_breaker_with_distributed_experts(workshop: Workshop, desk: Office, ran: Ran) -> None:
    """If one process has more held-out rows, the other takes part in its passes."""
    folder = after_an_epoch(workshop, ran.one["circuit-breaker"], "circuit-breaker", 2, strategy="ep")
    assert_alike(run(desk, folder), ran.one["circuit-breaker"], ATOL)


def test_a_bias_changes_by_the_load_in_both_processes(ran: Ran) -> None:
    one, two = (biases(run.folder.adapter) for run in (ran.one["sft-aux-free"], ran.two["sft-aux-free"]))
    assert all(torch.equal(two[name], bias) for name, bias in one.items())
    assert any(bias.abs().max() > 0.04 for bias in one.values())


def test_a_cancelled_job_resumes_bitwise(workshop: Workshop, desk: Office) -> None:
    """With dropout and noise that differ between processes: each process restores its random state."""
    noisy = {"training": {"n_epochs": 4}, "moe": {"expert_dropout": 0.1, "router_jitter": 0.1, "train_router": True}}
    unbroken = run(desk, job(workshop, "sft", 2, **noisy))
    folder = desk.cancelled(lambda: job(workshop, "sft", 2, **noisy), 4)
    assert (unbroken.exit_code, desk.ended(folder).exit_code) == (COMPLETED, STOPPED)
    assert not with_environment("MOE_JOB_FOLDER", str(folder.root))
    (step,) = {event.step for event in Run(folder, 0).events("cancelled")}
    assert desk.job(folder).reason == f"cancelled at step {step}, after saving a checkpoint"
    desk.resume(folder)
    resumed = desk.ended(folder)
    assert resumed.exit_code == COMPLETED, resumed.reason
    assert [event.step for event in resumed.events("resumed")] == [step], "all stopped after one step, and saved it"
    mine, theirs = resumed.final(), unbroken.final()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert curve(resumed) == curve(unbroken)
    folder = valid_checkpoints(resumed.folder, resumed.folder.read_spec())[0]
    states = [torch.load(folder / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in (0, 1)]
    assert not torch.equal(*states), "the processes draw different numbers"


@pytest.mark.parametrize("strategy", few(["ep", "ddp"], 1))
def test_a_job_that_loses_a_process_resumes_and_completes(workshop: Workshop, desk: Office, strategy: str) -> None:
    experts_alone: dict[str, Any] = {"adapter": {"rank": 4, "lora_attn_modules": []}, "moe": {}}
    more: dict[str, Any] = {"training": {"n_epochs": 4}, **(experts_alone if strategy == "ep" else {})}
    folder = job(workshop, "sft", 2, resources={**TWO, "strategy": strategy}, **more)
    desk.submit(folder)
    desk.after_steps(folder, 5)  # an epoch has been saved
    pids = desk.ranks(folder)
    os.kill(pids[1], signal.SIGKILL)
    run = desk.ended(folder)
    known = desk.job(folder)
    assert (known.state, known.lost, known.attempts) == (JobState.COMPLETED, 1, 2), known.reason
    assert "process 1 of 2 was killed by SIGKILL" in folder.output.read_text()
    assert not run.events("failed"), "an error that the other process's end caused is not a reason"
    assert [event.step > 0 for event in run.events("resumed")] == [True]
    assert all(birth(pid) is None for pid in pids.values())
    alone = workshop.again(Run(job(workshop, "sft", 1, **more), 0))
    assert_alike(run, alone, atol=ATOL)


def test_a_checkpoint_of_another_batch_is_refused(workshop: Workshop, desk: Office, ran: Ran) -> None:
    folder = after_an_epoch(workshop, ran.one["dpo"], "dpo", 2, batch=16)
    assert run(desk, folder).exit_code == FAILED
    reason = str(desk.job(folder).reason)
    assert reason.startswith("epoch-1 has steps of 8 rows, and this start has steps of 16"), reason


def test_the_plan_and_the_log_name_the_processes(ran: Ran) -> None:
    run = ran.two["sft"]
    assert run.resolved["processes"] == 2
    assert run.events("started")[0].versions["device"].startswith("2 x CPU")
    log = run.folder.output.read_text()
    assert "fp32 on cpu, 2 processes)" in log
    assert log.count("steps     6:") == 1, "only one process prints what both know"
    assert len(run.events("plan")) == 1
    assert [artifact.kind for artifact in run.manifest.artifacts] == ["checkpoint", "checkpoint", "adapter"]


def test_bad_rows_are_named_as_in_one_process(workshop: Workshop, desk: Office) -> None:
    """Only rank 0 reads them; the broken connections of the others are not a reason."""
    long = [{"messages": [said("user", "word " * 200), said("assistant", "Yes.")]}]
    folder = job(workshop, "sft", 2, rows=[*sft_rows(3), *long])
    assert run(desk, folder).exit_code == FAILED
    reason = str(desk.job(folder).reason)
    assert reason.startswith("dataset 'train': 1 of 4 rows (25.0%) would be left out, more than options."), reason
    assert "row 4: no token to learn" in reason
    assert "process" not in reason
    assert len(Run(folder, 0).events("failed")) == 1


def test_one_evaluates_while_the_others_wait(workshop: Workshop, desk: Office) -> None:
    measured = {}
    for processes in (1, 2):
        folder = JobFolder(workshop.next_folder("sft"))
        folder.rows("eval-retain").parent.mkdir(parents=True)
        folder.rows("eval-retain").write_text("".join(json.dumps(row) + "\n" for row in kept_rows(5)))
        asked = {"eval": {"retain_dataset_id": "retain", "resamples": 200, "fail_if": {"capability_drop": 0.0}},
                 "optimizer": {"lr": 0.2}}  # fmt: skip
        assert job(workshop, "sft-whole", processes, **asked).root == folder.root
        done = workshop.again(Run(folder, 0)) if processes == 1 else run(desk, folder)
        assert done.exit_code == FAILED, "with such a learning rate it forgets"
        assert "eval.fail_if" in done.reason
        assert [event.artifact["kind"] for event in done.events("saved")][-2:] == ["model", "evaluation"]
        measured[processes] = done.events("assessed")[0].measured["before"]["perplexity"]
    assert measured[2] == pytest.approx(measured[1], rel=1e-5)
