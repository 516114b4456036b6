"""Answers that a job generated, as its folder has them: `samples/STEP.jsonl`."""

from pydantic import BaseModel, ConfigDict, Field

FOLDER = "samples"


class GeneratedSample(BaseModel):
    """One answer and its rewards."""

    model_config = ConfigDict(extra="ignore")

    step: int = Field(description="Optimiser step that learns from it first.")
    group: int = Field(description="Number of its prompt in the generation, from 0.")
    prompt: str = Field(description="Prompt, as it was sent to the model.")
    completion: str = Field(description="Answer, without special tokens.")
    tokens: int = Field(description="Number of the answer's tokens.")
    truncated: bool = Field(description="Whether it reached the largest length.")
    rewards: dict[str, float | None] = Field(description="Value by grader; null: it has none for this answer.")
    failures: dict[str, str] = Field(default_factory=dict, description="Reason by grader that gave no value.")
    reward: float | None = Field(description="Weighted sum; null: a grader gave no value, so nothing is learnt.")
    advantage: float = Field(description="What the answer's tokens are weighted by in the loss.")
