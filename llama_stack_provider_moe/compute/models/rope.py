"""A longer context than a model was trained on: its rotary embeddings (RoPE) are scaled, and its config says so.

Transformers' own modules compute the frequencies: each rotary module is built again from the changed config. What the
config says is what others read: vLLM multiplies a linear factor with `max_position_embeddings`, and YaRN's with
`original_max_position_embeddings`, so YaRN writes the longer length into `max_position_embeddings` and linear does not.

An adapter does not contain its base's config, so the change is in a file of its own beside it (`ROPE_FILE`).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llama_stack_provider_moe.compute.moe.layout import text_config, without_adapters
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground.small_files import read_text
from llama_stack_provider_moe.spec.options import ROPE_FILE, RopeScaling

_EXTENDED, _AS_SHIPPED = "_rope_extended", "_rope_as_shipped"
_LARGEST_BYTES = 1 << 16


@dataclass(frozen=True)
class Extension:
    """What changes in a model's config.

    Attributes:
        rope_parameters: as in the config.
        max_position_embeddings: as in the config.
        positions: that the model had, and has.
        head_dim: where the config has none and means hidden size / heads, which transformers 5.23's YaRN needs stated.
    """

    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    positions: tuple[int, int]
    head_dim: int | None = None

    def in_config(self) -> dict[str, object]:
        """The keys of a config that change, with their values."""
        found: dict[str, object] = {"rope_parameters": dict(self.rope_parameters)}
        found["max_position_embeddings"] = self.max_position_embeddings
        return found if self.head_dim is None else found | {"head_dim": self.head_dim}

    @classmethod
    def from_json(cls, text: str) -> "Extension":
        """The change that `as_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        found = json.loads(text)
        try:
            before, after = found["positions"]
            rope, longest, head_dim = found["rope_parameters"], found["max_position_embeddings"], found["head_dim"]
            numbers = [before, after, longest, *([] if head_dim is None else [head_dim])]
            if any(type(number) is not int for number in numbers):
                raise TypeError
            RopeScaling(type=rope["rope_type"], factor=rope["factor"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("expected what a job with options.rope_scaling writes") from error
        return cls(rope, longest, (before, after), head_dim)

    def as_json(self) -> dict[str, object]:
        """The change as a JSON object."""
        return asdict(self) | {"positions": list(self.positions)}

    def text(self) -> str:
        """The change as a line for the start of a job's log."""
        kind, factor = self.rope_parameters["rope_type"], self.rope_parameters["factor"]
        return f"RoPE scaled by {kind} x {factor:g}: {self.positions[0]:,} positions become {self.positions[1]:,}"


def extension(config: PreTrainedConfig, asked: RopeScaling) -> Extension:
    """What `asked` changes in the config of a language model.

    Raises:
        ModelError: the model has no rotary embeddings, several kinds of them, or scales them already.
    """
    name, rope = config.model_type, getattr(config, "rope_parameters", None)
    given = getattr(config, "max_position_embeddings", None)

    def refusal(why: str) -> ModelError:
        return ModelError(f"options.rope_scaling: is not valid for this {name} model, {why}")

    if not rope or not given:
        raise refusal("whose config has no rope_parameters with max_position_embeddings")
    if any(isinstance(each, dict) for each in rope.values()):
        raise refusal(f"whose layers have rotary embeddings of several kinds ({', '.join(sorted(rope))})")
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise refusal(f"which scales its rotary embeddings already (rope_type {kind!r})")
    longer = int(given * asked.factor)
    changed = {**rope, "rope_type": asked.type, "factor": float(asked.factor)}
    if asked.type == "yarn":
        changed["original_max_position_embeddings"] = int(given)
    made = Extension(
        rope_parameters=changed,
        max_position_embeddings=longer if asked.type == "yarn" else int(given),
        positions=(int(given), longer),
        head_dim=_implied_head_dim(config),
    )
    _ask_transformers(config, made, refusal)
    return made


def _implied_head_dim(config: PreTrainedConfig) -> int | None:
    if getattr(config, "head_dim", 0) is not None:
        return None
    return int(config.hidden_size) // int(config.num_attention_heads)


def _ask_transformers(config: PreTrainedConfig, made: Extension, refusal: Any) -> None:
    """Have transformers check the changed config, whose validation raises for keys that a kind does not have."""
    try:
        changed = type(config).from_dict({**config.to_dict(), **made.in_config()})
        changed.validate_rope()
    except (KeyError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise refusal(f"whose config transformers refuses then: {why}") from error
    if changed.rope_parameters.get("rope_type") != made.rope_parameters["rope_type"]:
        raise refusal("whose config does not keep it")


def scaled_config(config: PreTrainedConfig, asked: RopeScaling | None) -> PreTrainedConfig:
    """A copy of a language model's config, changed as `asked`; the same if nothing is."""
    if asked is None:
        return config
    return type(config).from_dict({**config.to_dict(), **extension(config, asked).in_config()})


def extend(model: nn.Module, change: Extension) -> None:
    """Scale the rotary embeddings of a loaded model, and write the change into its config.

    Raises:
        ModelError: the model's code does not read the config's `rope_parameters`.
    """
    base, config = without_adapters(model), text_config(model)
    before = {key: getattr(config, key) for key in change.in_config()}
    for key, value in change.in_config().items():
        setattr(config, key, value)
    old = {name: module for name, module in base.named_modules() if _is_rotary(module, config)}
    new = {name: _again(module, config) for name, module in old.items()}
    kind = change.rope_parameters["rope_type"]
    if not new or not all(_is_scaled(old[name], new[name], kind) for name in new):
        for key, value in before.items():
            setattr(config, key, value)
        raise ModelError(
            f"options.rope_scaling: is not valid for this {config.model_type} model, whose rotary embeddings do not "
            f"follow the config's rope_parameters ({', '.join(sorted(old)) or 'none found'})"
        )
    _put(base, new)
    base.__dict__[_EXTENDED], base.__dict__[_AS_SHIPPED] = change, (old, before)


def extension_of(model: nn.Module) -> Extension | None:
    """The change that `extend` made; None if it made none."""
    found: Extension | None = without_adapters(model).__dict__.get(_EXTENDED)
    return found


def plan_of(model: nn.Module) -> dict[str, object] | None:
    """The change of the model's context, for `resolved.json`; None if there is none."""
    change = extension_of(model)
    return None if change is None else change.as_json()


@contextmanager
def as_shipped(model: nn.Module) -> Iterator[None]:
    """Inside, the rotary embeddings of a model are those that it came with."""
    base = without_adapters(model)
    if _EXTENDED not in base.__dict__:
        yield
        return
    old, values = base.__dict__[_AS_SHIPPED]
    config, change = text_config(model), base.__dict__[_EXTENDED]
    new = {name: base.get_submodule(name) for name in old}
    device = next(iter(new.values())).inv_freq.device
    _put(base, {name: module.to(device) for name, module in old.items()})
    for key, value in values.items():
        setattr(config, key, value)
    try:
        yield
    finally:
        _put(base, new)
        for key, value in change.in_config().items():
            setattr(config, key, value)


def write_beside(model: nn.Module, folder: Path) -> None:
    """Write the change into an adapter's folder, if there is one."""
    if (change := extension_of(model)) is not None:
        (folder / ROPE_FILE).write_text(json.dumps(change.as_json(), indent=2), encoding="utf-8")


def read_beside(folder: Path) -> Extension | None:
    """The change that an adapter's base needs; None if it needs none.

    Raises:
        ModelError: the file can't be read.
    """
    path = folder / ROPE_FILE
    if not path.is_file():
        return None
    try:
        return Extension.from_json(read_text(path, _LARGEST_BYTES))
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter: {path} can't be read: {error}") from error


def extend_for(model: nn.Module, folder: Path) -> None:
    """Scale a base as the adapter in `folder` needs it.

    Raises:
        ModelError: the file can't be read, or is of another model.
    """
    if (change := read_beside(folder)) is None:
        return
    config = text_config(model)
    asked = RopeScaling(type=change.rope_parameters["rope_type"], factor=change.rope_parameters["factor"])
    if extension(config, asked) != change:
        raise ModelError(f"adapter: {folder / ROPE_FILE} is of another model than this {config.model_type}, whose "
                         f"rope_parameters are {json.dumps(config.rope_parameters)}")  # fmt: skip
    extend(model, change)


def _is_rotary(module: nn.Module, config: PreTrainedConfig) -> bool:
    own = getattr(module, "config", None)
    return own is config and isinstance(getattr(module, "inv_freq", None), Tensor) and hasattr(module, "rope_type")


def _again(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """The module of the same class from the changed config."""
    device = module.inv_freq.device
    assert isinstance(device, torch.device)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        made = type(module)(config)
    return made.to(device)


def _is_scaled(old: nn.Module, new: nn.Module, kind: str) -> bool:
    one, other = old.inv_freq, new.inv_freq
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    # YaRN keeps high frequencies, which may be all of a small model's, and scales attention.
    changed = one.is_meta or not torch.equal(one, other) or old.attention_scaling != new.attention_scaling
    return new.rope_type == kind and changed


def _put(base: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent), own, module)
