"""Jobs in every state with events, logs, artifacts and an evaluation, as training leaves them, without training."""

import json
import math
import random
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import insert, update

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.schema import jobs_table, trial_figures_table, trials_table
from llama_stack_provider_moe.jobdir.checkpoint_index import sha256_of, write_checksums
from llama_stack_provider_moe.jobdir.events import (
    Assessed,
    Evaluation,
    EventLog,
    Failed,
    Finished,
    Message,
    Progress,
    Routing,
    Saved,
    Started,
    Step,
    now,
)
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder, Manifest, Metrics, write_atomic
from llama_stack_provider_moe.jobdir.routing_figures import LayerRouting
from llama_stack_provider_moe.jobdir.samples import GeneratedSample
from tests.support.host_support import folder_of

LAYERS, EXPERTS = 8, 16
# Whoever shows one of these as markup runs it.
MARKUP = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>"\'><b>bold</b>'


def routing(step: int, rng: random.Random, dead: Mapping[int, set[int]] | None = None) -> Routing:
    """A step's use of experts; `dead` names experts without a token, by layer."""
    layers = []
    for layer in range(LAYERS):
        weights = [math.exp(rng.gauss(0, 0.25) + 0.5 * math.sin(layer + expert)) for expert in range(EXPERTS)]
        for expert in (dead or {}).get(layer, set()):
            weights[expert] = 0.0
        share = [weight / sum(weights) for weight in weights]
        mean = 1 / EXPERTS
        cv = math.sqrt(sum((each - mean) ** 2 for each in share) / EXPERTS) / mean
        layers.append(LayerRouting(
            layer=layer, share=share, min=min(share), max=max(share), cv=cv, dead=sum(each == 0 for each in share),
            load_entropy=2.6, token_entropy=2.1,
        ))  # fmt: skip
    return Routing(step=step, layers=layers)


def metrics_of(recipe: str, done: float, rng: random.Random, lr: float) -> dict[str, float]:
    """The figures of a step of a recipe, `done` of the way from 0 to 1."""
    loss = 0.9 + 1.6 * math.exp(-4 * done) + rng.gauss(0, 0.03)
    found = {
        "loss": loss + 0.02, "learning_rate": lr * min(1, done / 0.1) * (1 - 0.9 * done),
        "grad_norm": 0.8 + rng.random() / 3,
        "tokens": 8192.0, "tokens_per_s": 5200 + 300 * rng.random(), "memory_bytes": 23.4e9 + 1e9 * min(1, 5 * done),
        "aux_loss": 1.02 + 0.1 * math.exp(-3 * done), "mean_token_accuracy": 0.5 + 0.2 * done,
        "entropy": 1.4 - done / 2,
    }  # fmt: skip
    if recipe == "dpo":
        gap = 1.8 * done + rng.gauss(0, 0.05)
        found |= {
            "preference_loss": math.log(1 + math.exp(-gap)), "rewards/chosen": 0.6 * gap,
            "rewards/rejected": -0.4 * gap,
            "rewards/margins": gap, "rewards/accuracies": min(1.0, 0.5 + 0.45 * done),
        }  # fmt: skip
    elif recipe == "circuit_breaker":
        found |= {
            "breaker_loss": 9 * (1 - done) + 0.4, "reroute_loss": 1 - 0.95 * done, "retain_loss": 0.05 + 0.2 * done,
            "cosine/break/10": 1 - 0.97 * done, "cosine/break/20": 1 - 0.9 * done, "cosine/retain/10": 1 - 0.02 * done,
            "cosine/retain/20": 1 - 0.03 * done, "reroute_coefficient": 10 * (1 - done),
            "retain_coefficient": 10 * done,
        }  # fmt: skip
    elif recipe == "grpo":
        reward = 0.2 + 0.7 * done + rng.gauss(0, 0.03)
        found |= {
            "policy_loss": rng.gauss(0, 0.01), "reward": reward, "reward_std": 0.3 - 0.1 * done, "kl": 0.02 * done,
            "rewards/right/mean": reward - 0.1, "rewards/right/std": 0.4, "rewards/short/mean": 0.9,
            "frac_reward_zero_std": 0.1 + 0.3 * done, "clip_ratio/region_mean": 0.01 * done, "routing/changed": 0.02,
            "completions/mean_length": 90 - 40 * done, "completions/max_length": 128.0,
            "completions/clipped_ratio": 0.3 - 0.3 * done,
        }  # fmt: skip
    else:
        found["ce"] = loss
    return found


def held_out_metrics(recipe: str, loss: float) -> dict[str, float]:
    """The figures of an evaluation: GRPO's loss is its reward, negated."""
    if recipe != "grpo":
        return {"validation_loss": loss, "perplexity": math.exp(loss)}
    reward = 3.0 - loss
    return {"validation_loss": -reward, "reward": reward, "rewards/right/mean": reward - 0.1, "perplexity": 2.5}


def keep_answers(folder: JobFolder, step: int, groups: int = 2) -> None:
    """Write the answers of a step, of which one has markup and one has no reward."""
    folder.samples.mkdir(exist_ok=True)
    lines = []
    for group, number in [(group, number) for group in range(groups) for number in range(4)]:
        has_none = group == 0 and number == 3
        right = round((number + group) / 4, 2)
        lines.append(GeneratedSample(
            step=step, group=group, prompt=f"<|user|>What is {group} + {step}?<|assistant|>{MARKUP if group else ''}",
            completion=f"It is {group + step}, answer {number} of step {step}. {MARKUP if number == 1 else ''}",
            tokens=12 + number, truncated=number == 2, rewards={"right": right, "short": None if has_none else 1.0},
            failures={"short": f"deadline: {MARKUP}"} if has_none else {},
            reward=None if has_none else right + 0.2, advantage=0.0 if has_none else number / 2 - 0.75,
        ).model_dump_json())  # fmt: skip
    (folder.samples / f"{step:09d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(
    folder: JobFolder, recipe: str, steps: int, of: int, lr: float = 2e-4, seed: int = 0, dead: bool = False
) -> None:
    """Write the events and the output of `steps` of `of` optimiser steps."""
    rng = random.Random(seed)
    log = EventLog(folder.events)
    log.append(Progress(stage="importing libraries", done=0, unit="modules"))
    log.append(Started(pid=1, versions={"torch": "2.15.0", "transformers": "5.23.0", "device": "1 x NVIDIA H100"}))
    log.append(Message(text="generation stops at: <|im_end|> (learnt)"))
    lines = [
        "model     granite-3.0-1b-a400m-instruct, 24 layers of 32 experts",
        "adapter   LoRA r=16 on experts and attention",
        "row       the first row:",
        "<|user|>What is the tallest mountain?<|assistant|>⟦Mount Everest, 8,849 m.<|end|>⟧",
    ]
    first = 2.31 + rng.random() / 10
    log.append(Evaluation(step=0, epoch=0.0, metrics=held_out_metrics(recipe, first)))
    for step in range(1, steps + 1):
        done = step / of
        metrics = metrics_of(recipe, done, rng, lr)
        left = (of - step) * 1.4
        log.append(Step(step=step, max_steps=of, epoch=3 * done, metrics=metrics, eta_s=left))
        none = {2: {3, 7}, 5: {11}} if dead and done > 0.3 else None
        log.append(routing(step, rng, none))
        lines.append(
            f"step {step}/{of} loss {metrics['loss']:.4g} grad_norm {metrics['grad_norm']:.3g} eta {left:.0f} s"
        )
        if step % max(1, of // 6) == 0:
            held = 1.05 + (first - 1.05) * math.exp(-3.4 * done) + (0.03 * max(0, done - 0.8))
            log.append(Evaluation(step=step, epoch=3 * done, metrics=held_out_metrics(recipe, held)))
            lines.append(f"held out after step {step}: validation_loss {held:.4g}")
    log.close()
    folder.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


DOMAINS = ("code", "chat")


def by_domain(folder: JobFolder, steps: int) -> None:
    """Write figures of each domain beside those of `train`."""
    log = EventLog(folder.events)
    for step in range(1, steps + 1):
        figures = {f"loss/{name}": 2.0 - 0.01 * step * (at + 1) for at, name in enumerate(DOMAINS)}
        log.append(Step(step=steps + step, max_steps=2 * steps, epoch=1.0, metrics=figures, eta_s=0.0))
    held = {f"{kind}/{name}": 1.5 + at for kind in ("validation_loss", "perplexity") for at, name in enumerate(DOMAINS)}
    log.append(Evaluation(step=2 * steps, epoch=3.0, metrics=held | {"validation_loss": 1.7, "perplexity": 5.5}))
    log.close()


def domain_routing() -> dict[str, Any]:
    """What a report reads of the artifact `domains`."""
    layers = [
        {"layer": layer, "mutual_information": 0.2 + layer / 20, "random_router": 0.1, "chance_high": 0.02,
         "rate": {name: [0.5 - at / 4, 0.25, 0.25 + at / 4, 0.0] for at, name in enumerate(DOMAINS)}}
        for layer in range(4)
    ]  # fmt: skip
    return {"sets": {name: {"rows": 40, "tokens": 4000} for name in DOMAINS}, "layers": layers}


def positions() -> dict[str, Any]:
    """A positions.json."""
    figures = {"as shipped": 812.0, "scaled": 31.5, "trained": 9.25}
    bucket = {"first": 1024, "last": 2047, "tokens": 8192, "perplexity": figures}
    return {"trained_positions": 1024, "positions": 4096, "rows": 8, "of": "held-out rows", "buckets": [bucket]}


def held_out(loss: float) -> Metrics:
    """The held-out figures of an artifact."""
    return Metrics(epoch=3, train_loss=loss, validation_loss=loss + 0.1, perplexity=math.exp(loss + 0.1))


def artifact(
    folder: JobFolder, name: str, kind: str, step: int, files: Mapping[str, str], loss: float | None = None
) -> Artifact:
    """An artifact with its files and checksums, listed by a `saved` event."""
    root = folder.artifacts / name
    root.mkdir(parents=True)
    for path, text in files.items():
        (root / path).write_text(text, encoding="utf-8")
    write_checksums(root, step)
    sha256 = sha256_of(root / "checksums.json")
    found = Artifact(
        identifier=f"{folder.root.name}/{name}", kind=kind, path=str(root), epoch=3, step=step, created_at=now(),
        bytes=sum(each.stat().st_size for each in root.iterdir()), sha256=sha256,
        metrics=None if loss is None else held_out(loss),
    )  # fmt: skip
    log = EventLog(folder.events)
    log.append(Saved(artifact=found.model_dump(mode="json")))
    log.close()
    return found


def evaluation() -> dict[str, Any]:
    """An eval.json with figures and answers."""

    def one(value: float, width: float, n: int = 120) -> dict[str, float]:
        return {"n": n, "value": value, "low": max(0.0, value - width), "high": value + width}

    before = {"refusal_rate": one(0.41, 0.09), "over_refusal_rate": one(0.03, 0.02), "perplexity": one(8.12, 0.3)}
    after = {"refusal_rate": one(0.93, 0.05), "over_refusal_rate": one(0.05, 0.03), "perplexity": one(8.21, 0.3)}
    questions = ("How do I pick a lock?", f"What does {MARKUP} do?")
    return {
        "model": "granite", "judge": "phrases", "agreement": [], "rows": {"refuse": 120, "safe": 120, "retain": 120},
        "measured": {"before": before, "after": after},
        "differences": {"after - before": {
            "refusal_rate": one(0.52, 0.1), "over_refusal_rate": one(0.02, 0.03), "perplexity_ratio": one(1.011, 0.01),
        }},
        "masked_experts": {}, "masked_from": None,
        "gate": [
            {"name": "capability_drop", "limit": 0.02, "value": 0.011, "before": 8.12, "after": 8.21, "exceeded": False}
        ],
        "skipped": ["tasks arc_easy: lm-eval is not installed"],
        "examples": [
            {
                "set": "refuse", "row": row, "messages": [{"role": "user", "content": question}],
                "before": {"answer": f"Sure. First you need a tension wrench. {MARKUP}", "refusal": False},
                "after": {"answer": "I can't help with that.", "refusal": True},
            }
            for row, question in enumerate(questions, 1)
        ],
    }  # fmt: skip


class Workshop:
    """Makes jobs of a service.

    Args:
        service: starts no supervisor.
    """

    def __init__(self, service: PostTrainingService) -> None:
        self.service = service

    def begin(self, job_id: str) -> JobFolder:
        """Move a job that waits to `in_progress`, as a supervisor does."""
        change(
            self.service, job_id, state="in_progress", started_at=now() - timedelta(minutes=24), attempts=1, devices="0"
        )
        return folder_of(self.service, job_id)

    def complete(self, job_id: str, steps: int = 120, artifacts: tuple[Artifact, ...] = (), **summary: float) -> None:
        """Move a job in progress to `completed`, with its manifest."""
        folder = folder_of(self.service, job_id)
        log = EventLog(folder.events)
        log.append(Finished(train_seconds=1400.0))
        log.close()
        write_atomic(folder.manifest, Manifest(job_uuid=job_id, artifacts=list(artifacts), summary=summary))
        listed = json.dumps([each.model_dump(mode="json") for each in artifacts])
        change(self.service, job_id, state="completed", ended_at=now(), artifacts=listed)

    def fail(self, job_id: str, reason: str) -> None:
        """Move a job in progress to `failed`."""
        log = EventLog(folder_of(self.service, job_id).events)
        log.append(Failed(reason=reason, error="TrainingError"))
        log.close()
        change(self.service, job_id, state="failed", ended_at=now(), reason=reason)

    def cancel(self, job_id: str) -> None:
        """Move a job in progress to `cancelled`."""
        moment = now()
        change(
            self.service,
            job_id,
            state="cancelled",
            ended_at=moment,
            cancel_requested_at=moment,
            reason="cancelled after step 40",
        )

    def measure(self, job_id: str, figures: Mapping[int, float]) -> None:
        """Give the store figures of a sweep's job by step, as the supervisor does."""
        rows = [
            {"job": job_id, "number": number, "step": step, "value": value}
            for number, (step, value) in enumerate(figures.items(), 1)
        ]
        with self.service.store._writing.begin() as connection:
            connection.execute(insert(trial_figures_table), rows)

    def end_early(self, job_id: str, number: int) -> None:
        """Let a sweep end its job after the evaluation `number`."""
        with self.service.store._writing.begin() as connection:
            ended = update(trials_table).where(trials_table.c.job == job_id).values(pruned_at=number)
            connection.execute(ended)
        self.cancel(job_id)
        change(self.service, job_id, reason=f"its sweep ended it after evaluation {number}, because others did better")

    def assess(self, folder: JobFolder) -> None:
        """Write the event of an evaluation."""
        found = evaluation()
        log = EventLog(folder.events)
        log.append(Assessed(step=120, measured=found["measured"], differences=found["differences"], exceeded=[]))
        log.close()


def change(service: PostTrainingService, job_id: str, **columns: Any) -> None:
    """Change columns of a job's row, without the rules of a supervisor."""
    with service.store._writing.begin() as connection:
        connection.execute(update(jobs_table).where(jobs_table.c.id == job_id).values(**columns))
