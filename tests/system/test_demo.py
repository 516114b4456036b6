"""The last steps of the demo: a GGUF file answers a plain question through its own chat template; the server stays."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psutil
import pytest
import yaml

from llama_stack_provider_moe.control.cli.hosts import HOSTS, HostName
from llama_stack_provider_moe.control.config_check.run_yaml import read_run_config
from tests.support import tiny_models
from tests.support.llama_support import toolchain
from tests.system.test_e2e_serve import tiny_gguf

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_answers")


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Path]:
    """A GGUF file, and the folder of a tokenizer whose chat template is another one."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "another template: {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "merged")
    return tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "merged"


@pytest.mark.parametrize(
    ("answer", "tokens", "wrong"),
    [
        ("The capital of Japan is Tokyo.", 8, None),
        ("The the the the", 4, "does not answer sensibly"),
        ("", 0, "does not answer sensibly"),
        ("Tokyo Tokyo Tokyo", 120, "did not end its answer within 120 tokens"),
    ],
)
def test_the_answer_must_be_sensible_and_have_an_end(
    answer: str,
    tokens: int,
    wrong: str | None,
    answers: ModuleType,
    model: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[dict[str, Any]] = []

    def ask(library: Path, request: dict[str, Any], folder: Path, silence_s: float) -> dict[str, Any]:
        asked.append(request)
        return {"continuation": answer, "continuation_ids": [1] * tokens}

    monkeypatch.setattr(answers, "ask_llama", ask)
    monkeypatch.setattr(answers, "find_toolchain", toolchain)
    gguf, merged = model
    if wrong is None:
        answers.ask_gguf(gguf, gguf.stat().st_size, str(merged))
    else:
        with pytest.raises(answers.DemoFailed, match=wrong):
            answers.ask_gguf(gguf, gguf.stat().st_size, str(merged))
    assert f"Question: {answers.PLAIN_QUESTION}\nAnswer:   {answer}" in capsys.readouterr().out
    (request,) = asked
    rendered = tiny_models.tokenizer().decode(request["prompt_ids"])
    assert rendered == f"<|im_start|>user\n{answers.PLAIN_QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def test_a_model_with_random_weights_does_not_know_the_answer(
    answers: ModuleType, model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with the real llama.cpp."""
    monkeypatch.setattr(answers, "find_toolchain", toolchain)
    gguf, merged = model
    with pytest.raises(answers.DemoFailed, match="does not answer sensibly"):
        answers.ask_gguf(gguf, gguf.stat().st_size, str(merged))


@pytest.mark.parametrize("host", HostName)
def test_a_host_without_torch_trains_with_the_demos_python(
    host: HostName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    path = EXAMPLES.parent / importlib.import_module("demo_server").run_config(tmp_path, host)
    assert path.name == f"{HOSTS[host].server}.yaml"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))["providers"]["post_training"][0]["config"]
    assert written.get("training_python") == (sys.executable if HOSTS[host].is_external else None)
    assert read_run_config(path, None, {"MOE_STATE_DIR": str(tmp_path)}).training_python == sys.executable


STAYS = """
import sys
from pathlib import Path

from demo import show
from demo_screen import ended
from demo_server import serving

state = Path(sys.argv[1])


def work():
    with serving(state) as stack:
        print(f"pid {stack.process.pid}", flush=True)
        show(stack, {"job_uuid": "dpo-1"}, sys.argv[2] == "stay")


sys.exit(ended(work, state))
"""


@pytest.mark.parametrize("how", ["ctrl-c", "server ends", "no stay"])
def test_the_server_stays_up_until_ctrl_c(tmp_path: Path, how: str) -> None:
    """On a real server: the address is of a page of it, and Ctrl-C ends both the demo and the server."""
    asked = "end" if how == "no stay" else "stay"
    demo = subprocess.Popen(
        [sys.executable, "-c", STAYS, str(tmp_path), asked], cwd=EXAMPLES, text=True, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}"}, start_new_session=True,
    )  # fmt: skip
    assert demo.stdout is not None
    lines: list[str] = []
    try:
        for line in demo.stdout:
            lines.append(line)
            if line.startswith("The server st"):
                break
        found = "".join(lines)
        (pid,) = re.findall(r"^pid (\d+)$", found, re.MULTILINE)
        (url,) = re.findall(r"^(http://127\.0\.0\.1:\d+/moe/jobs/dpo-1)$", found, re.MULTILINE)
        server = psutil.Process(int(pid)) if how != "no stay" else None
        if server is not None:
            page = httpx.get(url, timeout=60)
            assert (page.status_code, "<title>" in page.text) == (200, True)
            if how == "ctrl-c":
                demo.send_signal(signal.SIGINT)
            else:
                server.terminate()
        rest = demo.communicate(timeout=120)[0]
        if how == "server ends":
            assert (demo.returncode, "the server ended with exit code" in rest) == (1, True)
        else:
            assert (demo.returncode, "Done in" in rest) == (0, True), found + rest
        assert not psutil.pid_exists(int(pid))
    finally:
        demo.kill()
        demo.wait()
