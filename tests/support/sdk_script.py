"""What a user of llama-stack-client does with jobs; runs in an environment that has only that SDK.

    python sdk_script.py URL MODE NAME BODIES

MODE is `sync` or `async`, NAME begins the names of the jobs, BODIES is JSON: {"sft": ..., "dpo": ...}. It prints a JSON
object: how the SDK passes a job's name, and what the server answered.
"""

import asyncio
import inspect
import json
import sys
import time
from typing import Any

import llama_stack_client

LIMIT_S = 120


async def got(value: Any) -> Any:
    """The answer of a synchronous or an asynchronous client."""
    return await value if inspect.isawaitable(value) else value


async def until(api: Any, job_id: str, states: tuple[str, ...]) -> str:
    """Ask until the job has one of these states; which one."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        status: str = (await about(api, "status", job_id)).status
        if status in states:
            return status
        if time.monotonic() > deadline:
            raise AssertionError(f"{job_id} is {status}, not one of {states}")
        await asyncio.sleep(0.1)


def style_of(api: Any) -> str:
    """How this SDK takes the name of a job."""
    parameters = inspect.signature(api.job.status).parameters
    return "job_uuid" if "job_uuid" in parameters else "extra_query"


async def about(api: Any, what: str, job_id: str) -> Any:
    """Call a method about one job."""
    name = {"job_uuid": job_id}
    return await got(getattr(api.job, what)(**(name if style_of(api) == "job_uuid" else {"extra_query": name})))


def names(listed: Any) -> list[str]:
    """The jobs of a list; older SDKs unwrap it."""
    return [each.job_uuid for each in (listed if isinstance(listed, list) else listed.data)]


async def main(url: str, mode: str, name: str, bodies: dict[str, dict[str, Any]]) -> None:
    """Submit, follow, cancel and list."""
    made: Any = llama_stack_client.AsyncLlamaStackClient if mode == "async" else llama_stack_client.LlamaStackClient
    client = made(base_url=url, max_retries=0)
    has_alpha = hasattr(client, "alpha")
    api = client.alpha.post_training if has_alpha else client.post_training
    slow, quick = f"slow-{name}", f"quick-{name}"
    sft, dpo = bodies["sft"] | {"job_uuid": slow}, bodies["dpo"] | {"job_uuid": quick}
    resource = "client.alpha.post_training" if has_alpha else "client.post_training"
    found: dict[str, object] = {"style": style_of(api), "resource": resource}
    found["sft"] = (await got(api.supervised_fine_tune(**sft))).job_uuid == slow
    found["status"] = await until(api, slow, ("in_progress", "completed"))
    await about(api, "cancel", slow)
    found["cancelled"] = await until(api, slow, ("cancelled",))
    found["dpo"] = (await got(api.preference_optimize(**dpo))).job_uuid == quick
    found["completed"] = await until(api, quick, ("completed", "failed"))
    found["artifacts"] = len((await about(api, "artifacts", quick)).checkpoints)
    found["listed"] = {slow, quick} <= set(names(await got(api.job.list())))
    try:
        await about(api, "status", "no-such-job")
    except llama_stack_client.NotFoundError as error:
        found["error"] = "no-such-job" in str(error)
    print(json.dumps(found))


asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])))
