"""What a user of the openai package does with fine-tuning jobs; runs in an environment that has that package alone.

    python openai_script.py URL MODE NAME GIVEN

MODE is `sync` or `async`, NAME begins the names of the jobs, GIVEN is JSON: {"model": ..., "training_file": ...} or
{"model": ..., "rows": JSON Lines}, which the script uploads to the host. It prints a JSON object: what worked. Each
answer must parse by the package's own types, strictly.
"""

import asyncio
import inspect
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
from openai_strict import require_strict  # beside this script

LIMIT_S = 120
checked = 0


async def got(value: Any) -> Any:
    """The answer of a synchronous or an asynchronous client."""
    return await value if inspect.isawaitable(value) else value


async def each_of(page: Any) -> AsyncIterator[Any]:
    """The objects of a list, page by page."""
    if hasattr(page, "__aiter__"):
        async for one in page:
            yield one
    else:
        for one in page:
            yield one


def check(answer: Any) -> None:
    """Check one answer of the fine-tuning API, strictly."""
    global checked
    if "/fine_tuning/" in str(answer.url) and answer.headers["content-type"].startswith("application/json"):
        require_strict(answer.json())
        checked += 1


def read(answer: Any) -> None:
    """Check an answer of the synchronous client."""
    answer.read()
    check(answer)


async def read_async(answer: Any) -> None:
    """Check an answer of the asynchronous client."""
    await answer.aread()
    check(answer)


def client_of(url: str, mode: str) -> Any:
    """A client without retries. The package brings its own HTTP library."""
    given: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
    if mode == "async":
        http: Any = openai.DefaultAsyncHttpxClient(event_hooks={"response": [read_async]}, timeout=120)
        return openai.AsyncOpenAI(**given, http_client=http)
    return openai.OpenAI(**given, http_client=openai.DefaultHttpxClient(event_hooks={"response": [read]}, timeout=120))


async def until(jobs: Any, job_id: str, states: tuple[str, ...]) -> Any:
    """Ask until the job has one of these states; return the job."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        job = await got(jobs.retrieve(job_id))
        if job.status in states:
            return job
        if time.monotonic() > deadline:
            raise AssertionError(f"{job_id} is {job.status}, not one of {states}")
        await asyncio.sleep(0.1)


async def file_of(api: Any, given: dict[str, Any]) -> str:
    """The file to train on."""
    if "training_file" in given:
        return str(given["training_file"])
    uploaded = await got(api.files.create(file=("rows.jsonl", given["rows"].encode()), purpose="fine-tune"))
    return str(uploaded.id)


async def slow_job(jobs: Any, name: str, given: dict[str, Any], found: dict[str, Any]) -> None:
    """Create, follow, pause, resume and cancel a job."""
    asked = {"model": given["model"], "training_file": given["file"]}
    job = await got(jobs.create(**asked, suffix=f"slow-{name}"))
    found["created"] = job.id.startswith("ftjob-") and job.status in ("queued", "running")
    deadline = time.monotonic() + LIMIT_S
    while "metrics" not in [each.type async for each in each_of(await got(jobs.list_events(job.id, limit=5)))]:
        if time.monotonic() > deadline:
            raise AssertionError("no event of a step")
        await asyncio.sleep(0.1)
    found["events"] = True
    await got(jobs.pause(job.id))
    found["paused"] = (await until(jobs, job.id, ("cancelled",))).status
    checkpoints = [each async for each in each_of(await got(jobs.checkpoints.list(job.id)))]
    found["checkpoints"] = len(checkpoints)
    found["resumed"] = (await got(jobs.resume(job.id))).status in ("queued", "running")
    await got(jobs.cancel(job.id))
    found["cancelled"] = (await until(jobs, job.id, ("cancelled",))).status


async def quick_job(api: Any, name: str, given: dict[str, Any], found: dict[str, Any]) -> None:
    """Run a job to its end, find it by its metadata, and read its file of figures."""
    jobs, asked = api.fine_tuning.jobs, {"model": given["model"], "training_file": given["file"]}
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}}
    job = await got(jobs.create(**asked, suffix=f"quick-{name}", method=method, metadata={"of": name}, seed=3))
    job = await until(jobs, job.id, ("succeeded", "failed"))
    found["succeeded"] = (job.status, job.fine_tuned_model) == ("succeeded", job.id.removeprefix("ftjob-"))
    listed = [each.id async for each in each_of(await got(jobs.list(metadata={"of": name})))]
    found["listed"] = listed == [job.id]
    files = api.with_options(base_url=f"{str(api.base_url).rstrip('/')}/fine_tuning").files
    content = await got(files.content(job.result_files[0]))
    found["result_file"] = content.text.startswith("step,")


async def mistakes(jobs: Any, given: dict[str, Any], found: dict[str, Any]) -> None:
    """Errors are raised as the package's own, with OpenAI's fields."""
    errors = []
    try:
        await got(jobs.retrieve("ftjob-no-such-job"))
    except openai.NotFoundError as error:
        errors.append(error.code == "not_found" and "no-such-job" in str(error))
    try:
        await got(jobs.create(model=given["model"], training_file=given["file"], extra_body={"moe": {"adaptor": {}}}))
    except openai.BadRequestError as error:
        errors.append((error.code, error.param) == ("invalid_value", "moe.adaptor"))
    found["errors"] = errors == [True, True]


async def main(url: str, mode: str, name: str, given: dict[str, Any]) -> None:
    """Do all of it, and print what worked."""
    api = client_of(url, mode)
    found: dict[str, Any] = {"version": openai.__version__}
    given["file"] = await file_of(api, given)
    found["uploaded"] = "rows" in given
    await slow_job(api.fine_tuning.jobs, name, given, found)
    await quick_job(api, name, given, found)
    await mistakes(api.fine_tuning.jobs, given, found)
    found["strict"] = checked
    print(json.dumps(found))


asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])))
