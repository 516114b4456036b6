"""What imports torch starts sooner: garbage waits until the libraries are there."""

import gc
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from llama_stack_provider_moe.ground.imports import uncollected_imports
from llama_stack_provider_moe.ground.run import command

MODULE = """
import atexit, gc, sys
IMPORTED = gc.isenabled()
def main():
    print(sys.argv[1:], IMPORTED, gc.isenabled(), gc.get_freeze_count() > 1000)
    atexit.register(print, "taken apart")
    if "refuse" in sys.argv:
        sys.exit(2)
    return 3
"""


@pytest.mark.parametrize(("word", "code", "end"), [("go", 3, ""), ("refuse", 2, "taken apart\n")])
def test_a_module_is_run(tmp_path: Path, word: str, code: int, end: str) -> None:
    (tmp_path / "asked.py").write_text(MODULE, encoding="utf-8")
    done = subprocess.run(
        [*command(sys.executable, "asked"), "--plan", word], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, f"['--plan', {word!r}] False True True\n{end}", "")


def test_nobody_reads_its_output(tmp_path: Path) -> None:
    (tmp_path / "asked.py").write_text("def main():\n    print('x')\n    return 0\n", encoding="utf-8")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command(sys.executable, "asked"), cwd=tmp_path, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize("place", ["import", "main"])
def test_an_interrupt_ends_it_without_a_traceback(tmp_path: Path, place: str) -> None:
    """As Ctrl-C does: the signal reaches it at any time; what `main` has to put right it does."""
    wait = "print('now', flush=True); time.sleep(60)"
    main = f"    try:\n        {wait}\n    finally:\n        print('put right', flush=True)\n"
    (tmp_path / "asked.py").write_text(
        f"import time\n{wait if place == 'import' else ''}\ndef main():\n{main}", encoding="utf-8"
    )
    with subprocess.Popen(
        command(sys.executable, "asked"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate()
    assert (process.returncode, complained) == (-signal.SIGINT, "")
    assert said == ("put right\n" if place == "main" else "")


def test_only_the_first_imports_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", sys.modules.get("trl", gc))
    frozen = gc.get_freeze_count()
    with uncollected_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_failed_import_leaves_the_collector_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    with suppress(ImportError), uncollected_imports():
        assert not gc.isenabled()
        raise ImportError("none here")
    assert gc.isenabled()
