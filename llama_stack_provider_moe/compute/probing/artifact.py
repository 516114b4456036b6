"""The folder of a probe: `probe.json` (`shields.probe_card`) and `probe.safetensors`.

The weights are four tensors with one row for each block that the probe reads, in the card's order, in fp64: `mean`,
`deviation` and `weight` (L, H), and `bias` (L).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.fingerprint import sha256
from llama_stack_provider_moe.compute.methods.probe import Regression
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.shields.probe_card import ProbeCard, read_card
from llama_stack_provider_moe.spec.probe import CARD_FILE, WEIGHTS_FILE

_NAMES = ("mean", "deviation", "weight", "bias")
UNWRITTEN = "0" * 64  # stands for the hash of weights in a card that `write_probe` has not written yet


def write_probe(folder: Path, card: ProbeCard, regressions: Sequence[Regression]) -> ProbeCard:
    """Write a probe into `folder`, and return its card with the hash of the weights.

    Args:
        folder: may exist; has no probe.
        card: of the probe.
        regressions: one for each of the card's layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = zip(_NAMES, zip(*regressions, strict=True), strict=True)
    save_file({name: torch.stack(rows).contiguous() for name, rows in parts}, folder / WEIGHTS_FILE)
    card = card.model_copy(update={"weights": sha256(folder / WEIGHTS_FILE)})
    write_atomic(folder / CARD_FILE, card)
    return card


def read_probe(folder: Path, field: str) -> tuple[ProbeCard, list[Regression]]:
    """Read and check a probe.

    Args:
        folder: of the probe.
        field: the caller's name of the setting that names it, for errors.

    Raises:
        InvalidInput: see `read_card`; or the weights have other shapes than the card says, or are not finite.
    """
    card = read_card(folder, field)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidInput(field, str(path), f"a safetensors file ({error})") from None
    layers, width = len(card.layers), card.base.width
    for name in _NAMES:
        _check(tensors.get(name), name, (layers,) if name == "bias" else (layers, width), path, field)
    return card, [Regression(*(tensors[name][layer] for name in _NAMES)) for layer in range(layers)]


def _check(tensor: Tensor | None, name: str, shape: tuple[int, ...], path: Path, field: str) -> None:
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
        found = "none" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise InvalidInput(field, str(path), f"a tensor {name!r} of shape {shape} in fp64; it has {found}")
    if not bool(torch.isfinite(tensor).all()) or (name == "deviation" and not bool((tensor > 0).all())):
        raise InvalidInput(field, str(path), f"finite numbers in {name!r}, and deviations above 0")
