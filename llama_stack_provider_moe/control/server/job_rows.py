"""The rows of a job that was submitted: checked, copied into its folder, and described there."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.control.server import callers, compat, image_doors, ownership, rows, sample_check
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.server.own_datasets import OwnDatasets
from llama_stack_provider_moe.control.server.row_sample import RowSample
from llama_stack_provider_moe.control.server.template_check import TemplateChecker
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir import row_domains
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.row_reports import write_reports
from llama_stack_provider_moe.jobdir.row_sources import DataSource, write_sources
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.data import require_few_passes
from llama_stack_provider_moe.spec.row_domains import RowDomains
from llama_stack_provider_moe.spec.row_sources import RowSource
from llama_stack_provider_moe.spec.rows import RowsReport
from llama_stack_provider_moe.spec.server_config import ProviderConfig


class JobRows(NamedTuple):
    """What was found about the rows of each part of a job (`RowSource.part`)."""

    reports: Mapping[str, RowsReport]
    sources: Mapping[str, DataSource]

    def counts(self) -> dict[str, int]:
        """Number of rows by part."""
        return {part: report.rows for part, report in self.reports.items()}


def _numbers(folder: JobFolder, part: str) -> Path:
    return folder.data / f"{part}.numbers"


class RowReader:
    """Reads the data sets that jobs name.

    Args:
        config: the server's configuration.
        deps: the host's APIs.
        guard: the service's threads.
        datasets: the data sets that owners upload.
        templates: renders rows with chat templates.
    """

    def __init__(
        self,
        config: ProviderConfig,
        deps: compat.Deps,
        guard: Guard,
        datasets: OwnDatasets,
        templates: TemplateChecker,
    ) -> None:
        self._config = config
        self._deps = deps
        self._guard = guard
        self._datasets = datasets
        self._templates = templates

    async def read(self, request: Draft, spec: JobSpec, folder: JobFolder | None) -> JobRows:
        """Check the rows of each of the job's data sets, and write them to `folder` unless it is None.

        Args:
            request: what the caller sent; gets notes about the rows.
            spec: the job.
            folder: a staged folder of the job.

        Raises:
            NotFound: no such data set.
            InvalidInput: a data set can't be read, or has too few or too many rows.
            InvalidRows: some rows can't be trained on, or the model's chat template can't render them.
        """
        found = JobRows({}, {})
        model = await sample_check.tokenizer_folder(spec, self._config, self._guard)
        samples: list[tuple[RowSource, RowSample]] = []
        domains: RowDomains | None = None
        for source in spec.row_sources():
            sample = None
            if model is not None and sample_check.kind_of(spec, source) is not None:
                sample = RowSample()
                samples.append((source, sample))
            mine = None
            if source.domains is not None:
                how = source.domains._replace(field=request.name(source.domains.field))
                mine = RowDomains(how, how.values) if domains is None else domains.of_others()
                domains = domains or mine
            report, origin = await self._copy(request, spec, source, folder, sample, mine)
            found = JobRows({**found.reports, source.part: report}, {**found.sources, source.part: origin})
        if isinstance(spec, TrainingSpec) and spec.data.domains is not None:
            counts = found.counts()
            named = zip(spec.data.domains, spec.data.parts("train"), strict=True)
            require_few_passes(spec.data, {domain.name: counts[part] for domain, part in named})
        if isinstance(spec, TrainingSpec) and domains is not None:
            require_few_passes(spec.data, domains.counts)
        await image_doors.check(request, spec, found.reports, self._config, self._guard)
        if model is not None:
            await sample_check.check(request, spec, model, samples, found.counts(), self._templates)
        if folder is not None:
            mode = 0o666 & ~self._config.privacy.umask
            await self._guard.in_state_dir(write_sources, folder, dict(found.sources), mode)
            if found.reports:
                await self._guard.in_state_dir(write_reports, folder, dict(found.reports), mode)
        return found

    async def _copy(
        self,
        request: Draft,
        spec: JobSpec,
        source: RowSource,
        folder: JobFolder | None,
        sample: RowSample | None,
        domains: RowDomains | None,
    ) -> tuple[RowsReport, DataSource]:
        field = request.name(source.field)
        admit = partial(ownership.refuse_private_source, field=field, dataset_id=source.dataset_id, config=self._config)
        found = await self._datasets.find(self._deps, callers.owner(), source.dataset_id, field)
        door = image_doors.of_job(self._config, self._deps, source.dataset_id, folder, found.path)
        found = found._replace(images=door)
        new_file, out, numbers = self._config.privacy.new_file, None, None
        if folder is not None:
            out = await self._guard.in_state_dir(new_file, folder.rows(source.part))
            if domains is not None:
                numbers = await self._guard.in_state_dir(new_file, _numbers(folder, source.part))
        try:
            report = await rows.copy_rows(
                self._deps, source.dataset_id, field, spec.recipe, source.format, out, self._config.max_rows,
                source.answered, source.kind, admit, source.columns, request.name(source.columns_field), found.pages,
                sample, None if domains is None else rows.DomainFile(domains, numbers), source.needs, door,
            )  # fmt: skip
        finally:
            for each in (out, numbers):
                if each is not None:
                    await self._guard.in_state_dir(each.close)
        if folder is not None and domains is not None:
            path = folder.domains_of_rows(source.part)
            await self._guard.in_state_dir(row_domains.join, _numbers(folder, source.part), domains.values, path)
        if (shortage := source.shortage(report.rows, report.notes)) is not None:
            raise InvalidInput(field, source.dataset_id, shortage)
        request.notes.extend(found.notes(field))
        request.notes.extend(f"{field}: {line}" for line in report.unread())
        if domains is not None:
            shares = ", ".join(f"{name} ({count:,} rows)" for name, count in domains.counts.items())
            request.notes.append(f"{request.name(source.domains.field)}: {shares}" if source.domains else shares)
        return report, found.source(report.rows)
