"""The script of the guide, whole: upload, train, follow, get the model, chat with it, on Llama Stack 0.6.1 and on OGX.

llama.cpp's own server serves the result, from the package xllamacpp. Alice runs the script; Bob is another user.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from playwright.sync_api import expect

from llama_stack_provider_moe.control.cli.hosts import HostName
from tests.contracts.doc_blocks import ROOT, blocks_of
from tests.support import llama_support
from tests.support.authority import authority
from tests.support.browser import browsing, visiting
from tests.support.cli_support import MOE_TRAIN
from tests.support.host_harness import Server
from tests.support.other_hosts import ALL, POLICY, HostUnderTest, hosts, required, serving_on

pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install 'llama-stack-provider-moe[serve]'")
from examples import serve_models

pytestmark = pytest.mark.e2e

GUIDE = ROOT / "docs" / "guides" / "openai.md"
LIMIT_S = 800
HOSTS = [host for host in ALL if host.name is not HostName.LLAMA_STACK_0_7]
USERS = {
    "none": {"principal": "alice", "attributes": {"roles": ["user"]}},  # the script's api_key
    "bob": {"principal": "bob", "attributes": {"roles": ["user"]}},
}
QUESTION: Any = [{"role": "user", "content": "What is the capital of Peru?"}]


def client(url: str, token: str) -> openai.OpenAI:
    """A client without retries, because a test needs the first answer."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=300)


class Running(NamedTuple):
    """A server on a host, and the folder of its inference."""

    host: HostUnderTest
    server: Server
    models_dir: Path


@pytest.fixture(scope="module", params=hosts(HostName.LLAMA_STACK_0_6, among=HOSTS))
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    host = required(request.param)
    llama_support.toolchain()
    folder = tmp_path_factory.mktemp("serving")
    models_dir = folder / "models"
    models_dir.mkdir()
    with serve_models.serving(models_dir, 0, most=1, context=256, threads=1) as url, authority(USERS) as endpoint:
        provider = {
            "training_python": sys.executable,  # the host's environment has no torch
            "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            "supervisor": {"poll_s": 0.2},
            "serving": {"kind": "llama_cpp", "provider_id": "llama-cpp", "url": url, "models_dir": str(models_dir)},
        }
        inference = {"provider_id": "llama-cpp", "provider_type": "remote::llama-cpp-server",
                     "config": {"base_url": f"{url}/v1"}}  # fmt: skip
        apis = ["datasetio"] if host.has_datasets else []
        stack = {
            "apis": [*apis, "files", "inference", "post_training"],
            "providers": {"inference": [inference]},
            "server": {"auth": {"provider_config": {"type": "custom", "endpoint": endpoint}, "access_policy": POLICY}},
        }
        env = {"MOE_TRAIN_CACHE": str(llama_support.CACHE)}
        with serving_on(host, folder, provider, stack, env) as server:
            llama_support.build("granitemoe", server.state_dir / "models" / "tiny", initializer_range=0.03)
            yield Running(host, server, models_dir)


@pytest.fixture(scope="module")
def printed(running: Running, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the script prints. Changed are the address, the model, and what a server with authentication needs."""
    (script,) = (block.text for block in blocks_of(GUIDE) if block.language == "python")
    model = running.server.state_dir / "models" / "tiny"
    for written, here in (
        ("http://127.0.0.1:8321", running.server.url),
        ("ibm-granite/granite-3.0-1b-a400m-instruct", str(model)),
        ("    timeout=60,\n", '    timeout=60,\n    headers={"Authorization": "Bearer none"},\n'),
    ):
        assert script.count(written) == 1
        script = script.replace(written, here)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path_factory.mktemp("script"), capture_output=True, text=True,
        timeout=LIMIT_S, check=False, env={**os.environ, "PYTHONWARNINGS": "error"},
    )  # fmt: skip
    log = running.server.log.read_text(errors="replace")[-3000:]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    return done.stdout


def model_in(printed: str) -> str:
    found = re.search(r"^(llama-cpp/ft-capitals-\w+): \d+ tokens", printed, re.MULTILINE)
    assert found is not None, printed
    return found[1]


def test_the_script_trains_and_chats(running: Running, printed: str) -> None:
    model = model_in(printed)
    assert f"The model is served as {model}" in printed
    answer = printed.partition("step_metrics.csv\n")[2]
    assert answer.strip(), "the model has answered"
    assert [path.name for path in running.models_dir.iterdir()] == [f"{model.removeprefix('llama-cpp/')}.gguf"]


def test_answers_are_those_of_the_file(running: Running, printed: str) -> None:
    """Greedy: whole, as a stream, and from llama.cpp's server itself on the job's own artifact."""
    model = model_in(printed)
    job = model.removeprefix("llama-cpp/ft-")
    with client(running.server.url, "none") as api:
        whole = api.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, temperature=0)
        assert whole.choices[0].message.content
        pieces = api.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, temperature=0, stream=True)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == whole.choices[0].message.content
        assert model in [each.id for each in api.models.list()]
    exports = running.server.state_dir / "jobs"
    (artifact,) = exports.glob("export-*/artifacts/gguf-q8_0/*.gguf")
    assert artifact.samefile(running.models_dir / f"ft-{job}.gguf")


def test_the_page_and_the_command_line_talk_to_it_without_a_playground(running: Running, printed: str) -> None:
    """What both show is what the host's inference answers; the page's errors are the host's."""
    model = model_in(printed)
    job = model.removeprefix("llama-cpp/ft-")
    with client(running.server.url, "none") as api:
        whole = api.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, temperature=0, seed=42)
    text = whole.choices[0].message.content
    assert text
    asked = ["--served", "--temperature", "0", "--max-tokens", "8", "--url", running.server.url, "--api-key", "none"]
    words = [*MOE_TRAIN, "chat", job, *asked]
    question = QUESTION[0]["content"]
    typed = subprocess.run(words, input=question, capture_output=True, text=True, timeout=300, check=False)
    assert (typed.returncode, typed.stdout.strip()) == (0, text.strip()), typed.stderr
    assert f"{job} is served as {model}" in typed.stderr
    with browsing() as browser, visiting(browser, running.server.url) as alice:
        alice.refused |= {401}
        page = alice.open(f"/playground?of={job}")
        dialogue = page.get_by_role("dialog", name="This server asks for a token")
        dialogue.get_by_label("Token").fill("none")
        dialogue.get_by_role("button", name="Use this token").click()
        page.get_by_role("button", name="Talk to the served model").click()
        expect(page.get_by_label("Adapter")).to_be_hidden()
        alice.must_be_accessible()
        page.get_by_label("Message", exact=True).fill(question)
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Tokens at most").fill("8")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#said")).to_have_text("Answered.", timeout=120_000)
        assert (page.locator("#answers pre").text_content() or "").strip() == text.strip()
        expect(page.locator("#answers .muted")).to_contain_text("reached the limit of tokens")
        with running.server.http(token="none") as http:
            assert http.get("/jobs?recipe=playground").json()["data"] == []
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            status=200, content_type="text/event-stream", body='data: {"choices": [{"delta": {"content": "Li"}}]}\n\n',
        ))  # fmt: skip
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#problem")).to_contain_text("broke off")
        page.get_by_role("button", name="Back").click()
        expect(page.locator("#ask")).to_be_hidden()


def test_another_user_has_no_such_model(running: Running, printed: str) -> None:
    model = model_in(printed)
    with client(running.server.url, "bob") as api:
        with pytest.raises(openai.NotFoundError):
            api.chat.completions.create(model=model, messages=QUESTION, max_tokens=1)
        assert model not in [each.id for each in api.models.list()]
        with pytest.raises(openai.NotFoundError):
            api.fine_tuning.jobs.retrieve(f"ftjob-{model.removeprefix('llama-cpp/ft-')}")


def test_a_deleted_job_leaves_nothing(running: Running, printed: str) -> None:
    model = model_in(printed)
    job = model.removeprefix("llama-cpp/ft-")
    with running.server.http(token="none") as http:
        answer = http.delete(f"/jobs/{job}")
        assert (answer.status_code, answer.json()["withdrawn"]) == (200, model), answer.text
    assert list(running.models_dir.iterdir()) == []
    with client(running.server.url, "none") as api:
        with pytest.raises(openai.APIStatusError):
            api.chat.completions.create(model=model, messages=QUESTION, max_tokens=1)
        assert model not in [each.id for each in api.models.list()]
