"""The folders that a mix reads: the base and its branches, checked before any weight is read."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from llama_stack_provider_moe.compute.export.tensors import TensorEntry, read_model
from llama_stack_provider_moe.compute.models.upcycle import (
    RULES,
    SHARED_FIELDS,
    Rule,
    check_names,
    model_folder,
    rule_of,
)
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.ground.small_files import read_object
from llama_stack_provider_moe.spec.mixing import MixPlan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ANCHOR_AND_EXPERT = 2
# Fields that training may change, and that change nothing that the weights compute.
_OF_TRAINING = ("attention_dropout", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "dtype")
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """A model's folder.

    Attributes:
        field: the setting that names it, for errors.
        name: of the branch; of the base, `model`.
        folder: the folder.
        config: its config.
        entries: its tensors, without those that follow from others.
        shown: the model as its owner named it, for errors.
    """

    field: str
    name: str
    folder: Path
    config: PreTrainedConfig
    entries: dict[str, TensorEntry]
    shown: str


@dataclass(frozen=True)
class Sources:
    """What a mix reads.

    Attributes:
        plan: of the mix.
        rule: how the family's tensors are named.
        base: the model that every branch was trained from.
        branches: those that are mixed, in the order of their experts.
    """

    plan: MixPlan
    rule: Rule
    base: Source
    branches: list[Source]


def open_sources(model: str, plan: MixPlan) -> Sources:
    """Read the configs, the tokenizers and the headers of all files, and compare them; no weight is read.

    Args:
        model: the base: a folder with config.json and safetensors, or a hub id.
        plan: of the mix; the models of its branches are also folders or hub ids.

    Raises:
        InvalidInput: a branch has another shape, tokenizer or number of layers than the base.
        ModelError: a folder can't be read, or its family can't be mixed.
    """
    base = _open("model", "model", model)
    rule = _rule(base, plan)
    branches = [_open(f"branches.{at}.model", plan.branches[at].name, plan.branches[at].model) for at in plan.kept]
    for branch in branches:
        _same_config(branch, base, rule)
        _same_tensors(branch, base)
        _same_tokenizer(branch, base)
    _same_template(branches)
    return Sources(plan, rule, base, branches)


def _open(field: str, name: str, model: str) -> Source:
    folder = model_folder(model, field)
    with _naming(field):
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"base: {folder} has no config.json that transformers can read: {error}") from error
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"base: the weights in {folder} are quantised; expected the full-precision model")
        entries = {name: entry for name, entry in read_model(folder).items() if not _follows(name, config)}
    return Source(field, name, folder, config, entries, shown(model))


def shown(model: str) -> str:
    """A model as its owner named it: `JOB/NAME` for a job's result, the name of a folder in a server's models."""
    path = Path(model)
    if not path.is_absolute():
        return model
    if path.parent.name in ("artifacts", "checkpoints"):
        return f"{path.parent.parent.name}/{path.name}"
    own = next((each for each in path.parents if each.name == "models" and (each.parent / "jobs").is_dir()), None)
    return model if own is None else str(path.relative_to(own))


def _follows(name: str, config: PreTrainedConfig) -> bool:
    """Whether a tensor follows from the config or from another tensor."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and bool(config.tie_word_embeddings))


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Errors inside name the setting `field`."""
    try:
        yield
    except ModelError as error:
        text = str(error)
        raise ModelError(f"{field}: {text.removeprefix('base: ').removeprefix('source: ')}") from error


def _rule(base: Source, plan: MixPlan) -> Rule:
    if plan.method == "btx":
        with _naming(base.field):
            rule = rule_of(base.config)
            check_names(set(base.entries), base.config, rule)
        return rule
    for rule in RULES.values():
        if rule.model_type == base.config.model_type:
            experts = getattr(base.config, rule.experts_field)
            if experts != ANCHOR_AND_EXPERT:
                raise InvalidInput("model", base.shown, f"a model of {ANCHOR_AND_EXPERT} experts, an anchor and "
                                   f"one that trains (`moe-train upcycle --experts 2`); it has {experts}")  # fmt: skip
            return rule
    known = sorted({rule.model_type for rule in RULES.values()})
    raise InvalidInput("model", base.shown, f"a model of type {', '.join(known)}, which `moe-train upcycle` "
                       f"makes, with method 'bar'; its model_type is {base.config.model_type!r}")  # fmt: skip


def _same_config(branch: Source, base: Source, rule: Rule) -> None:
    if branch.config.model_type != base.config.model_type:
        raise InvalidInput(branch.field, branch.shown, f"a model of type {base.config.model_type!r}, as `model` "
                           f"is; its model_type is {branch.config.model_type!r}")  # fmt: skip
    names = {*SHARED_FIELDS, *rule.carried, *rule.refused} - set(_OF_TRAINING)
    if branch.config.model_type == rule.model_type:  # experts that are there already
        names |= {rule.experts_field, rule.width_field, *rule.constants}
    for name in sorted(names):
        has, expected = getattr(branch.config, name, None), getattr(base.config, name, None)
        if has != expected:
            raise InvalidInput(branch.field, branch.shown, f"a model with {name} {expected!r}, as `model` has; "
                               f"it has {has!r}")  # fmt: skip


def _same_tensors(branch: Source, base: Source) -> None:
    for problem, names in (
        ("lacks", base.entries.keys() - branch.entries.keys()),
        ("also has", branch.entries.keys() - base.entries.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN])
            raise InvalidInput(branch.field, branch.shown, f"a model with the tensors of `model`; it {problem} "
                               f"{len(names)}: {shown}")  # fmt: skip
    for name, entry in branch.entries.items():
        if entry.shape != base.entries[name].shape:
            raise InvalidInput(branch.field, branch.shown, f"tensors of the shapes of `model`: {name} has "
                               f"{entry.shape} for {base.entries[name].shape}")  # fmt: skip
    for source in (base, branch):
        odd = next((entry for entry in source.entries.values() if entry.dtype not in DTYPES), None)
        if odd is not None:
            raise ModelError(f"{source.field}: {odd.name} is {odd.dtype}; expected 16 or 32 bits")


def _vocabulary(folder: Path) -> object:
    """What decides how the folder's tokenizer splits a text into tokens; None: it has no tokenizer."""
    path = folder / "tokenizer.json"
    if path.is_file():
        content = json.loads(path.read_bytes())
        return {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    path = folder / "tokenizer.model"
    return path.read_bytes() if path.is_file() else None


def _same_tokenizer(branch: Source, base: Source) -> None:
    try:
        has, expected = _vocabulary(branch.folder), _vocabulary(base.folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{branch.field}: a tokenizer.json can't be read: {error}") from error
    if has is None and expected is not None:
        raise InvalidInput(branch.field, branch.shown, "a folder with the tokenizer of `model`; it has none")
    if has != expected:
        raise InvalidInput(branch.field, branch.shown, "a model with the tokenizer of `model`; its tokens differ")


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    found = read_object(path).get("chat_template") if path.is_file() else None
    return None if found is None else re.sub(r"\r\n", "\n", str(found))


def _same_template(branches: list[Source]) -> None:
    first = branches[0]
    for branch in branches[1:]:
        if _template(branch.folder) != _template(first.folder):
            raise InvalidInput(branch.field, branch.shown, f"a model with the chat template of branch "
                               f"{first.name!r}, as the result has one")  # fmt: skip
