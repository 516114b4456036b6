"""The pages: a shell each, which its ES module fills. No data of a job is ever in them."""

from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from llama_stack_provider_moe.control.dashboard.assets import has_plotly


class Page(NamedTuple):
    """One page.

    Attributes:
        path: its route below `/moe`.
        template: its file in `templates/`.
        title: title of the window, until its module sets a better one.
        module: its ES module in `static/`.
        section: the entry of the navigation that it belongs to.
    """

    path: str
    template: str
    title: str
    module: str
    section: str


PAGES = (
    Page("", "jobs.html", "Jobs", "jobs.js", "jobs"),
    Page("/jobs/{job_uuid}", "job.html", "Job", "job.js", "jobs"),
    Page("/compare", "compare.html", "Compare", "compare.js", "compare"),
    Page("/sweeps", "sweeps.html", "Sweeps", "sweeps.js", "sweeps"),
    Page("/sweeps/{sweep_uuid}", "sweep.html", "Sweep", "sweep.js", "sweeps"),
    Page("/pipelines", "pipelines.html", "Pipelines", "pipelines.js", "pipelines"),
    Page("/pipelines/{pipeline_uuid}", "pipeline.html", "Pipeline", "pipeline.js", "pipelines"),
    Page("/data", "data.html", "Data", "data.js", "data"),
    Page("/data/{name}", "dataset.html", "Data set", "dataset.js", "data"),
    Page("/playground", "playground.html", "Playground", "playground.js", "playground"),
    Page("/new", "new.html", "New job", "new.js", "new"),
)


@lru_cache(1)
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("llama_stack_provider_moe.control.dashboard"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


@lru_cache(64)
def render(page: Page, root: str, api: str) -> str:
    """Return the HTML of a page.

    Args:
        page: the page.
        root: path of this server, "" unless a proxy serves it below another path.
        api: path of the post-training API below `root`.
    """
    return _environment().get_template(page.template).render(
        page=page, root=root, api=f"{root}{api}", base=f"{root}/moe", has_plotly=has_plotly(),
        version=version("llama-stack-provider-moe"),
    )  # fmt: skip
