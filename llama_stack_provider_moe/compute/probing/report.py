"""The text of a probe's card for a person."""

from collections.abc import Mapping

from llama_stack_provider_moe.shields.probe_card import Compared, Detection, ProbeCard, Rate


def text(card: ProbeCard, candidates: Mapping[int, tuple[float, float]] | None = None) -> str:
    """Lines about a probe.

    Args:
        card: of the probe.
        candidates: block -> (share detected, AUC) on the rows that chose among them; None: not known.
    """
    lines = []
    if candidates is not None:
        lines.append("candidate layers, on the second third: detected, AUC")
        lines += [
            f"  block {layer:>3}  {detected:7.1%}  {auc:.4f}{'  chosen' if layer in card.layers else ''}"
            for layer, (detected, auc) in candidates.items()
        ]
    lines += [
        f"probe     block {' and '.join(map(str, card.layers))} of {card.base.layers} of {card.base.model}, "
        f"{card.base.dtype}, {_tokens(card)}, views {card.views}",
        f"threshold {card.threshold:.6f}, set for {card.false_positive_rate:g} false positives on {card.negatives} "
        "baseline rows",
        f"length    AUC of the number of tokens alone: {card.length_auc:.3f}",
        *_compared("held-out third", card.held_out),
    ]
    if card.test is not None:
        lines += _compared("test sets, other wording", card.test)
    if not card.beats_words:
        lines.append("WARNING: it detects no more than the lexical baseline, which knows words alone")
    return "\n".join(lines)


def _tokens(card: ProbeCard) -> str:
    return "mean of the own text" if card.tokens == "content" else f"position {card.position}, span {card.span}"


def _compared(title: str, found: Compared) -> list[str]:
    return [title, _line("probe", found.probe), _line("bag of embeddings", found.lexical)]


def _line(name: str, found: Detection) -> str:
    auc = found.auc
    return (
        f"  {name:<18} AUC {auc.value:.4f} ({auc.low:.4f} to {auc.high:.4f}), detected at that rate on these rows "
        f"{_rate(found.detected_at_rate)}; at the threshold {_rate(found.detected)}, with false positives "
        f"{_rate(found.false_positives)}"
    )


def _rate(found: Rate) -> str:
    return f"{found.count}/{found.rows} = {found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
