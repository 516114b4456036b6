"""Answers about a playground, its prompts and their answers."""

from typing import Literal

from pydantic import BaseModel, Field

from llama_stack_provider_moe.jobdir.prompts import EndReason, LoadedModel
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.playground import AdapterSide, PromptRequest

PromptStatus = Literal["waiting", "answering", "answered", "failed"]


class SentPrompt(BaseModel):
    """A prompt that a playground will answer."""

    job_uuid: str
    number: int = Field(description="Number of the prompt, for its address.")
    ahead: int = Field(description="Number of prompts that are answered before it.")


class PromptLine(BaseModel):
    """A prompt in a list."""

    number: int
    status: PromptStatus = Field(
        description="waiting, answering, answered, or failed: there is no answer, or not all of it."
    )


class Playground(BaseModel):
    """A playground, and the prompts that it still has."""

    job_uuid: str
    status: JobState
    is_open: bool = Field(description="Whether it takes prompts. One that waits in the queue answers them later.")
    loaded: LoadedModel | None = Field(description="What the loaded model has; null until it is loaded.")
    idle_s: int = Field(description="Seconds without a prompt after which it completes.")
    max_new_tokens: int = Field(description="Largest number of tokens that a prompt may ask for.")
    data: list[PromptLine] = Field(description="Prompts, oldest first; the oldest answered ones are removed.")


class RoutedToken(BaseModel):
    """One token of an answer, and the experts of the position that it was chosen at."""

    id: int = Field(description="Id of the token.")
    token: str = Field(description="The token as text.")
    experts: list[list[int]] = Field(description="Chosen experts of each MoE layer, in the order of the layers.")
    weights: list[list[float]] = Field(description="The router's score of each of them, to 3 digits.")


class SideAnswer(BaseModel):
    """The answer of the model with its adapter on or off."""

    prompt_tokens: int
    text: str = Field(description="The answer so far.")
    tokens: int | None = Field(description="Number of its tokens; null while it is not complete.")
    reason: EndReason | None = Field(
        description="Why it ended: stop, length, positions (the model's last one) or stopped; null while it has not."
    )
    seconds: float | None = Field(description="How long it took; null while it is not complete.")
    routing: list[RoutedToken] = Field(description="Experts of its first tokens; empty if they were not asked for.")


class PromptAnswer(BaseModel):
    """A prompt and its answer so far."""

    job_uuid: str
    number: int
    status: PromptStatus
    prompt: PromptRequest = Field(description="What was asked.")
    answers: dict[AdapterSide, SideAnswer] = Field(description="The answer of each side that has begun.")
    error: str | None = Field(description="Why there is no answer, or not all of it.")


class StoppedPrompt(BaseModel):
    """A prompt that was stopped."""

    job_uuid: str
    number: int
    status: Literal["withdrawn", "stopping", "answered"] = Field(
        description="withdrawn: nobody had begun to answer it; stopping: its answer ends at the next token; answered: "
        "it had ended already."
    )
