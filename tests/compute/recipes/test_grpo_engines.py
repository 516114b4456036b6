"""Laws of GRPO with a vLLM server: what it has, what it says, and what happens when it fails."""

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llama_stack_provider_moe.compute.recipes.grpo.answering import AnsweringTrainer
from llama_stack_provider_moe.compute.recipes.grpo.engines import Sampling
from llama_stack_provider_moe.compute.recipes.grpo.policy_folder import alone_in
from llama_stack_provider_moe.compute.recipes.grpo.vllm_server import VllmServer, server_named
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, STOPPED
from llama_stack_provider_moe.errors import EngineFailed
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.engines_config import ENGINES, ENGINES_VARIABLE, EngineConfig
from llama_stack_provider_moe.spec.rl_engines import VllmServerEngine
from tests.support.chosen import few
from tests.support.free_ports import free_port
from tests.support.small_vllm import KEY, SmallVllm
from tests.support.tiny_models import VOCAB_SIZE
from tests.support.training_support import Run, Workshop, prompt_rows, workshop

__all__ = ["workshop"]

IDS = [5, 60, 70, 80, 90, 100, 110, 33]
HAS_E = {"grader": {"type": "regex", "name": "graded", "pattern": "e"}}


@pytest.fixture(scope="module")
def process() -> Iterator[SmallVllm]:
    found = SmallVllm(free_port())
    yield found
    found.close()


@pytest.fixture
def server(process: SmallVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallVllm]:
    """A process that starts servers; the operator names them `small`."""
    engine = EngineConfig(url=process.url, weights_dir=tmp_path, key_variable="SMALL_VLLM_KEY")
    monkeypatch.setenv("SMALL_VLLM_KEY", KEY)
    monkeypatch.setenv(ENGINES_VARIABLE, ENGINES.dump_json({"small": engine}).decode())
    yield process
    process.stop()


def short(workshop: Workshop, family: str, rl: dict[str, Any] | None = None, rows: int = 8, **blocks: Any) -> Run:
    """A job of two steps (four prompts with two answers each) whose answers the server writes."""
    chosen = {"type": "vllm_server", "server": "small", "deadline_s": 120, **(rl or {}).pop("engine", {})}
    if chosen["type"] != "vllm_server":
        del chosen["server"], chosen["deadline_s"]
    given = {
        "options": {"eval_before_training": False, "validation_split": 0},
        "data": {"validation_dataset_id": None},
        **blocks,
    }
    return workshop.run(
        "grpo", family, prompt_rows(rows), reward=[HAS_E], rl={"engine": chosen, **(rl or {})}, **given
    )  # fmt: skip


def differences(server: SmallVllm, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Gets, after each time that the server took weights, how far its logits are from the policy's."""
    found: list[float] = []
    synchronise = AnsweringTrainer._synchronise

    def compared(trainer: Any, prompt: Any) -> None:
        synchronise(trainer, prompt)
        with torch.no_grad():
            own = trainer.model(torch.tensor([IDS])).logits[0]
        found.append(float((own - torch.tensor(server.logits(IDS))).abs().max()))

    monkeypatch.setattr(AnsweringTrainer, "_synchronise", compared)
    return found


@pytest.mark.parametrize(
    ("family", "whole"),
    few(
        [
            ("mixtral", True),
            ("granitemoe", False),
            ("qwen3_moe", False),
            ("gpt_oss", False),
            ("gpt_oss", True),
            ("deepseek_v3", False),
            ("qwen3_5_moe", False),
        ],
        1,
    ),
)
def test_the_server_has_the_policys_weights_after_every_step(
    workshop: Workshop, server: SmallVllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, whole: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whether experts are one tensor each on disk, or fused; the adapter is on experts too."""
    server.start(workshop.model(family))
    start = torch.tensor(server.logits(IDS))
    found = differences(server, monkeypatch)
    blocks: dict[str, Any] = {"adapter": None} if whole else {}
    run = short(workshop, family, **blocks)
    assert run.exit_code == COMPLETED, run.reason
    assert len(found) == 1 + 2, "a try, and each of two generations"
    assert max(found) < 1e-5
    assert (torch.tensor(server.logits(IDS)) - start).abs().max() > 1e-3
    assert max(run.steps("sampling/sampling_logp_difference/max")) < 1e-5
    assert run.steps("sampling/importance_sampling_ratio/mean") == pytest.approx([1, 1], abs=1e-5)
    assert f"engine    vLLM server 'small' at {server.url}, which runs {workshop.model(family)}; before " \
        in capfd.readouterr().out  # fmt: skip
    assert run.resolved["rl"]["engine"]["server"] == "small"
    assert not list(tmp_path.glob("policy*"))


@pytest.mark.wide
def test_a_job_goes_on_bitwise_with_a_server_that_was_started_again(
    workshop: Workshop, server: SmallVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the server died among the answers to a generation, or the job was lost, or stopped while it waited."""
    model = workshop.model("qwen3_moe")
    server.start(model)
    unbroken = short(workshop, "qwen3_moe", rows=4, training={"n_epochs": 2})
    assert unbroken.exit_code == COMPLETED, unbroken.reason
    server.start(model, dies_at=9)  # a try; a try and four prompts; a try, and the second prompt of the second step
    back = threading.Thread(target=_start_when_gone, args=(server, model))
    back.start()
    survived = short(workshop, "qwen3_moe", rows=4, training={"n_epochs": 2})
    back.join()
    assert survived.exit_code == COMPLETED, survived.reason
    server.start(model)
    copied = workshop.copied(unbroken)
    last = max((copied.root / "checkpoints").glob("*-*"), key=lambda each: each.name)
    shutil.rmtree(last)
    resumed = workshop.again(Run(copied, 0))
    assert resumed.exit_code == COMPLETED, resumed.reason
    server.start(model, hangs_at=9)
    with monkeypatch.context() as patched:
        asked_s = _stop_at_first_answers(patched, generation=2)
        stopped = short(workshop, "qwen3_moe", rows=4, training={"n_epochs": 2})
    assert stopped.exit_code == STOPPED, stopped.reason
    assert time.monotonic() - asked_s[0] < 30, "it waited for an answer"  # rl.engine.deadline_s is 120
    assert [event.step for event in stopped.events("cancelled")] == [1]
    server.start(model)
    went_on = workshop.again(stopped)
    assert went_on.exit_code == COMPLETED, went_on.reason
    for each in (survived, resumed, went_on):
        assert each.adapter().keys() == unbroken.adapter().keys()
        assert all(torch.equal(tensor, unbroken.adapter()[name]) for name, tensor in each.adapter().items())


def _stop_at_first_answers(patched: pytest.MonkeyPatch, generation: int) -> list[float]:
    """Ask the job to stop once a prompt of a generation has its answers; gets the time of that."""
    advance, asked_s, firsts = liveness.Counter.advance, [], []

    def advancing(counter: liveness.Counter, count: int = 1) -> None:
        advance(counter, count)
        if counter.work[:2] == ("generating", 1) and counter.work.unit == "prompts":
            firsts.append(counter)
            if len(firsts) == generation:
                asked_s.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)

    patched.setattr(liveness.Counter, "advance", advancing)
    return asked_s


def _start_when_gone(server: SmallVllm, model: Path) -> None:
    while True:
        try:
            httpx.get(f"{server.url}/health")
            time.sleep(0.05)
        except httpx.TransportError:
            server.start(model)
            return


def test_routes_of_the_server_are_replayed(workshop: Workshop, server: SmallVllm) -> None:
    """Prompts differ in length, and the first layer has no router: a shift would be seen as other experts."""
    server.start(workshop.model("glm4_moe"), routes=True)
    run = short(workshop, "glm4_moe", {"routing_replay": "rollout", "n_iterations": 2}, optimizer={"lr": 3e-2})
    assert run.exit_code == COMPLETED, run.reason
    changed = run.steps("routing/changed")
    assert changed[0] == changed[2] == 0 < max(changed)


@pytest.mark.wide
def test_a_server_that_keeps_its_weights_or_returns_no_routes_ends_the_job(
    workshop: Workshop, server: SmallVllm
) -> None:
    server.start(workshop.model("qwen3_moe"), keeps_weights=True)
    kept = short(workshop, "qwen3_moe", {"engine": {"max_mismatch": 1e-4}}, optimizer={"lr": 3e-2})
    assert kept.exit_code == FAILED
    assert "does not speak as the policy: log-probabilities of a try differ by" in kept.reason
    assert len(kept.events("step")) == 1
    server.start(workshop.model("qwen3_moe"))
    without = short(workshop, "qwen3_moe", {"routing_replay": "rollout"})
    assert without.exit_code == FAILED
    assert "rl.routing_replay: vLLM at" in without.reason
    assert "start it with --enable-return-routed-experts" in without.reason
    assert not without.events("step")


def test_colocated_vllm_needs_its_package(workshop: Workshop) -> None:
    found = short(workshop, "qwen3_moe", {"engine": {"type": "vllm_colocate", "gpu_memory_utilization": 0.4}})
    assert "rl.engine: 'vllm_colocate' needs the package vllm" in found.reason
    assert "pip install 'trl[vllm]'" in found.reason


SAMPLING = Sampling(answers=2, temperature=1.0, top_p=0.9, most_tokens=4, ends=[1], seeds=[3, 4])
ONE = {"prompt_token_ids": IDS, "token_ids": [7, 8], "logprobs": {"token_logprobs": [-1.0, -2.0]}}


def engine(server: SmallVllm, **fields: Any) -> VllmServer:
    chosen = VllmServerEngine.model_validate({"type": "vllm_server", "server": "small", "deadline_s": 600, **fields})
    return VllmServer(chosen, server_named(chosen), VOCAB_SIZE, 96, lambda: None)


@pytest.mark.parametrize(
    ("asked", "words"),
    few(
        [
            ({"dev_mode": False}, "start it with VLLM_SERVER_DEV_MODE=1"),
            ({"logprobs_mode": "raw_logprobs"}, "has --logprobs-mode raw_logprobs; expected processed_logprobs"),
            ({"max_model_len": 64}, "options.max_length: 96 tokens don't fit"),
            ({"body": "<html>"}, "answered /v1/completions with '<html>'; expected a JSON object"),
            ({"body": {"choices": []}}, "gave 0 answers to a prompt; expected 2"),
            ({"choice": {**ONE, "token_ids": [7, 400]}}, "gave token 400; expected ids below 384"),
            ({"choice": {**ONE, "token_ids": [7]}}, "gave 1 tokens with 2 log-probabilities"),
            ({"choice": {**ONE, "token_ids": None}}, "gave an answer that can't be read"),
            ({"choice": {**ONE, "prompt_token_ids": [1]}}, "its prompt is another than the one that was sent"),
            ({"choice": {**ONE, "logprobs": {"token_logprobs": [0.7, -1]}}}, "is above 0 or infinite"),
        ],
        2,
    ),
)
def test_a_server_that_is_of_no_use_is_named(
    workshop: Workshop, server: SmallVllm, asked: dict[str, Any], words: str
) -> None:
    server.start(workshop.model("qwen3_moe"), **asked)
    with pytest.raises(EngineFailed, match=re.escape(words)), closing(engine(server)) as found:
        found.generate([IDS, IDS], SAMPLING, lambda: None)


def test_a_server_that_hangs_or_is_gone_or_refuses_ends_within_the_deadline(
    workshop: Workshop, server: SmallVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampling = workshop.model("qwen3_moe"), replace(SAMPLING, seeds=[3])
    server.start(model, hangs_at=1)
    with closing(engine(server)) as patient, pytest.raises(EngineFailed, match=r"refused /collective_rpc with 500: "):
        patient.take(workshop.model("granitemoe"))
    with closing(engine(server, deadline_s=3)) as found:
        with pytest.raises(EngineFailed, match=r"did not answer /v1/completions within 3 s \(rl.engine.deadline_s\)"):
            found.generate([IDS], sampling, lambda: None)
        server.stop()
        with pytest.raises(EngineFailed, match=r"can't be reached .*, and was not back within 3 s"):
            found.generate([IDS], sampling, lambda: None)
    monkeypatch.setenv("SMALL_VLLM_KEY", "another")
    server.start(model)
    with closing(engine(server)) as found, pytest.raises(EngineFailed, match=r"refused /v1/completions with 401"):
        found.generate([IDS], sampling, lambda: None)


def test_one_job_at_a_time_uses_a_server(tmp_path: Path) -> None:
    """Else each would have the other's weights."""
    with (
        alone_in(tmp_path, "small", 1),
        pytest.raises(EngineFailed, match=r"another job uses the server 'small', and did not end within 0\.2 s"),
        alone_in(tmp_path, "small", 0.2),
    ):
        pass
    with alone_in(tmp_path, "small", 0.2) as folder:
        assert folder.parent == tmp_path
    with pytest.raises(EngineFailed, match=r"engines.small.weights_dir: .*No such file"), \
            alone_in(tmp_path / "absent", "small", 1):  # fmt: skip
        pass
