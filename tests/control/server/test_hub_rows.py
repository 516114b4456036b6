"""Data sets of the hub that are registered on the host: rows page by page, and what is wrong with an address."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from llama_stack_provider_moe.control.server import compat, hub_rows
from llama_stack_provider_moe.errors import InvalidInput

ROWS = [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(25)]


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library takes a folder of an id where the server was started for the data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(lines, encoding="utf-8")


class Registry:
    """The host's data sets; its provider of rows would read the whole data set for each page."""

    def __init__(self, address: str) -> None:
        self.source = SimpleNamespace(type="uri", uri=f"huggingface://datasets/{address}")

    async def get_dataset(self, request: Any) -> SimpleNamespace:
        """Answer as the host's registry does."""
        return SimpleNamespace(provider_id="huggingface", source=self.source)

    async def iterrows(self, request: Any) -> None:
        """Fail: it runs on the event loop."""
        raise AssertionError("the host's provider was asked")


def pages(address: str) -> list[list[Any]]:
    registry = Registry(address)

    async def read() -> list[list[Any]]:
        deps = {compat.Api.datasets: registry, compat.Api.datasetio: registry}
        return [page async for page in compat.dataset_pages(deps, "d", 10, "data.dataset_id", lambda uri: None)]

    return asyncio.run(read())


def test_rows_come_in_pages() -> None:
    found = pages("owner/name?split=train")
    assert [len(page) for page in found] == [10, 10, 5]
    assert [row for page in found for row in page] == ROWS
    assert [row for page in pages("owner/name?split=train[:3]") for row in page] == ROWS[:3]
    assert pages("owner/name?split=train&data_files=train.jsonl") == found


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("owner/name", "split: expected a part of the data set, such as ?split=train"),
        ("owner/name?split=test", "Unknown split"),
        ("owner/name?split=train&data_files=other.jsonl", "other.jsonl"),
        ("owner/nothing?split=train", "owner/nothing"),
    ],
)
def test_an_address_without_rows_is_refused(address: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput) as refused:
        pages(address)
    assert refused.value.field == "data.dataset_id"
    assert says in str(refused.value)


def test_a_url_of_another_kind_is_no_address() -> None:
    for uri in ("file:///etc/passwd", "https://host/owner/name?split=train"):
        with pytest.raises(ValueError, match="expected huggingface"):
            hub_rows.arguments(uri)


def test_images_are_bytes_that_nobody_decoded() -> None:
    broken = {"bytes": b"no image", "path": "a.png"}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "image": datasets.Image()})
    made = datasets.Dataset.from_list([{"images": [broken, broken], "image": broken}], features=features)
    assert hub_rows.page(hub_rows.undecoded(made), 0, 1) == [{"images": [broken, broken], "image": broken}]
