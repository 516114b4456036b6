"""The memory of a server that receives rows with images, and of the job that gets them.

    python -m benchmarks.rows_with_images [--rows 10000] [--kilobytes 60]

A server process of its own receives the rows over HTTP and then makes a job of them. The largest resident size is read
before the first row, after the upload and after the job. Each row has an image of its own; the last row has ten of the
largest size. Writes `benchmarks/results/rows_with_images_DATE.json`.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from benchmarks.machine import RESULTS, machine, versions
from llama_stack_provider_moe.jobdir.events import now
from tests.support.image_bytes import asked, chunk, part, png

MIB = 1 << 20
CONFIG = {"model_type": "qwen3_vl_moe", "text_config": {}, "vision_config": {}}


def rows(count: int, size_bytes: int) -> Iterator[bytes]:
    """Yield the lines of the body."""
    noise = random.Random(0)
    for number in range(count):
        image = png(colour=number, extra=chunk(b"teXt", noise.randbytes(size_bytes)))
        yield json.dumps(asked(part(image))).encode() + b"\n"
    largest = [part(png(colour=number, extra=chunk(b"teXt", noise.randbytes(9_900_000)))) for number in range(10)]
    yield json.dumps(asked(*largest)).encode() + b"\n"


def peak_bytes(pid: int) -> int:
    """Return the largest resident size that a process had."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def serve(state: str, pipe: int) -> None:
    """Serve the provider's routes; write the port to the pipe."""
    from tests.support.host_support import over_http, serving_in_process

    with serving_in_process(Path(state)) as service, over_http(service) as url:
        model = service.config.models_dir / "sights"  # the job never runs
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(CONFIG))
        for name in ("tokenizer.json", "model.safetensors"):
            (model / name).write_text("{}")
        os.write(pipe, url.encode() + b"\n")
        while True:
            time.sleep(60)


def measured(count: int, size_bytes: int) -> dict[str, object]:
    """Return the figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                serve(folder, writing)
            finally:
                os._exit(1)
        try:
            url = os.read(reading, 1000).decode().strip()
            client = httpx.Client(base_url=f"{url}/v1alpha/post-training", timeout=3600)
            client.put("/datasets/small", content=next(rows(1, 1000))).raise_for_status()
            before, began = peak_bytes(pid), time.monotonic()
            stored = client.put("/datasets/mine", content=rows(count, size_bytes)).raise_for_status().json()
            sent, uploaded = time.monotonic(), peak_bytes(pid)
            body = {"recipe": "sft", "model": "sights", "data": {"dataset_id": "data:mine"}}
            job = client.post("/jobs", json=body).raise_for_status().json()
            done, made = time.monotonic(), peak_bytes(pid)
            (images,) = Path(folder).glob(f"**/jobs/{job['job_uuid']}/data/images")
            return {
                "rows": stored["rows"], "images": len(list(images.iterdir())),
                "body_mib": round(stored["received_bytes"] / MIB, 1),
                "upload_s": round(sent - began, 1), "job_s": round(done - sent, 1),
                "peak_mib_before": round(before / MIB, 1), "peak_mib_after_upload": round(uploaded / MIB, 1),
                "peak_mib_after_job": round(made / MIB, 1),
            }  # fmt: skip
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000, help="rows with an image each")
    parser.add_argument("--kilobytes", type=int, default=60, help="size of each image")
    given = parser.parse_args()
    load_before = os.getloadavg()
    result = {
        "what": f"{given.rows:,} rows with an image of {given.kilobytes} kB each, and one with ten of 9.9 MB, "
        "sent to a server and made a job of",
        "time": now().isoformat(timespec="seconds"),
        "figures": measured(given.rows, given.kilobytes * 1000),
        "machine": machine() | {"load_average": {"before": load_before, "after": os.getloadavg()}},
        "versions": versions("llama-stack", "fastapi", "uvicorn"),
    }
    path = RESULTS / f"rows_with_images_{now():%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
