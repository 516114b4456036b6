"""What an owner is told of the rows of a job: formats and columns, in the answer, the job's folder and its details."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.row_reports import read_reports
from tests.support.host_support import BODY, Datasets, ask, folder_of, serving_in_process, submit

TOLD = "data.dataset_id: columns not read: source, id (1)"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    answer = {"from": "gpt", "value": "56"}
    rows: list[Any] = [
        {"conversations": [{"from": "human", "value": "7 x 8?"}, answer], "source": "s", "id": "x"},
        {"instruction": "7 x 8?", "output": "56", "source": "s"},
    ]
    datasets.rows["mixed"] = rows
    datasets.rows["named"] = [{"question": "7 x 8?", "answer": "56"}, {"question": "7 x 9?", "answer": "63"}]
    with serving_in_process(tmp_path, datasets) as made:
        yield made


def test_formats_and_columns_are_told_in_four_places(service: PostTrainingService) -> None:
    data = {"dataset_id": "mixed"}
    assert TOLD in asyncio.run(service.validate(BODY | {"data": data})).notes
    answer = asyncio.run(service.submit(BODY | {"data": data}))
    assert TOLD in answer.notes
    found = read_reports(folder_of(service, answer.job_uuid))
    assert found["train"].formats == {"sharegpt": 1, "alpaca": 1}
    detail = ask(service, "GET", f"/jobs/{answer.job_uuid}").json()
    assert detail["rows"] == {"train": found["train"].as_json()}


def test_columns_have_other_names(service: PostTrainingService) -> None:
    data = {"dataset_id": "named", "columns": {"prompt": "question", "completion": "answer"}}
    folder = folder_of(service, submit(service, data=data))
    assert read_reports(folder)["train"].read == {"question": 2, "answer": 2}
    for columns, told in (
        (
            {"prompt": "questoin", "completion": "answer"},
            "data.columns.prompt: 'questoin' is not valid; expected a col",
        ),
        ({"promt": "question"}, "data.columns: 'promt' is not valid; expected a column of the formats of recipe 'sft'"),
    ):
        with pytest.raises(InvalidInput) as caught:
            submit(service, data={**data, "columns": columns})
        assert str(caught.value).startswith(told)
