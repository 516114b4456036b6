"""GGUF files and Ollama as steps of an export job, killed and failing in each of them, with the real llama.cpp."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.export import gguf
from llama_stack_provider_moe.compute.recipes.export import steps
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, train
from llama_stack_provider_moe.jobdir.checkpoint_index import sha256_of, verify_files
from llama_stack_provider_moe.jobdir.export_steps import StepState, read_steps
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder
from llama_stack_provider_moe.jobdir.scan import saved_artifacts
from tests.compute.recipes.test_export import asked, done, reason, states
from tests.support import llama_support
from tests.support.jobs_support import FORK
from tests.support.ollama_server import ollama
from tests.support.training_support import Workshop, workshop

__all__ = ["workshop"]


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, Any]]:
    with ollama() as found:
        yield found


@pytest.fixture(scope="module")
def folder(workshop: Workshop, address: tuple[str, Any]) -> Iterator[JobFolder]:
    """An export job with every step; the model is merged only for the GGUF files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_TRAIN_CACHE", str(llama_support.CACHE))
        llama_support.toolchain()
        base = workshop.root / "models" / "known"
        llama_support.build("granitemoe", base, initializer_range=0.03, **llama_support.ALIGNED)
        # A low rate: the verification shows what rounding does to a model as random as this one.
        run = workshop.run("sft", base, optimizer={"lr": 1e-4})
        assert run.exit_code == COMPLETED, run.reason
        yield asked(run, "files", gguf=["q4_k_m", "f32"], ollama={"name": "tiny", "url": address[0]})


def _killed_in(folder: JobFolder, module: Any, name: str) -> None:
    """In a fork: run the export, and die where `module.name` is called."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, die)
    os._exit(train(folder))


def killed(folder: JobFolder, module: Any, name: str) -> list[str]:
    """Names of the listed artifacts after that, all undamaged."""
    torch.set_num_threads(1)  # a fork has no other threads
    process = FORK.Process(target=_killed_in, args=(folder, module, name))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = saved_artifacts(folder)
    assert all(verify_files(Path(each.path)) is None for each in found)
    return [each.identifier for each in found]


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    real: Callable[..., Any] = getattr(module, name)

    def counting(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.wide
def test_killed_in_each_step_and_failing_in_the_last_it_keeps_what_is_good(
    folder: JobFolder, address: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = address
    # The file is complete, but not yet verified.
    assert killed(folder, gguf, "verify") == []
    assert (folder.work / "merged").is_dir()
    # The next one is verified too, and has no name yet.
    merges, files = counted(monkeypatch, steps, "merge"), counted(monkeypatch, gguf, "_converted")
    monkeypatch.setattr(gguf, "_quantized", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert done(folder) == 3, "stopped in the middle of the second file"
    assert [each.identifier for each in saved_artifacts(folder)] == ["files/gguf-f32"]
    assert (len(merges), len(files)) == (0, 1)
    monkeypatch.undo()
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(llama_support.CACHE))

    # Ollama refuses: the files stay, and the job says what is missing.
    files = counted(monkeypatch, gguf, "_converted")
    server.answers["POST", "/api/create"] = (500, {"error": "no such luck"})
    assert done(folder) == FAILED
    assert files == [], "the first file is complete, and the second is quantised from it"
    assert states(folder) == {"merged": "completed", "gguf-f32": "completed", "gguf-q4_k_m": "completed",
                              "ollama": "failed"}  # fmt: skip
    assert "1 of 4 steps failed: ollama: " in reason(folder)
    assert "no such luck" in reason(folder)
    listed = {each.identifier: each for each in saved_artifacts(folder)}
    assert list(listed) == ["files/gguf-f32", "files/gguf-q4_k_m"]
    for artifact in listed.values():
        whole(artifact)

    # Only the failed step runs again.
    server.answers.clear()
    makes = counted(monkeypatch, gguf, "make")
    assert killed(folder, steps.ollama, "push") == list(listed)
    assert done(folder) == COMPLETED, reason(folder)
    assert makes == []
    assert set(states(folder).values()) == {StepState.COMPLETED}
    assert list(server.models) == ["tiny"]
    manifest = folder.read_manifest()
    assert manifest is not None
    assert [each.identifier for each in manifest.artifacts] == list(listed)
    assert not folder.work.exists(), "the merged model was not asked for"
    assert sorted(path.name for path in folder.artifacts.iterdir()) == ["gguf-f32", "gguf-q4_k_m"]
    told = {step.name: step for step in read_steps(folder)}
    assert told["ollama"].figures is not None
    assert told["ollama"].figures["sha256"] == listed["files/gguf-q4_k_m"].sha256, "the smaller one"


def whole(artifact: Artifact) -> None:
    """A file that llama.cpp read and compared, and a Modelfile that names it."""
    root = Path(artifact.path)
    (file,) = root.glob("*.gguf")
    assert artifact.kind == "gguf"
    assert artifact.sha256 == sha256_of(file)
    assert {path.name for path in root.iterdir()} == {file.name, "Modelfile", "checksums.json"}
    assert f"FROM ./{file.name}" in (root / "Modelfile").read_text()
    assert artifact.verification is not None
    assert artifact.verification["type"] in file.name
    assert artifact.verification["logits"]["positions"] > 100
    assert artifact.verification["tokens"] > 100
