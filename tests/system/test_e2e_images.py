"""Jobs on images over HTTP: rows pushed with `data:` URLs, SFT and DPO on a tiny Qwen3-VL-MoE, on a real server."""

import json
import time
from typing import Any

import pytest

from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support import tiny_vlms
from tests.support.host_harness import Server
from tests.support.image_bytes import asked, part
from tests.support.shared_server import Shared
from tests.system.test_e2e import asking

pytestmark = pytest.mark.e2e

LIMIT_S = 400
FAMILY = "qwen3_vl_moe"
COLOURS = list(tiny_vlms.COLOURS)
ROWS = [asked(part(tiny_vlms.drawn(colour, place=place)), answer=f"It is {colour}.")
        for place in range(2) for colour in COLOURS]  # fmt: skip
ROWS[3] = asked(text="Which colour has the sky?", answer="It is blue.")
PAIRS = [
    {"prompt": row["messages"][:1], "chosen": row["messages"][1:],
     "rejected": [{"role": "assistant", "content": "I can't see it."}]}
    for row in ROWS
]  # fmt: skip
IMAGES = len(ROWS) - 1


@pytest.fixture(scope="module")
def jobs(shared: Shared) -> dict[str, dict[str, Any]]:
    """Both jobs at once: recipe -> the whole job after its end."""
    server = shared.server
    shared.model(FAMILY, tiny_vlms.build)
    for recipe, rows in (("sft", ROWS), ("dpo", PAIRS)):
        submit(server, recipe, rows)
    ended: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + LIMIT_S
    with asking(server) as http:
        while len(ended) < 2:
            assert time.monotonic() < deadline, f"not ended after {LIMIT_S} s; ended: {set(ended)}"
            for recipe in {"sft", "dpo"} - set(ended):
                job = http.get(f"/jobs/images-{recipe}").json()
                if job["status"] not in ("scheduled", "in_progress"):
                    ended[recipe] = job
            time.sleep(1)
    return ended


def submit(server: Server, recipe: str, rows: list[dict[str, Any]]) -> None:
    """Push a data set and submit a job of two steps on it."""
    body = {
        "recipe": recipe, "job_uuid": f"images-{recipe}", "model": str(server.state_dir / "models" / FAMILY),
        "data": {"dataset_id": f"data:colours-{recipe}"}, "training": {"batch_size": 4, "dtype": "fp32"},
        "optimizer": {"lr": 5e-3}, "adapter": {"rank": 4, "alpha": 8},
        "options": {"max_length": 128, "validation_split": 0.0},
    }  # fmt: skip
    with asking(server) as http:
        pushed = http.put(f"/datasets/colours-{recipe}", content="".join(json.dumps(row) + "\n" for row in rows))
        assert pushed.status_code == 200, pushed.text
        answer = http.post("/jobs", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_a_job_on_images_completes(jobs: dict[str, dict[str, Any]], shared: Shared, recipe: str) -> None:
    """Its rows have the images, its events tell text from images, and its artifact has the processor."""
    job = jobs[recipe]
    assert job["status"] == "completed", job.get("reason")
    folder = JobFolder(shared.server.state_dir / "jobs" / f"images-{recipe}")
    assert len(list(folder.images.iterdir())) == IMAGES
    with asking(shared.server) as http:
        events = http.get(f"/jobs/images-{recipe}/events", params={"limit": 1000}).json()["events"]
        log = "\n".join(http.get(f"/jobs/images-{recipe}/logs").json()["log_lines"])
    routing = [event for event in events if event["type"] == "routing"]
    assert len(routing) == 2
    assert set(routing[-1]["sets"]) == {"text", "image"}
    assert routing[-1]["sets"]["text"] != routing[-1]["sets"]["image"]
    assert "'<|image_pad|>' in the chat template stands for one" in log
    assert (folder.adapter / "preprocessor_config.json").exists() or (folder.adapter / "processor_config.json").exists()
