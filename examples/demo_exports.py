"""Exports of the demo's DPO job: a merged model, and GGUF files of the types F16, Q8_0 and Q4_K_M, each verified."""

from typing import Any

from demo_screen import DemoFailed, say
from demo_server import PATIENCE_S, Stack, patiently

from llama_stack_provider_moe.client.documents import Artifact, ExportStep, Job, progress_of
from llama_stack_provider_moe.control.cli.follow import Follower
from llama_stack_provider_moe.control.cli.show import size

TYPES = ("f16", "q8_0", "q4_k_m")
EXPORT = {"merged": True, "gguf": [*TYPES]}


def exported(stack: Stack, job: Job) -> dict[str, Artifact]:
    """Follow the export that started when `job` completed, and print what was written and verified.

    Returns:
        The artifacts of the job, by name.

    Raises:
        DemoFailed: a step did not complete, or an artifact is missing.
    """
    job_id = job["job_uuid"]
    exports = progress_of(patiently(lambda: stack.server.status(job_id))).get("exports", [])
    if len(exports) != 1:
        raise DemoFailed(f"{job_id} has {len(exports)} exports; expected the one that its job asked for")
    name = exports[0]["job_uuid"]
    stack.submitted.append(name)  # so that it is cancelled if the demo is interrupted
    states: dict[str, str] = {}
    for status in Follower(stack.server, name, say, poll_s=2, patience_s=PATIENCE_S).statuses():
        for step in [step for each in progress_of(status).get("exports", ()) for step in each["steps"]]:
            if states.get(step["name"]) != step["state"]:
                states[step["name"]] = step["state"]
                _say_state(step)
    if status["status"] != "completed":
        raise DemoFailed(f"export {name} ended as {status['status']}: {progress_of(status).get('reason')}")
    kept = {each["name"]: each for each in patiently(lambda: stack.server.artifacts(job_id))["checkpoints"]}
    for wanted in ("merged", *(f"gguf-{type_}" for type_ in TYPES)):
        if wanted not in kept:
            raise DemoFailed(f"{wanted} is not among the artifacts of {job_id}: {', '.join(kept)}")
        _say_artifact(kept[wanted])
    return kept


def _say_state(step: ExportStep) -> None:
    if step["state"] == "in_progress":
        say(f"{step['name']}: started")
    elif step["state"] != "scheduled":
        why = f": {step['reason']}" if step["reason"] else ""
        say(f"{step['name']}: {step['state']}{why}")
    # Figures differ from one step to another.
    figures: dict[str, Any] = step.get("figures") or {}
    if "as_trained" in figures:
        say(
            f"  The saved adapter was loaded again. At {figures['positions']} positions, its logits differ from those "
            f"of the training process by {figures['as_trained']['share']:.2g} of their spread on average."
        )


def _say_artifact(each: Artifact) -> None:
    say(f"\n{each['name']}: {size(each['bytes'])}, sha256 {str(each['sha256'])[:16]}...\n  {each['path']}")
    checked: dict[str, Any] = each["verification"] or {}
    logits = checked.get("logits")
    if logits:
        say(
            f"  llama.cpp {checked['llama_cpp']} loads it. At {logits['same_top_token']:.0%} of {logits['positions']} "
            f"positions it predicts the same token as transformers (mean KL {logits['mean_kl']:.2g} nats)."
        )
    if "gap" in checked:
        say(
            f"  At {checked['positions']} positions, its logits differ from those of base and adapter by "
            f"{checked['gap']['share']:.2g} of their spread on average; {checked['tolerance']:g} is allowed."
        )
    for note in checked.get("notes", ()):
        say(f"  Note: {note}")
