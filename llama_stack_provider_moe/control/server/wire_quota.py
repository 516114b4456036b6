"""What an owner may use and uses, as `GET quota` answers."""

from datetime import datetime

from pydantic import BaseModel, Field


class CountedShare(BaseModel):
    """One limit in whole numbers; without a limit, `limit` and `left` are null."""

    used: int = Field(description="What is used now.")
    limit: int | None = Field(description="The server's limit for one owner.")
    left: int | None = Field(description="What is left, at least 0.")


class HoursShare(BaseModel):
    """The GPU-hours of the last 24 hours; without a limit, `limit` and `left` are null."""

    used: float = Field(description="GPU-hours that jobs held GPUs in the last 24 hours.")
    limit: float | None = Field(description="The server's limit for one owner.")
    left: float | None = Field(description="What is left, at least 0.")
    free_at: datetime | None = Field(description="With nothing left: when some is free again, if no job runs.")


class Quota(BaseModel):
    """What one owner uses of this server, and what each owner may use."""

    owner: str = Field(description="The owner as the store names them: a hash, or `anonymous`.")
    waiting_jobs: CountedShare
    running_jobs: CountedShare
    gpu_hours: HoursShare
    stored_bytes: CountedShare = Field(description="Jobs and data sets in the state folder.")


class ListQuotasResponse(BaseModel):
    """Every owner's."""

    data: list[Quota]
