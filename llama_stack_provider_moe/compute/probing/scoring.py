"""Scores of conversations by probes, some of which share a model; for the scorer and `moe-train probe score`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.methods.probe import Regression
from llama_stack_provider_moe.compute.probing.artifact import read_probe
from llama_stack_provider_moe.compute.probing.states import read_states
from llama_stack_provider_moe.compute.probing.texts import Reader, Reading
from llama_stack_provider_moe.compute.probing.trunk import Trunk, load_trunk
from llama_stack_provider_moe.errors import InvalidInput, MoeError
from llama_stack_provider_moe.shields.probe_card import Base, ProbeCard, require_base
from llama_stack_provider_moe.shields.scores import Score

type BaseKey = tuple[str, str | None, str | None, str, str | None]


@dataclass(frozen=True)
class ReadProbe:
    """A probe from its folder, before its model is loaded."""

    name: str
    card: ProbeCard
    regressions: list[Regression]

    @staticmethod
    def at(name: str, folder: Path) -> "ReadProbe":
        """Read and check a probe.

        Raises:
            InvalidInput: see `read_probe`.
        """
        return ReadProbe(name, *read_probe(folder, f"probes.{name}"))

    @property
    def key(self) -> BaseKey:
        """What probes that share a loaded model have in common."""
        base = self.card.base
        return base.model, base.adapter_folder, base.adapter, base.dtype, base.template


@dataclass(frozen=True)
class LoadedProbe:
    """A probe on its loaded model.

    Attributes:
        card: of the probe.
        regressions: one for each layer that it reads.
        trunk: the model up to the highest layer of all probes that share it.
        reader: makes the tokens of a conversation's views.
    """

    card: ProbeCard
    regressions: list[Regression]
    trunk: Trunk
    reader: Reader

    @property
    def reading(self) -> Reading:
        """The tokens that it reads."""
        return Reading(self.card.tokens, self.card.position, self.card.span)

    def score(self, views: Sequence[Sequence[Prompt]], batch_size: int) -> list[Score]:
        """The worst score of each conversation.

        Args:
            views: of each conversation, at least one each.
            batch_size: texts in one pass.
        """
        prompts = [prompt for each in views for prompt in each]
        states = read_states(self.trunk, prompts, self.reading, self.card.layers, batch_size)
        scores_LN = self._probabilities(states)
        found, at = [], 0
        for each in views:
            mine_LV = scores_LN[:, at : at + len(each)]
            layer = int(mine_LV.amax(dim=1).argmax())
            found.append(Score(float(mine_LV.max()), self.card.threshold, self.card.layers[layer]))
            at += len(each)
        return found

    def _probabilities(self, states: dict[int, Tensor]) -> Tensor:
        pairs = zip(self.card.layers, self.regressions, strict=True)
        return torch.stack([regression.probabilities(states[layer]) for layer, regression in pairs])


def load_probes(probes: Sequence[ReadProbe]) -> tuple[dict[str, LoadedProbe], dict[str, str]]:
    """Load the models that probes read, each once.

    Returns:
        The probes by name; and why others are not among them: their model can't be loaded, or has another fingerprint,
        adapter or template than their card names.
    """
    loaded, refused = dict[str, LoadedProbe](), dict[str, str]()
    for key in dict.fromkeys(probe.key for probe in probes):
        sharing = [probe for probe in probes if probe.key == key]
        base = sharing[0].card.base
        highest = max(probe.card.layers[-1] for probe in sharing)
        try:
            trunk = load_trunk(base.model, base.adapter_folder, base.dtype, base.template, highest)
        except MoeError as error:
            refused |= {probe.name: str(error) for probe in sharing}
            continue
        for probe in sharing:
            try:
                _require_same(probe, trunk.base)
            except InvalidInput as error:
                refused[probe.name] = str(error)
            else:
                reader = Reader.of(trunk, probe.card)
                loaded[probe.name] = LoadedProbe(probe.card, probe.regressions, trunk, reader)
    return loaded, refused


def _require_same(probe: ReadProbe, here: Base) -> None:
    field, there = f"probes.{probe.name}", probe.card.base
    require_base(probe.card, here.fingerprint, field)
    for what, name in (("adapter", "adapter"), ("chat template", "chat_template")):
        found, wanted = getattr(here, name), getattr(there, name)
        if found != wanted:
            raise InvalidInput(field, str(wanted)[:12], f"a probe of the same {what}, whose SHA-256 begins with "
                               f"{str(found)[:12]}; it was changed since the probe was fitted")  # fmt: skip
    if (here.layers, here.width) != (there.layers, there.width):
        raise InvalidInput(field, [there.layers, there.width], f"a probe of a model with {here.layers} blocks of width "
                           f"{here.width}")  # fmt: skip
