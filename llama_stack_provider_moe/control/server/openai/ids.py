"""Ids of OpenAI's objects, each made from the id of one of our jobs."""

from llama_stack_provider_moe.errors import NotFound

JOB, FILE, CHECKPOINT, EVENT = "ftjob-", "file-result-", "ftckpt-", "ftevent-"


def of_job(job_id: str) -> str:
    """Return the id of the fine-tuning job that is our job `job_id`."""
    return JOB + job_id


def job_of(fine_tuning_job_id: str) -> str:
    """Return the id of our job; the inverse of `of_job`.

    Raises:
        NotFound: no fine-tuning job has such an id.
    """
    if not fine_tuning_job_id.startswith(JOB):
        raise NotFound(f"fine-tuning job {fine_tuning_job_id!r} does not exist; expected {JOB}JOB, with the job's name")
    return fine_tuning_job_id.removeprefix(JOB)


def of_file(job_id: str) -> str:
    """Return the id of the result file of our job `job_id`."""
    return FILE + job_id


def job_of_file(file_id: str) -> str:
    """Return the id of our job with this result file; the inverse of `of_file`.

    Raises:
        NotFound: no result file has such an id.
    """
    if not file_id.startswith(FILE):
        raise NotFound(f"result file {file_id!r} does not exist; `result_files` of a job has its id")
    return file_id.removeprefix(FILE)
