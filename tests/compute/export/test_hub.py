"""A push to the hub: afterwards it has exactly the folder; the token appears only in the environment."""

import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from llama_stack_provider_moe.compute.export.hub import push
from llama_stack_provider_moe.errors import ExportError, InvalidInput
from llama_stack_provider_moe.spec.destinations import HubPush
from tests.support.hub_server import TOKEN, State, hub

REPO = HubPush(repo_id="me/granite-x")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # `make test` sets it
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub() as (url, state):
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    (made / "inside").mkdir(parents=True)
    (made / "adapter_config.json").write_text("{}")
    (made / "inside" / "weights.safetensors").write_bytes(bytes(range(256)) * 10)
    (made / "README.md").write_text("# It\n")
    (made / ".half.writing").write_text("no")
    return made


def test_a_push_and_another(server: State, folder: Path) -> None:
    told: list[str] = []
    found = push(folder, REPO, told.append)
    assert server.repos["me/granite-x"] == {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert server.private["me/granite-x"]
    assert (found.private, found.files, found.bytes) == (True, 3, 2567)
    assert told == [f"push: 3 files, 2,567 bytes, to {found.url}"]
    # Again, and after a change: the repository is there, and takes what is new.
    (folder / "README.md").write_text("# It, later\n")
    assert push(folder, REPO, told.append).commit != found.commit
    assert server.repos["me/granite-x"]["README.md"] == b"# It, later\n"


def test_nothing_private_goes_into_a_public_repository(server: State, folder: Path) -> None:
    push(folder, HubPush(repo_id="me/open", private=False))
    assert not server.private["me/open"]
    server.repos["me/open"].clear()
    with pytest.raises(ExportError, match=r"me/open is public, and push\.private is true; nothing was sent"):
        push(folder, HubPush(repo_id="me/open"))
    assert not server.repos["me/open"]


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ("/create", 401, "with 401: the token .* is not valid"),
        ("/create", 403, "with 403: the token .* can't write"),
        ("/commit/main", 403, "with 403: the token .* can't write"),
        ("/commit/main", 400, "with 400: .*as it was told"),
        ("/granite-x", 404, "with 404: the repository does not exist"),
    ],
)
def test_refusals_are_reported(server: State, folder: Path, end: str, status: int, told: str) -> None:
    server.answers = {end: status}
    with pytest.raises(ExportError, match=told) as raised:
        push(folder, REPO)
    assert TOKEN not in str(raised.value)


def test_a_file_that_the_hub_lost(server: State, folder: Path) -> None:
    server.loses = "adapter_config.json"
    with pytest.raises(ExportError, match=r"1 file\(s\) in me/granite-x differ from those sent: adapter_config\.json"):
        push(folder, REPO)


def test_conditions_that_stop_a_push(
    server: State, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match="a folder with files in it"):
        push(tmp_path / "nothing", REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ExportError, match="with 401"):
        push(folder, REPO)
    monkeypatch.setenv("HF_ENDPOINT", "ftp://hub")
    with pytest.raises(InvalidInput, match="HF_ENDPOINT"):
        push(folder, REPO)
    monkeypatch.setenv("HF_TOKEN", " ")
    with pytest.raises(ExportError, match="HF_TOKEN is not set"):
        push(folder, REPO)
    assert not server.repos


def test_no_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE is set"):
        push(folder, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ExportError, match="does not answer, or the connection broke"):
            push(folder, REPO)
