"""The step `serve` of an export, failing and killed too: a file for llama.cpp, an Ollama model, an adapter of vLLM."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_stack_provider_moe.compute.recipes.export import serve, steps
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, train
from llama_stack_provider_moe.control.supervisor.withdrawal import withdraw
from llama_stack_provider_moe.jobdir.export_steps import ExportStep, read_steps
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.serving.record import ServedRecord, read_record
from llama_stack_provider_moe.spec.serving_config import SERVING, SERVING_VARIABLE, served_name
from tests.compute.recipes.test_export import asked, done, reason, states
from tests.support import llama_support
from tests.support.inference_servers import State, inference
from tests.support.jobs_support import FORK
from tests.support.ollama_server import ollama
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch, llama_support.converting_once(workshop.root / "converted"):
        patch.setenv("MOE_TRAIN_CACHE", str(llama_support.CACHE))
        llama_support.toolchain()
        base = workshop.root / "models" / "known"
        llama_support.build("granitemoe", base, initializer_range=0.03)
        # Attention alone, which vLLM is known to apply.
        run = workshop.run(
            "sft", base, optimizer={"lr": 1e-4}, adapter={"rank": 2, "alpha": 4, "apply_lora_to_mlp": False}
        )
        assert run.exit_code == COMPLETED, run.reason
        yield run


@pytest.fixture
def router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    with inference(tmp_path) as (url, state):
        configure(monkeypatch, kind="llama_cpp", url=url, models_dir=str(tmp_path), gguf="f32")
        yield state


def configure(monkeypatch: pytest.MonkeyPatch, **serving: Any) -> None:
    found = SERVING.validate_python({"provider_id": "inference", **serving})
    monkeypatch.setenv(SERVING_VARIABLE, SERVING.dump_json(found).decode())


def step(folder: JobFolder) -> ExportStep:
    return next(each for each in read_steps(folder) if each.name == "serve")


def record(folder: JobFolder) -> ServedRecord:
    found = read_record(folder)
    assert found is not None
    return found


def served(of: Run) -> str:
    return served_name(of.folder.root.name)


def test_a_file_is_served_and_verified(trained: Run, router: State) -> None:
    folder = asked(trained, "served", gguf=["f32"], serve=True)
    assert done(folder) == COMPLETED, reason(folder)
    name = served(trained)
    assert router.folder is not None
    target = router.folder / f"{name}.gguf"
    (artifact,) = (folder.artifacts / "gguf-f32").glob("*.gguf")
    assert target.samefile(artifact)
    assert step(folder).figures == {
        "model": f"inference/{name}", "url": json.loads(os.environ[SERVING_VARIABLE])["url"], "how": "linked",
        "answer": "Yes", "answer_seconds": step(folder).figures["answer_seconds"],  # type: ignore[index]
    }  # fmt: skip
    assert f"inference/{name} answers after" in (step(folder).note or "")
    assert record(folder).served_at is not None
    # Another export of the same job takes nothing away.
    other = asked(trained, "other", gguf=["f32"], serve=True)
    assert done(other) == FAILED
    assert f"has another model named {name}; nothing was replaced" in reason(other)
    assert target.samefile(artifact)
    assert read_record(other) is None
    assert withdraw(folder.root, SERVING.validate_json(os.environ[SERVING_VARIABLE]))
    assert (os.listdir(router.folder), artifact.is_file()) == ([], True)


def test_a_model_that_does_not_answer_is_withdrawn(trained: Run, router: State) -> None:
    folder = asked(trained, "silent", gguf=["f32"], serve=True)
    router.answers["POST", "/v1/chat"] = (500, {"error": {"message": "out of memory"}})
    assert done(folder) == FAILED
    assert router.folder is not None
    assert (os.listdir(router.folder), read_record(folder)) == ([], None)
    assert "refused answering as" in reason(folder)
    assert "out of memory" in reason(folder)
    assert states(folder)["gguf-f32"] == "completed"
    router.answers.clear()
    assert done(folder) == COMPLETED, "only the failed step runs again"
    assert withdraw(folder.root, SERVING.validate_json(os.environ[SERVING_VARIABLE]))


def test_a_server_with_another_folder_is_named(trained: Run, router: State, tmp_path: Path) -> None:
    folder = asked(trained, "elsewhere", gguf=["f32"], serve=True)
    router.folder = tmp_path / "elsewhere"
    assert done(folder) == FAILED
    assert f"does not list {served(trained)}; it must run with --models-dir {tmp_path}" in reason(folder)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_server_that_answers_as_any_model_is_not_believed(trained: Run, router: State) -> None:
    folder = asked(trained, "parrot", gguf=["f32"], serve=True)
    listed = {"data": [{"id": served(trained)}]}
    router.answers["GET", "/models"] = (200, listed)
    router.answers["POST", "/v1/chat"] = (200, {"choices": [{"message": {"content": "hi"}}]})
    real = serve.first_answer

    def answer(*arguments: Any) -> Any:
        listed["data"] = []
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "first_answer", answer)
        assert done(folder) == FAILED
    assert "which it does not list" in reason(folder)


@pytest.mark.parametrize("at", ["place", "first_answer", "_keep"])
def test_killed_it_can_be_resumed_or_deleted(trained: Run, router: State, at: str) -> None:
    folder = asked(trained, f"killed-{at.strip('_')}", gguf=["f32"], serve=True)
    assert router.folder is not None

    def die_after(call: Any) -> Any:
        def dying(*arguments: Any, **named: Any) -> Any:
            answer = call(*arguments, **named)
            if at != "_keep" or "served_at" in named:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return dying

    def killed() -> None:
        where: Any = serve.Publication if at == "_keep" else serve
        setattr(where, at, die_after(getattr(where, at)))
        os._exit(train(folder))

    torch.set_num_threads(1)  # a fork has no other threads
    process = FORK.Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    target = router.folder / f"{served(trained)}.gguf"
    assert target.is_file()
    assert record(folder).file is not None
    if at == "first_answer":  # deleted instead
        assert withdraw(folder.root, SERVING.validate_json(os.environ[SERVING_VARIABLE]))
    else:
        assert done(folder) == COMPLETED, reason(folder)
        assert target.is_file()
        assert withdraw(folder.root, SERVING.validate_json(os.environ[SERVING_VARIABLE]))
    assert os.listdir(router.folder) == []


def test_the_setting_counts_that_the_process_was_given(
    trained: Run, router: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = asked(trained, "without", gguf=["f32"], serve=True)
    monkeypatch.delenv(SERVING_VARIABLE)
    assert done(folder) == FAILED
    assert "this server has no `serving` in its configuration any more" in reason(folder)
    configure(monkeypatch, kind="ollama", gguf="f32")
    assert router.asked == []


def test_ollama_gets_the_file(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with ollama() as (url, state):
        configure(monkeypatch, kind="ollama", url=url, gguf="f32")
        serving = SERVING.validate_json(os.environ[SERVING_VARIABLE])
        folder = asked(trained, "pushed", gguf=["f32"], serve=True)
        state.models[served(trained)] = {"template": "of somebody else"}
        assert done(folder) == FAILED
        assert state.models == {served(trained): {"template": "of somebody else"}}
        assert "nothing was replaced" in reason(folder)
        state.models.clear()
        pushes = []
        real = steps.ollama.push
        monkeypatch.setattr(steps.ollama, "push", lambda *a: (pushes.append(a), real(*a))[1])
        assert done(folder) == COMPLETED, reason(folder)
        assert (len(pushes), list(state.models)) == (1, [served(trained)])
        assert step(folder).figures is not None
        assert withdraw(folder.root, None), "without the setting nothing is touched, and the log says so"
        assert withdraw(folder.root, serving)
        assert state.models == {}
    assert not withdraw(folder.root, serving), "it is tried again when the server is back"


def test_vllm_gets_the_adapter(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with inference() as (url, state):
        configure(monkeypatch, kind="vllm", url=url)
        folder = asked(trained, "loaded", serve=True)
        state.bases = [{"id": "another", "root": "another/model"}]
        assert done(folder) == FAILED
        base = trained.folder.read_spec().model
        assert f"runs another, another/model; the adapter needs its base {base}" in reason(folder)
        state.bases = [{"id": "base", "root": base}]
        assert done(folder) == COMPLETED, reason(folder)
        assert state.adapters == {served(trained): str(trained.folder.adapter)}
        assert [each.name for each in read_steps(folder)] == ["serve"]
        assert withdraw(folder.root, SERVING.validate_json(os.environ[SERVING_VARIABLE]))
        assert state.adapters == {}


def test_vllm_gets_no_adapter_that_it_may_ignore(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    run = workshop.run("sft", "granitemoe", eval=None)
    with inference() as (url, state):
        configure(monkeypatch, kind="vllm", url=url)
        state.bases = [{"id": "base", "root": run.folder.read_spec().model}]
        folder = asked(run, "ignored", serve=True)
        assert done(folder) == FAILED
    assert "not known to apply this adapter: vLLM: " in reason(folder)
    assert "Serve a GGUF file instead" in reason(folder)
    assert state.adapters == {}
