"""Tries of graders, before any training: checks one, or runs it on an answer.

Nothing runs on the event loop. What needs no torch runs in a few threads, and its hostile part in processes with limits
of time and memory; what loads a model runs in the training interpreter, one at a time. Both have a deadline and a
bounded queue.
"""

import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import cast

from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.grader_names import GraderNames
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.wire_graders import (
    GraderErrors,
    GraderRun,
    GraderRunMetadata,
    RunGraderRequest,
    ValidatedGrader,
    ValidateGraderRequest,
)
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.executors.local import training_environment
from llama_stack_provider_moe.errors import InvalidInput, Unavailable
from llama_stack_provider_moe.graders.bench import Bench, Limits
from llama_stack_provider_moe.graders.document import GradeReport, RowReport, report_of
from llama_stack_provider_moe.graders.opening import check, open_grader
from llama_stack_provider_moe.graders.panel import Panel
from llama_stack_provider_moe.graders.request import GradeRequest, answered
from llama_stack_provider_moe.graders.samples import Sample
from llama_stack_provider_moe.ground import run
from llama_stack_provider_moe.spec.graders import AnyGrader, inside
from llama_stack_provider_moe.spec.judged_graders import LabelModel, ScoreModel
from llama_stack_provider_moe.spec.rewards import Grading, Reward
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.validation_errors import validated

MODULE = "llama_stack_provider_moe.compute.grading.command"
START_S = 30.0  # beside the deadline: a process that grades may have to start
_FLAGS = {
    "formula": "formula_parse_error", "unknown_name": "invalid_variable_error",
    "judge_answer": "model_grader_parse_error", "judge_refused": "model_grader_refusal_error",
    "judge_server": "model_grader_server_error", "deadline": "unresponsive_reward_error",
    "memory": "unresponsive_reward_error", "ended": "unresponsive_reward_error",
}  # fmt: skip


class GraderTries:
    """Checks graders and runs them on single answers.

    Args:
        config: the server's configuration.
        guard: runs the parts that may block.
        store: returns the store, for names of jobs.
        whose: returns the owner whose jobs the caller may name; None for every owner's.
    """

    def __init__(
        self, config: ProviderConfig, guard: Guard, store: Callable[[], JobStore], whose: Callable[[], str | None]
    ) -> None:
        self._config, self._guard, self._store, self._whose = config, guard, store, whose
        limits = config.graders
        self._light = Pool("moe-graders", limits.processes, limits.waiting, "tries of graders")
        self._heavy = Pool("moe-grader-models", 1, limits.waiting, "tries of graders that load a model")
        self._bench = Bench(Limits(limits.deadline_s, limits.memory_mb, limits.processes, retries=0))
        self._running: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()
        self._closed = False

    async def validate(self, body: object, size_bytes: int) -> ValidatedGrader:
        """Check a grader: its fields, and what it names."""
        asked = await self._guard.bodies.run(size_bytes, validated, ValidateGraderRequest, body)
        grader = await self._resolved(asked.grader)
        await self._guard.bodies.run(size_bytes, self._check, grader)
        low, high = (bound if math.isfinite(bound) else None for bound in asked.grader.limits())
        return ValidatedGrader(grader=asked.grader.model_dump(mode="json"), range=(low, high), runs=asked.grader.runs)

    async def run(self, body: object, size_bytes: int) -> GraderRun:
        """Run a grader on an answer."""
        asked = await self._guard.bodies.run(size_bytes, validated, RunGraderRequest, body)
        grader = await self._resolved(asked.grader)
        sample = Sample(asked.item, asked.model_sample, asked.output_tokens)
        began_s = time.monotonic()
        limits = self._config.graders
        if grader.runs == "torch":
            limit_s, pool, run = limits.model_deadline_s, self._heavy, self._with_torch
        else:
            await self._guard.bodies.run(size_bytes, self._check, grader)
            limit_s, pool, run = limits.deadline_s + START_S, self._light, self._without_torch
        late = f"the grader gave no value within {limit_s:g} s; try again, or a shorter answer"
        row = await pool.within(limit_s, late, run, grader, sample)
        return _answer(asked.grader, row, time.monotonic() - began_s)

    def close(self) -> None:
        """End the processes."""
        self._light.close()
        self._heavy.close()
        with self._changing:
            self._closed = True
            if self._running is not None:
                self._running.kill()
        self._bench.close()

    async def _resolved(self, grader: AnyGrader) -> AnyGrader:
        if all(each.runs in ("here", "child") for each in inside(grader)):
            return grader
        # Jobs that have not ended are refused: nobody waits for them here.
        names = GraderNames(Draft(None, may_wait=False), self._config, self._store(), self._whose())
        return await self._guard.in_job_paths("the grader's models", names.resolved, grader, "grader")

    def _check(self, grader: AnyGrader) -> None:
        check(grader, self._config.graders.judges)

    def _without_torch(self, grader: AnyGrader, sample: Sample) -> RowReport:
        rewards = [Reward(grader=grader)]
        opened = open_grader(grader, self._bench, self._config.graders.judges)
        try:
            graded = Panel(rewards, [opened], Grading()).grade([sample], limits_failures=False)
        finally:
            opened.close()
        return report_of(rewards, graded)["results"][0]

    def _with_torch(self, grader: AnyGrader, sample: Sample) -> RowReport:
        limits = self._config.graders
        grading = Grading(deadline_s=limits.deadline_s, memory_mb=limits.memory_mb, processes=limits.processes)
        asked = GradeRequest(
            reward=[Reward(grader=grader)], grading=grading, judges=limits.judges, answers=answered([sample])
        )
        with self._changing:
            if self._closed:
                raise Unavailable("the server is stopping")
            process = self._running = subprocess.Popen(
                run.command(self._config.training_python, MODULE),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=training_environment(os.environ, self._config), start_new_session=True,
            )  # fmt: skip
        try:
            said, complaint = process.communicate(asked.model_dump_json().encode(), limits.model_deadline_s)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the grader's model gave no value within {limits.model_deadline_s:g} s") from None
        finally:
            process.kill()
            process.wait()
            with self._changing:
                self._running = None
        if process.returncode != 0:
            why = complaint.decode(errors="replace").strip()[-500:] or f"exit code {process.returncode}"
            raise InvalidInput("grader", grader.name, f"a grader that the training environment can run ({why})")
        return cast(GradeReport, json.loads(said.splitlines()[-1]))["results"][0]


def _answer(grader: AnyGrader, row: RowReport, seconds: float) -> GraderRun:
    errors = GraderErrors(sample_parse_error=bool(row["bad_answer"]))
    for failure in row["failures"].values():
        flag = _FLAGS.get(failure["code"], "other_error")
        details = f"{failure['code']}: {failure['message']}"
        where = "model_grader_server_error_details" if flag == "model_grader_server_error" else "other_error_details"
        errors = errors.model_copy(update={flag: True, where: details})
    parts = row["parts"].get(grader.name, {})
    judges = [each.model for each in inside(grader) if isinstance(each, ScoreModel | LabelModel)]
    used = row["tokens"] or 0
    return GraderRun(
        reward=row["values"][grader.name],
        sub_rewards=parts,
        metadata=GraderRunMetadata(
            name=grader.name, type=grader.type, errors=errors, execution_time=seconds, scores=parts,
            token_usage=used if judges else None, sampled_model_name=judges[0] if judges else None,
        ),
        model_grader_token_usage_per_model={judges[0]: used} if len(set(judges)) == 1 else {},
    )  # fmt: skip
