"""A training process without the training: it follows FOLDER/child.json. Standard library only.

It reports like `compute.worker.main`, with events, output, manifest and exit code, in some 50 ms.

    steps, step_s       steps to take, and how long each takes
    held_out            figures on held-out rows, one after each step, in turn
    metric              their name; default: validation_loss
    end                 "manifest" (default), "failed" (a failed event, exit 1), "nothing" (exit 0), or an exit code
    handed_over         how many of its starts end with the exit code of a kernel's failure after the first step
    killed              how many of its starts kill themselves with SIGKILL after the first step
    print_bytes         to print before the first step, in lines
    (FOLDER/left)       this folder, if it is there, becomes the whole model that the job leaves
    fill_disk           after the first step: save a checkpoint, then write another one until the disk is full
    on_term             "save" (default: checkpoint, cancelled event, exit 3) or "ignore"
    grandchild          start a `sleep` that outlives it
    alone               write a file `two` if another process of the job is alive
"""

import datetime
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


def main(folder: Path) -> int:
    plan: dict[str, Any] = json.loads((folder / "child.json").read_text())
    events = os.open(folder / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    stopping = False

    def emit(kind: str, **fields: Any) -> None:
        os.write(events, (json.dumps({"time": now(), "type": kind, **fields}, separators=(",", ":")) + "\n").encode())

    def on_term(*_: object) -> None:
        nonlocal stopping
        stopping = plan.get("on_term", "save") == "save"

    def save(kind: str, step: int) -> dict[str, Any]:
        path = folder / "artifacts" / f"{kind}-{step}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "weights").write_bytes(b"weights")
        artifact = {"identifier": f"{folder.name}/{kind}-{step}", "kind": kind, "path": str(path), "epoch": 0,
                    "step": step, "created_at": now(), "bytes": 0, "metrics": None}  # fmt: skip
        emit("saved", artifact=artifact)
        return artifact

    signal.signal(signal.SIGTERM, on_term)
    if plan.get("alone"):
        lock = os.open(folder / "alone", os.O_WRONLY | os.O_CREAT, 0o600)  # until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (folder / "two").touch()
    with (folder / "launches").open("a+") as launches:
        launches.write(f"{os.getpid()}\n")
        launches.seek(0)
        start = len(launches.readlines())
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
    emit("started", pid=os.getpid(), versions={})
    print("hello from the child", flush=True)
    if plan.get("grandchild"):
        (folder / "grandchild").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    line = "x" * 99 + "\n"
    for _ in range(plan.get("print_bytes", 0) // len(line)):
        sys.stdout.write(line)
    sys.stdout.flush()
    steps = plan.get("steps", 2)
    for step in range(1, steps + 1):
        time.sleep(plan.get("step_s", 0.01))
        emit("step", step=step, max_steps=steps, epoch=step / steps, metrics={"loss": 1 / step}, eta_s=0.0)
        if held_out := plan.get("held_out"):
            emit(
                "evaluation",
                step=step,
                epoch=step / steps,
                metrics={plan.get("metric", "validation_loss"): (held_out * steps)[step - 1]},
            )
        if plan.get("fill_disk"):
            save("checkpoint", step)
            fill_disk(folder / "artifacts" / f".checkpoint-{step + 1}.writing")
        if start <= plan.get("killed", 0):
            save("checkpoint", step)
            os.kill(os.getpid(), signal.SIGKILL)
        if start <= plan.get("handed_over", 0):
            save("checkpoint", step)
            override = {"experts_backend": "torch", "reason": "a kernel failed after step 1"}
            (folder / "experts.json").write_text(json.dumps(override))
            return 5
        if stopping:
            save("checkpoint", step)
            emit("cancelled", step=step)
            return 3
    return finish(plan.get("end", "manifest"), folder, emit, save)


def fill_disk(unfinished: Path) -> None:
    """Fill the disk, and end with the error of a checkpoint that does not fit; the output may not fit either."""
    unfinished.mkdir()
    with (unfinished / "weights").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def finish(end: str | int, folder: Path, emit: Any, save: Any) -> int:
    if end == "failed":
        emit("failed", reason="the rows of this job are too strange", error="DataError")
        return 1
    if end == "nothing":
        return 0
    if isinstance(end, int):
        print("about to end badly", flush=True)
        return end
    manifest = {"job_uuid": folder.name, "artifacts": [save("adapter", 0)], "summary": {}}
    if (folder / "left").is_dir():
        model = folder / "artifacts" / "model"
        (folder / "left").rename(model)
        made = {"identifier": f"{folder.name}/model", "kind": "model", "path": str(model)}
        manifest["artifacts"] = [manifest["artifacts"][0] | made]
    (folder / "manifest.tmp").write_text(json.dumps(manifest))
    (folder / "manifest.tmp").replace(folder / "manifest.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[-1])))
