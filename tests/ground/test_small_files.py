"""Files of others: whatever they are and contain, the reader gets an error that says what is wrong, and never waits."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidFile, MoeError, shorten
from llama_stack_provider_moe.ground.small_files import LIMIT_BYTES, check_ids, read_index, read_object, read_small
from tests.support.host_support import BODY, ask, folder_of, serving_in_process, submit

CAUSAL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("files")) as made:
        yield made


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # to bind one, its path has to be short


def holding(content: bytes | str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(LIMIT_BYTES + 1)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO": (fifo, "FIFO"),
    "a socket": (bound_socket, "a socket"),
    "a folder": (Path.mkdir, "is a folder, not a regular file"),
    "large": (large, "has more than 16,777,216 bytes"),
    "deep": (holding("[" * 100_000 + "]" * 100_000), "is nested too deep"),
    "many": (holding("[" + "0," * 2_100_000 + "0]"), "has more than 2,000,000 values"),
    "not UTF-8": (holding(b'{"model_type": "\xff"}'), "is not UTF-8 (byte 16)"),
    "long number": (holding('{"a": ' + "1" * 5000 + "}"), "is not JSON (Exceeds the limit"),
    "cut": (holding('{"architectures": ['), "is not JSON ("),
    "empty": (holding(""), "is not JSON ("),
    "a list": (holding("[]"), "holds [], not an object"),
    "NaN alone": (holding("NaN"), "holds nan, not an object"),
    "architectures 5": (holding('{"architectures": 5}'), "has architectures 5; expected a list of names"),
    "architectures [5]": (holding('{"architectures": [5]}'), "has architectures [5]; expected a list of names"),
    "architectures NaN": (holding('{"architectures": NaN}'), "has architectures nan; expected a list of names"),
    "long name": (holding(json.dumps({"architectures": "x" * 1_000_000})), "; expected a list of names"),
    "model_type []": (holding('{"model_type": [], "architectures": []}'), "has model_type []; expected text"),
    "text_config 1": (holding('{"text_config": 1}'), "has text_config 1; expected an object"),
}  # fmt: skip


def model_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CAUSAL))
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(("make", "told"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_model_with_such_a_file(
    service: PostTrainingService, tmp_path: Path, name: str, make: Callable[[Path], None], told: str
) -> None:
    if name == INDEX and "expected" in told:
        pytest.skip("an index has no such keys")
    folder = model_at(service.config.models_dir / tmp_path.name / "m")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    answer = ask(service, "POST", "/jobs/validate", json=BODY | {"model": str(folder)})
    assert answer.status_code == HTTPStatus.BAD_REQUEST, answer.text
    message = answer.json()["error"]["message"]
    assert name in message
    assert told in message
    assert message.startswith(f"model: '{str(folder)[:40]}")
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        (5, "has weight_map 5; expected an object"),
        (None, "has no weight_map"),
        ({"a": 5}, "has weight_map.a 5; expected the name of a file"),
        ({"a": "../../etc/passwd"}, "../../etc/passwd is missing"),
        ({"a": "x" * 1_000_000}, "is missing or unreadable"),
    ],
)
def test_an_index_of_another_kind(service: PostTrainingService, tmp_path: Path, weight_map: Any, told: str) -> None:
    folder = model_at(service.config.models_dir / tmp_path.name / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    answer = ask(service, "POST", "/jobs/validate", json=BODY | {"model": str(folder)})
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert told in answer.json()["error"]["message"]
    assert len(answer.text) < 2000


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "anything"])
def test_no_file_that_a_job_would_open_is_a_fifo(service: PostTrainingService, tmp_path: Path, name: str) -> None:
    folder = model_at(service.config.models_dir / tmp_path.name / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    answer = ask(service, "POST", "/jobs/validate", json=BODY | {"model": str(folder)})
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert f"a folder of regular files; '{name}' is a FIFO" in answer.json()["error"]["message"]


@pytest.mark.parametrize("told", [5, [], {"a": 1}, None, "LOHA"])
def test_an_adapter_of_another_kind(service: PostTrainingService, tmp_path: Path, told: Any) -> None:
    folder = service.config.models_dir / tmp_path.name / "a"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": told}))
    body = {"recipe": "routing_analysis", "model": "owner/name", "data": {"sets": {"a": "good", "b": "good"}}}
    answer = ask(service, "POST", "/jobs/validate", json=body | {"adapter_folder": str(folder)})
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert "its adapter_config.json has another peft_type" in answer.json()["error"]["message"]


def test_what_a_job_left_in_the_place_of_its_files(service: PostTrainingService) -> None:
    """A training process runs code of a model, which may leave a FIFO; nobody waits for it."""
    job_id = submit(service)
    folder = folder_of(service, job_id)
    os.mkfifo(folder.output)
    os.mkfifo(folder.events)
    for path in ("/logs", "/events", "/metrics"):
        answer = ask(service, "GET", f"/jobs/{job_id}{path}")
        assert answer.status_code == HTTPStatus.BAD_REQUEST, answer.text
        assert "is a FIFO, not a regular file" in answer.json()["error"]["message"]


def test_what_is_right_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity], "eos_token_id": [1, 2]}')  # as transformers writes it
    told = read_object(path)
    assert told["time_step_limit"][1] == float("inf")
    assert check_ids(path, told, "eos_token_id") == [1, 2]
    assert check_ids(path, {"eos_token_id": 3}, "eos_token_id") == [3]
    assert check_ids(path, {}, "eos_token_id") == []
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_small(link) == path.read_bytes()
    path.write_text('{"weight_map": {"a": "b"}}')
    assert read_index(path) == {"a": "b"}
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "none")
    with pytest.raises(InvalidFile, match="has more than 4 bytes"):
        read_small(path, 4)


@pytest.mark.parametrize("ids", [True, "1", 1.5, [None], [-1], 2**63, float("nan")])
def test_ids_that_are_none(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(MoeError, match="expected a token's id or a list of them"):
        check_ids(tmp_path, {"eos_token_id": ids}, "eos_token_id")


def test_values_are_shown_short() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("x" * 10**8, b"x" * 10**8, list(range(10**6)), dict.fromkeys(range(10**6)), nested, 10**100_000,
                  -(10**100_000)):  # fmt: skip
        assert len(shorten(value)) == 80
    for value in ("a", [1, "b", None], {"a": [1.5]}, 10**12, None, True, [], {}):
        assert shorten(value) == repr(value)
