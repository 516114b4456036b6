"""Playground: keep a model in memory, and answer prompts until none has come for a while. Nothing is trained."""

import time
from pathlib import Path

from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.positions import positions_of
from llama_stack_provider_moe.compute.models.adapted import Adapted, load_adapted
from llama_stack_provider_moe.compute.models.loader import tokenizer_of
from llama_stack_provider_moe.compute.recipes.playground.answers import Answers
from llama_stack_provider_moe.compute.recipes.playground.inbox import Inbox
from llama_stack_provider_moe.compute.runtime.context import Session, Stopped
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed
from llama_stack_provider_moe.jobdir.folder import Manifest, write_atomic
from llama_stack_provider_moe.jobdir.prompts import LoadedModel
from llama_stack_provider_moe.spec import PlaygroundSpec
from llama_stack_provider_moe.spec.playground import YIELD_S

POLL_S = 0.1
_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def run(session: Session[PlaygroundSpec]) -> Manifest:
    """Load the model, answer prompts, and complete once nobody has asked anything for `playground.idle_s`."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    inbox = Inbox(folder.prompts)
    inbox.reopen()
    loaded = load_adapted(spec, template_needed=False)
    tokenizer = tokenizer_for(spec, loaded)
    plan: dict[str, object] = {
        "recipe": spec.recipe,
        "model": spec.model,
        "model_from": spec.model_from,
        "architecture": type(loaded.model).__name__,
        "device": str(loaded.model.device),
        "dtype": spec.training.dtype,
        "layout": None if loaded.layout is None else loaded.layout.as_json(),
        "adapter_folder": spec.adapter_folder,
        "quantized": None if loaded.quantized is None else loaded.quantized.as_json(),
    }
    write_atomic(folder.resolved, _JSON.dump_json(plan, indent=2).decode())
    session.events.append(Plan(plan=_JSON.dump_python(plan, mode="json")))
    if session.started_before:
        session.events.append(Resumed(step=0, checkpoint=None))
    layout, positions = loaded.layout, positions_of(loaded.model)
    inbox.write_model(
        LoadedModel(
            has_adapter=spec.adapter_folder is not None,
            moe_layers=[] if layout is None else list(layout.moe_layers),
            experts=0 if layout is None else layout.choices,
            top_k=0 if layout is None else layout.top_k,
            positions=None if positions is None else positions.most,
        )
    )
    session.show(f"model     {spec.model}\nexperts   {'none' if layout is None else layout.text()}")
    if loaded.quantized is not None:
        session.show(f"base      {loaded.quantized.text()}")
    session.stop.between_steps()  # from here on a request to stop ends an answer in good order
    answers = Answers(session, loaded, tokenizer)
    try:
        count = serve(session, inbox, answers)
    finally:
        answers.close()
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    summary = {"prompts": float(count), "tokens": float(answers.tokens)}
    return Manifest(job_uuid=session.job_uuid, artifacts=[], summary=summary)


def tokenizer_for(spec: PlaygroundSpec, loaded: Adapted) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter, whose chat template the adapter learnt; else the model's.

    The base answers with the same template, so that both sides get the same prompt.
    """
    if spec.adapter_folder is None or spec.options.chat_template is not None:
        return loaded.tokenizer
    if not (Path(spec.adapter_folder) / "tokenizer_config.json").is_file():
        return loaded.tokenizer
    return tokenizer_of(spec.adapter_folder, None, template_needed=False)


def serve(session: Session[PlaygroundSpec], inbox: Inbox, answers: Answers) -> int:
    """Answer prompts, one at a time, until none has come for a while; return how many.

    That is `playground.idle_s` seconds, but at most `YIELD_S` while another job waits for this one's place.

    Raises:
        Stopped: the job was asked to stop.
    """
    count, last_s = 0, time.monotonic()
    with liveness.stage("waiting for prompts", unit="prompts") as counter:
        while True:
            if session.stop.requested:
                raise Stopped(0)
            is_wanted = inbox.files.wanted.exists()
            idle_s = min(session.spec.playground.idle_s, YIELD_S) if is_wanted else session.spec.playground.idle_s
            number = inbox.next()
            if number is not None:
                answers.answer(inbox, number)
                count, last_s = count + 1, time.monotonic()
                counter.advance()
            elif time.monotonic() - last_s < idle_s:
                liveness.alive()
                time.sleep(POLL_S)
            elif inbox.close():
                why = ", and another job waits for its place" if is_wanted else ""
                session.show(f"completed: no prompt for {idle_s} seconds{why}")
                return count
