"""A playground: what its job states, and what a prompt to it states."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import Block, DType

MAX_WAITING = 8  # prompts of a playground that wait for their answers
KEPT_PROMPTS = 100  # prompts of a playground whose files stay; older ones are removed
MAX_TEXT = 100_000  # characters of one message
MAX_MESSAGES = 200
MAX_ANSWER_TOKENS = 4096
YIELD_S = 60  # seconds without a prompt after which a playground makes room for a job that waits
ROUTED_TOKENS = 512  # tokens of an answer whose experts are written down
# Logits are divided by the temperature. Far below this they leave the range of floats, and no token can be chosen.
MIN_TEMPERATURE = 0.01

AdapterSide = Literal["on", "off"]
AdapterChoice = Literal["on", "off", "both"]


class Playground(Block):
    """How long a playground stays, and how long its answers may be."""

    idle_s: int = Field(
        default=600,
        ge=5,
        le=7200,
        description="Seconds without a prompt after which the job completes; at most 60 while another job waits for "
        "its device or its place.",
    )
    max_new_tokens: int = Field(
        default=1024, ge=1, le=MAX_ANSWER_TOKENS, description="Largest number of tokens that a prompt may ask for."
    )
    replace: bool = Field(
        default=False,
        description="Cancel the owner's other playground, of which there can be only one; else this job is refused "
        "while there is another.",
    )


class PlaygroundTraining(Block):
    """How the model is loaded; nothing is trained."""

    dtype: DType = Field(default="bf16", description="Data type of the model's parameters.")
    quantize_bits: Literal[0, 4, 8] | None = Field(
        default=None,
        description="Bits of each weight of the base: 4 (NF4), 8, or 0, not quantised. Left out: as the base was while "
        "the adapter's job trained it; 0 without such a job.",
    )
    quantize_scales: bool = Field(
        default=False,
        description="Quantise the scales of 4 bits too. As in the adapter's job where `quantize_bits` is left out.",
    )

    @model_validator(mode="after")
    def _scales_are_of_four_bits(self) -> "PlaygroundTraining":
        if self.quantize_scales and self.quantize_bits != 4:
            raise ValueError("quantize_scales: true is used only with quantize_bits 4")
        return self


class PlaygroundOptions(Block):
    """The options of a job that a playground uses."""

    max_length: int = Field(
        default=4096, ge=8, le=1 << 20, description="Largest number of tokens of a prompt; longer ones are refused."
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        default=None, description="Chat template to use; default: the model's own."
    )


class ChatMessage(Block):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks.")
    content: str = Field(max_length=MAX_TEXT, description="What is said.")


class PromptRequest(Block):
    """A prompt to a playground: a conversation, or a text that the model continues."""

    messages: list[ChatMessage] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_MESSAGES,
        description="Conversation to answer; its last message is the user's.",
    )
    prompt: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_TEXT,
        description="Text to continue, without a chat template; instead of `messages`.",
    )
    adapter: AdapterChoice = Field(
        default="on",
        description="Whether the adapter is on, off, or both: one answer each, with the same seed. Off is the base "
        "model.",
    )
    seed: int = Field(
        default=42,
        strict=True,
        ge=0,
        lt=2**32,
        description="Seed of the choice of tokens. The same prompt and seed give the same text on the same machine.",
    )
    temperature: float = Field(
        default=0.7,
        strict=True,
        ge=0,
        le=2,
        description="Randomness of the choice of tokens: 0.01 to 2, or 0 for always the most likely token.",
    )
    top_p: float = Field(
        default=1.0,
        strict=True,
        gt=0,
        le=1,
        description="Share of probability that tokens are chosen from, the most likely first.",
    )
    max_tokens: int = Field(
        default=256, strict=True, ge=1, le=MAX_ANSWER_TOKENS, description="Largest number of tokens of each answer."
    )
    routing: bool = Field(
        default=False, strict=True, description="Whether the answer has the experts of each token in each layer."
    )

    @field_validator("temperature")
    @classmethod
    def _can_divide(cls, temperature: float) -> float:
        if 0 < temperature < MIN_TEMPERATURE:
            raise ValueError(f"{temperature} is not valid; expected 0, or {MIN_TEMPERATURE} to 2")
        return temperature

    @model_validator(mode="after")
    def _one_prompt(self) -> "PromptRequest":
        if self.messages is None and self.prompt is None:
            raise ValueError("messages: is missing; state either messages or prompt")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("messages: state either messages or prompt, not both")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError(f"messages: the last one has role {self.messages[-1].role!r}; expected 'user'")
        return self
