"""One HTML file about a job, without scripts: figures, curves as SVG, settings, evaluation."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llama_stack_provider_moe.control.dashboard.svg import Line, heat_map, line_chart, short
from llama_stack_provider_moe.jobdir.output import printable

POINTS, COLUMNS = 600, 100  # most steps of a curve, and of a map of the experts
# The artifacts that a report shows, and the file of each: what `eval` measured, the routing of domains, and the
# perplexity by position of a longer context.
SHOWN = {"evaluation": "eval.json", "domains": "routing.json", "positions": "positions.json"}
SHOWN_BYTES = 16 << 20  # a larger file is left out
_LOSSES = ("ce", "preference_loss", "breaker_loss", "divergence")
_CLIPPED = ("clip_ratio/region_mean", "cispo_clip_ratio")
_LENGTHS = ("completions/mean_length", "completions/max_length")
_PER_GRADER = re.compile("rewards/.+/mean")
_NAMES = {
    **dict.fromkeys((*_LOSSES, "policy_loss", "reward", "kl"), "training"), "validation_loss": "held out",
    **dict.fromkeys(_CLIPPED, "share of tokens"), **dict(zip(_LENGTHS, ("mean", "longest"), strict=True)),
}  # fmt: skip
# title, which figures of the steps, which of the evaluations
_CHARTS: tuple[tuple[str, Callable[[str], bool], Callable[[str], bool]], ...] = (
    ("Reward", lambda name: name == "reward", lambda name: name == "reward"),
    ("Reward by grader", lambda name: _is_per_grader(name), lambda name: _is_per_grader(name)),
    ("Spread of the rewards", lambda name: name == "reward_std", lambda name: False),
    ("KL divergence from the model before training", lambda name: name == "kl", lambda name: name == "kl"),
    ("Clipped tokens", lambda name: name in _CLIPPED, lambda name: False),
    ("Changed routes", lambda name: name == "routing/changed", lambda name: False),
    ("Length of the answers, tokens", lambda name: name in _LENGTHS, lambda name: name == _LENGTHS[0]),
    ("Policy loss", lambda name: name == "policy_loss", lambda name: False),
    ("Loss", lambda name: name in _LOSSES, lambda name: name == "validation_loss"),
    ("Loss by domain", lambda name: name.startswith("loss/"), lambda name: name.startswith("validation_loss/")),
    ("Perplexity by domain", lambda name: False, lambda name: name.startswith("perplexity/")),
    ("Rewards", lambda name: name in ("rewards/chosen", "rewards/rejected", "rewards/margins"), lambda name: False),
    ("Reward accuracy", lambda name: name == "rewards/accuracies", lambda name: False),
    ("Cosine with the base model", lambda name: name.startswith("cosine/"), lambda name: False),
    ("Reroute and retain loss", lambda name: name in ("reroute_loss", "retain_loss"), lambda name: False),
    ("Learning rate", lambda name: name == "learning_rate", lambda name: False),
    ("Norm of the gradient", lambda name: name == "grad_norm", lambda name: False),
    ("Tokens a second", lambda name: name == "tokens_per_s", lambda name: False),
    ("Peak memory, bytes", lambda name: name == "memory_bytes", lambda name: False),
    ("Balance loss", lambda name: name in ("aux_loss", "router_z_loss"), lambda name: False),
)

type Document = Mapping[str, Any]


class Sources(NamedTuple):
    """What the report is made of: documents of the HTTP API.

    Attributes:
        job: all details of the job.
        metrics: its metrics as series.
        routing: use of its experts.
        shown: name of an artifact of `SHOWN` -> its file's content; those that the job has.
    """

    job: Document
    metrics: Document
    routing: Document
    shown: Mapping[str, Document]


class Chart(NamedTuple):
    """A chart with the names of its lines.

    Attributes:
        title: what it shows.
        names: the lines, in the order of their colours.
        drawing: SVG.
    """

    title: str
    names: Sequence[str]
    drawing: Markup


@lru_cache(1)
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("llama_stack_provider_moe.control.dashboard"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_readable,
    )  # fmt: skip
    made.filters.update(figure=_figure, text=_text)
    return made


def _readable(value: object) -> object:
    """Return a text without characters that reorder or hide others; anything else as it is."""
    return printable(value) if type(value) is str else value  # a drawing is a `Markup`


def render(sources: Sources) -> str:
    """Return the report as HTML."""
    job = sources.job
    return _environment().get_template("report.html").render(
        job=job, charts=list(_charts(sources.metrics)), maps=list(_maps(sources.routing)),
        evaluation=sources.shown.get("evaluation"), domains=sources.shown.get("domains"),
        information=_information(sources.shown.get("domains")), shares=list(_shares(sources.shown.get("domains"))),
        positions=sources.shown.get("positions"),
        settings=sorted(_leaves(job["spec"] or {})), progress=job["resources_allocated"] or {},
        made_at=datetime.now(UTC), version=version("llama-stack-provider-moe"),
    )  # fmt: skip


def _charts(metrics: Document) -> Iterable[Chart]:
    steps, found, evaluations = metrics["steps"], metrics["metrics"], metrics["evaluations"]
    evaluated = dict.fromkeys(name for each in evaluations for name in each["metrics"])
    for title, of_step, of_evaluation in _CHARTS:
        lines = [
            Line(_named(name), steps, [_number(value) for value in found[name]]) for name in found if of_step(name)
        ]
        for name in filter(of_evaluation, evaluated):
            if name == "validation_loss" and "reward" in evaluated:  # it is the reward, negated
                continue
            points = [each for each in evaluations if name in each["metrics"]]
            values = [_number(each["metrics"][name]) for each in points]
            lines.append(Line(_held_out(name), [each["step"] for each in points], values, has_points=True))
        drawing = line_chart(title, lines)
        if drawing is not None:
            yield Chart(title, [line.name for line in lines], drawing)


def _maps(routing: Document) -> Iterable[Chart]:
    steps = routing["steps"]
    uneven = heat_map("Unevenness of each layer", steps, routing["cv"], routing["layers"])
    if uneven is not None:
        yield Chart("Unevenness of each layer (variation of the experts' shares)", (), uneven)
    shares = heat_map("Share of each expert", routing["share_steps"], routing["share"], range(routing["experts"]))
    if shares is not None:
        yield Chart(f"Share of each expert in layer {routing['layer']}; red: no token", (), shares)


def _information(domains: Document | None) -> Chart | None:
    """Mutual information of domain and expert, layer by layer, beside what chance and a random router show."""
    if domains is None:
        return None
    layers = [layer["layer"] for layer in domains["layers"]]
    names = {"mutual_information": "found", "random_router": "a random router", "chance_high": "by chance, at most"}
    lines = [
        Line(title, layers, [_number(layer[key]) for layer in domains["layers"]], has_points=key != "chance_high")
        for key, title in names.items()
        if any(_number(layer.get(key)) is not None for layer in domains["layers"])
    ]
    drawing = line_chart("Mutual information by layer", lines)
    return None if drawing is None else Chart("Mutual information, nats", [line.name for line in lines], drawing)


def _shares(domains: Document | None) -> Iterable[Chart]:
    """For each domain, the share of its tokens that each expert of each layer got."""
    if domains is None:
        return
    for name in domains["sets"]:
        rows = [layer["rate"][name] for layer in domains["layers"]]
        experts = range(len(rows[0]) if rows else 0)
        drawing = heat_map(f"Experts of {name}", list(experts), rows, [layer["layer"] for layer in domains["layers"]])
        if drawing is not None:
            yield Chart(f"{name}: share of tokens by layer and expert; red: no token", (), drawing)


def _is_per_grader(name: str) -> bool:
    return _PER_GRADER.fullmatch(name) is not None


def _named(name: str) -> str:
    return _NAMES.get(name, _bare(name.removesuffix("/mean") if _is_per_grader(name) else name))


def _held_out(name: str) -> str:
    """The name of a line over evaluations, beside one over steps that may have the same name."""
    if name in ("reward", "kl"):
        return "held out"
    both = _is_per_grader(name) or name in _LENGTHS
    return f"{_named(name)}, held out" if both else _named(name)


def _bare(name: str) -> str:
    for prefix in ("rewards/", "cosine/", "loss/", "perplexity/"):
        name = name.removeprefix(prefix)
    before, held_out, domain = name.partition("validation_loss/")
    return f"{domain}, held out" if held_out and not before else name


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None  # NaN and infinity are text in the API


def _leaves(value: object, path: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, _text(value)


def _figure(value: object) -> str:
    return "–" if value is None else short(float(value)) if isinstance(value, int | float) else str(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
