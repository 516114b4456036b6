"""The rows of a circuit-breaker job: break rows cut to request and answer, retained rows kept as they are."""

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.datarows import Message
from llama_stack_provider_moe.spec import BreakerSpec
from llama_stack_provider_moe.training.data import (
    Encode,
    Encoded,
    Maker,
    Row,
    Rows,
    dialog,
    first_said,
    fresh_cache,
    last_said,
    tokens_of,
)
from llama_stack_provider_moe.training.mixture import HeldOutRows, Mixture, Part
from llama_stack_provider_moe.training.rendering import Renderer, Tokens
from llama_stack_provider_moe.training.session import Session

FEATURES = Features({"input_ids": List(Value("int32")), "said": List(Value("int8"))})


def breaker_rows(session: Session[BreakerSpec], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Rows:
    """Columns `input_ids` and `said`, 1 on the assistant's tokens (of break rows: on those of the last answer).

    Args:
        vocabulary: rows of the model's embedding; a token id beyond them would read past its end.
    """
    renderer, spec = Renderer(tokenizer), session.spec
    cache, block = fresh_cache(session), spec.circuit_breaker
    broken = Maker(_break_encoder(renderer, block.request_length, block.response_length), FEATURES, vocabulary, cache)
    retained = Maker(_retain_encoder(renderer, spec.options.max_length), FEATURES, vocabulary, cache)
    made: dict[Part, tuple[object, object]] = {"break": broken.split(session, spec.data, "train", "validation")}
    made["retain"] = retained.split(session, block.retain, "retain", "retain-validation")
    if block.safe is not None:
        made["safe"] = retained.split(session, block.safe, "safe", "safe-validation")
    if broken.truncated or retained.truncated:
        session.say(
            f"{broken.truncated} of {broken.rows} break rows were longer than circuit_breaker.request_length "
            f"{block.request_length} and response_length {block.response_length}, {retained.truncated} of "
            f"{retained.rows} retained rows than options.max_length {spec.options.max_length}; they were cut",
            "warning",
        )
    train = Mixture({part: rows for part, (rows, _) in made.items()})
    held_out = {part: rows for part, (_, rows) in made.items() if rows is not None}
    validation = HeldOutRows(held_out) if {"break", "retain"} <= held_out.keys() else None
    return Rows(train, validation, broken.truncated + retained.truncated)


def _break_encoder(renderer: Renderer, request_length: int, response_length: int) -> Encode:
    def last_answer(row: Row) -> tuple[list[Message], int]:
        return row["messages"], len(row["messages"]) - 1

    def finish(tokens: Tokens) -> Encoded | str:
        if not any(tokens.said):
            return "the chat template renders nothing of the answer"
        begins, ends = first_said(tokens), last_said(tokens) + 1
        if begins == 0:
            return "there is no request before the answer"
        request = tokens.ids[max(0, begins - request_length) : begins]
        response = tokens.ids[begins : min(ends, begins + response_length)]
        said = [False] * len(request) + [True] * len(response)
        cut = begins > request_length or ends - begins > response_length
        return Encoded(
            {"input_ids": request + response, "said": [int(each) for each in said]}, cut, max(request + response)
        )

    def encode(rows: list[Row]) -> list[Encoded | str]:
        return [one if isinstance(one, str) else finish(one) for one in tokens_of(renderer, rows, last_answer)]

    return encode


def _retain_encoder(renderer: Renderer, length: int) -> Encode:
    def finish(tokens: Tokens) -> Encoded | str:
        ids, said = tokens.ids[:length], tokens.said[:length]
        if not any(said[1:]):  # the first token is never predicted
            return f"no token of an answer is left within options.max_length = {length} of its {len(tokens.ids)} tokens"
        return Encoded({"input_ids": ids, "said": [int(each) for each in said]}, len(tokens.ids) > length, max(ids))

    def encode(rows: list[Row]) -> list[Encoded | str]:
        return [one if isinstance(one, str) else finish(one) for one in tokens_of(renderer, rows, dialog)]

    return encode
