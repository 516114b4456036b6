"""Answers that a job generated, as its folder has them: `samples/STEP.jsonl`, one line for each."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FOLDER = "samples"
MOST_CHARACTERS = 20_000  # of a text that is read back


class GeneratedSample(BaseModel):
    """One answer, and its rewards if the job has graders."""

    model_config = ConfigDict(extra="ignore")

    step: int = Field(description="Optimiser step that learns from it first.")
    group: int = Field(description="Number of its prompt in the generation, from 0.")
    prompt: str = Field(description="Prompt, as it was sent to the model.")
    completion: str = Field(description="Answer, without special tokens.")
    tokens: int = Field(description="Number of the answer's tokens.")
    truncated: bool = Field(description="Whether it reached the largest length.")
    rewards: dict[str, float | None] = Field(
        description="Value by grader; null: it has none for this answer. {}: the job has no graders."
    )
    failures: dict[str, str] = Field(default_factory=dict, description="Reason by grader that gave no value.")
    reward: float | None = Field(
        description="Weighted sum; null: a grader gave no value, so nothing is learnt, or the job has no graders."
    )
    advantage: float | None = Field(
        description="What the answer's tokens are weighted by in the loss; null: the job has no graders."
    )


def steps(folder: Path) -> list[int]:
    """Return the steps whose answers a job's folder still has, in ascending order."""
    return sorted(int(path.stem) for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def read(folder: Path, step: int, limit: int) -> list[GeneratedSample]:
    """Return the answers that a step learns from first; prompts and answers are cut at `MOST_CHARACTERS`.

    Args:
        folder: the job's folder of answers.
        step: one of `steps`. Its file may be deleted at any time; then there are none.
        limit: largest number of answers.
    """
    found: list[GeneratedSample] = []
    try:
        with (folder / f"{step:09d}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                if len(found) == limit:
                    break
                found.append(_cut(GeneratedSample.model_validate_json(line)))
    except (FileNotFoundError, ValidationError):  # it was just deleted, or the disk was full
        return found
    return found


def _cut(sample: GeneratedSample) -> GeneratedSample:
    update = {
        name: f"{text[:MOST_CHARACTERS]} [... {len(text) - MOST_CHARACTERS:,} characters more]"
        for name in ("prompt", "completion")
        if len(text := getattr(sample, name)) > MOST_CHARACTERS
    }
    return sample.model_copy(update=update) if update else sample
