"""Tokenise the rows in a job's folder into memory-mapped data sets for TRL.

Rows are read, rendered, tokenised and written in chunks, so memory does not grow with their number. The Arrow files go
to the job's cache folder, in shards that a later start of the job reuses (`shards`). The held-out rows are those of
`validation.jsonl`, or else a seeded choice of `options.validation_split` of the training rows (at least one if there
are two). The choice is of source rows: all that a row gives goes to the same part.
"""

import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.answers import DpoEncoder
from llama_stack_provider_moe.compute.data.domains import Domains, Split, mix
from llama_stack_provider_moe.compute.data.encoding import IGNORED, Encoder, Limit, SftEncoder
from llama_stack_provider_moe.compute.data.image_columns import check_images, with_pictures
from llama_stack_provider_moe.compute.data.rendering import Rendering, Tokens
from llama_stack_provider_moe.compute.data.row_counts import RowCounts
from llama_stack_provider_moe.compute.data.row_lengths import lengths_of
from llama_stack_provider_moe.compute.data.row_parts import RowParts
from llama_stack_provider_moe.compute.data.shards import Recipe, stretches
from llama_stack_provider_moe.compute.data.shown import shown
from llama_stack_provider_moe.compute.data.tokenising import Source, first_misfit, make_shards
from llama_stack_provider_moe.compute.runtime.context import AnySession, Session
from llama_stack_provider_moe.compute.runtime.cores import cores_of_leader
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir import row_domains
from llama_stack_provider_moe.jobdir.row_domains import DomainsOfRows
from llama_stack_provider_moe.spec import Data as SpecData
from llama_stack_provider_moe.spec import Domain, DPOSpec, MixedData, RewardSpec, SFTSpec, WritingSpec
from llama_stack_provider_moe.spec.generation import held_out_of

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images

SHOWN_TOKENS = 512  # of a row in the log, half of them from its beginning
Divide = Callable[[int], Mapping[int, str]]
_SHARDS = "rows"  # folder in the job's cache

_IDS = List(Value("int32"))
SFT_FEATURES = Features({"input_ids": _IDS, "labels": _IDS})
_SAID = List(Value("int8"))
DPO_FEATURES = Features(
    {"prompt_ids": _IDS, "chosen_ids": _IDS, "chosen_said": _SAID, "rejected_ids": _IDS, "rejected_said": _SAID}
)


@dataclass(frozen=True)
class Rows:
    """Rows for the trainer.

    Attributes:
        train: training rows.
        validation: held-out rows.
        counts: file of the job's data (train, validation, ...) -> what became of its rows.
        ends: ids of the tokens that end a learnt turn.
        domains: the domains of `data.domains`; None without them.
    """

    train: Dataset
    validation: Dataset | None
    counts: Mapping[str, RowCounts]
    ends: tuple[int, ...] = ()
    domains: Domains | None = None

    @property
    def total(self) -> RowCounts:
        """The counts of all files; row numbers of several files are of no use together."""
        return total(self.counts.values())


def sft_rows(
    session: Session[SFTSpec], tokenizer: PreTrainedTokenizerBase, vocabulary: int, images: "Images | None" = None
) -> Rows:
    """Rows with columns `input_ids` and `labels`, which is -100 for tokens without a loss.

    Args:
        session: the job's session.
        tokenizer: with a chat template.
        vocabulary: rows of the model's embedding; a greater token id would read past its end.
        images: turns the rows' images into tokens; None: no row has one.

    Raises:
        DataError: rows can't be rendered, or too many are too long.
    """
    options = session.spec.options
    limit = Limit(options.max_length, options.truncate)
    encoder = SftEncoder(tokenizer, Rendering.of(options), limit, session.spec.data.train_on_input, images=images)
    maker = Maker(session, cache_folder(session), encoder, with_pictures(SFT_FEATURES, images), vocabulary)
    train, validation, domains = maker.all_rows(session.spec.data)
    check_images(session, train, images)
    row = train[0]
    labelled = Tokens(row["input_ids"], [label != IGNORED for label in row["labels"]])
    show_plan(session, encoder, maker.counts)
    show_row(session, encoder, "the first row, what is learnt marked", labelled)
    return Rows(train, validation, maker.counts, ends_of(encoder, maker.counts), domains)


def dpo_rows(
    session: Session[DPOSpec] | Session[RewardSpec],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    images: "Images | None" = None,
    kind: type[DpoEncoder] = DpoEncoder,
) -> Rows:
    """Rows with the columns of `DpoEncoder`; a prompt with an answer has at most `options.max_length` tokens.

    Args:
        session: the job's session.
        tokenizer: with a chat template.
        vocabulary: rows of the model's embedding; a greater token id would read past its end.
        images: turns the prompts' images into tokens; None: no row has one.
        kind: of encoder.

    Raises:
        DataError: rows can't be rendered, or too many are too long.
    """
    options = session.spec.options
    encoder = kind(tokenizer, Rendering.of(options), Limit(options.max_length, options.truncate), images=images)
    maker = Maker(session, cache_folder(session), encoder, with_pictures(DPO_FEATURES, images), vocabulary)
    train, validation, domains = maker.all_rows(session.spec.data)
    check_images(session, train, images)
    show_plan(session, encoder, maker.counts)
    row = train[0]
    for which in ("chosen", "rejected"):
        prompt, answer = row["prompt_ids"], row[f"{which}_ids"]
        tokens = Tokens([*prompt, *answer], [False] * len(prompt) + [bool(said) for said in row[f"{which}_said"]])
        show_row(session, encoder, f"the first pair, {which}", tokens)
    return Rows(train, validation, maker.counts, ends_of(encoder, maker.counts), domains)


def total(counts: Iterable[RowCounts]) -> RowCounts:
    """The sum of several counts, in the order of their rows."""
    whole = RowCounts()
    for each in counts:
        whole.merge(each)
    return whole


def ends_of(encoder: Encoder, counts: Mapping[str, RowCounts]) -> tuple[int, ...]:
    """Ids of the tokens that end what was learnt: a turn of the chat template, or a plain text."""
    whole, eos = total(counts.values()), encoder.tokenizer.eos_token_id
    ends = encoder.renderer.ends() if whole.texts < whole.source else []
    texts = [eos] if whole.texts and isinstance(eos, int) else []
    return tuple(dict.fromkeys([*ends, *texts]))


def show_plan(session: AnySession, encoder: Encoder, counts: Mapping[str, RowCounts]) -> None:
    """Write to output.log how rows were rendered, unless all are plain texts."""
    whole = total(counts.values())
    if whole.texts < whole.source:
        for line in encoder.renderer.plan():
            session.show(f"learns    {line}")
    if whole.rendering:
        session.show(f"rendered  {', '.join(f'{name}: {count:,}' for name, count in whole.rendering.items())}")


def show_row(session: AnySession, encoder: Encoder, what: str, tokens: Tokens) -> None:
    """Write one row to output.log as it is learnt; of a long one its beginning and its end."""
    half = SHOWN_TOKENS // 2
    pieces = [tokens]
    if len(tokens.ids) > SHOWN_TOKENS:
        pieces = [Tokens(tokens.ids[:half], tokens.said[:half]), Tokens(tokens.ids[-half:], tokens.said[-half:])]
    left_out = f"\n... {len(tokens.ids) - SHOWN_TOKENS:,} tokens more ...\n"
    session.show(f"row       {what}:\n{left_out.join(shown(piece, encoder.tokenizer) for piece in pieces)}")


def cache_folder(session: AnySession) -> Path:
    """The folder for the job's shards; whatever else an earlier start left in the cache is deleted."""
    folder = Path(session.cache) / _SHARDS
    if session.peers.leads:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.iterdir():
            if path.is_dir() and not path.is_symlink() and path != folder:
                shutil.rmtree(path, ignore_errors=True)
            elif path != folder:
                path.unlink()
    session.peers.wait()
    return folder


def held_out(count: int, share: float, seed: int) -> frozenset[int]:
    """The indices of the held-out rows among `count`: the same for the same seed, whatever the other settings."""
    return frozenset(random.Random(seed).sample(range(count), held_out_of(count, share)))


def held_out_of_classes(classes: Sequence[int], share: float, seed: int) -> Iterator[int]:
    """The indices of the held-out rows, some of each class.

    Args:
        classes: of each row.
        share: of each class's rows, as in `held_out`.
        seed: of the choice.
    """
    for each in sorted({*classes}):
        its = [index for index, found in enumerate(classes) if found == each]
        yield from (its[place] for place in held_out(len(its), share, seed))


@dataclass
class Maker:
    """Makes data sets from the job's files, counts their rows, and reports what was cut and left out.

    Attributes:
        session: the job's session.
        folder: for the shards.
        encode: makes the columns of rows.
        features: types of the columns.
        vocabulary: rows of the model's embedding.
        cut_at: the lengths at which rows are cut, for messages; None: `options.max_length`.
        classes: the class of each row of a file, of which each has held-out rows; None: there are no classes.
        counts: file -> what became of its rows.
    """

    session: AnySession
    folder: Path
    encode: Encoder
    features: Features
    vocabulary: int
    cut_at: str | None = None
    classes: Callable[[Path], list[int]] | None = None
    counts: dict[str, RowCounts] = field(default_factory=dict)

    def all_rows(self, data: SpecData) -> tuple[Dataset, Dataset | None, Domains | None]:
        """The job's training rows, its held-out rows, and its domains.

        Args:
            data: the settings of its data sets.

        Raises:
            DataError: see `split`.
            InvalidInput: see `mix`.
        """
        if data.domain_column is not None:
            return mix(data, self._by_column(data), lengths_of)
        if data.domains is None:
            return *self.split(data, "train", "validation"), None
        parts = zip(data.domains, data.parts("train"), data.parts("validation"), strict=True)
        return mix(data, {domain.name: self.split(domain, *each) for domain, *each in parts}, lengths_of)

    def _by_column(self, data: SpecData) -> dict[str, Split]:
        """Name of each domain -> its training rows and its held-out rows; a column of the rows names it."""
        assert data.dataset_id is not None, "a column is of one data set"
        found = row_domains.read(self.session.folder.domains_of_rows("train"))
        made = self._make("train", data.dataset_id, partial(self._parts, found, "train"))
        if data.validation_dataset_id is not None:
            others = row_domains.read(self.session.folder.domains_of_rows("validation"))
            made |= self._make("validation", data.validation_dataset_id, partial(self._parts, others, "validation"))
        if empty := [name for name in found.names if f"train-{name}" not in made]:
            raise DataError(f"dataset {data.dataset_id!r}: no row of domain {empty[0]!r} is left to train on")
        return {
            name: (made[f"train-{name}"], self._limited(made.get(f"validation-{name}"), data, "train"))
            for name in found.names
        }

    def _parts(self, rows: DomainsOfRows, part: str, count: int) -> RowParts:
        """The part of each row: `train-NAME`, or `validation-NAME` of those that are held out of a domain's rows."""
        if len(rows.numbers) != count:
            raise DataError(f"{part}.domains has {len(rows.numbers):,} rows, and {part}.jsonl {count:,}")
        numbers = bytearray(rows.numbers)
        names = [f"{part}-{name}" for name in rows.names]
        if part == "train" and self.session.spec.data.validation_dataset_id is None:
            options = self.session.spec.options
            names += [f"validation-{name}" for name in rows.names]
            for domain in range(len(rows.names)):
                its = [index for index, number in enumerate(rows.numbers) if number == domain]
                for place in held_out(len(its), options.validation_split, options.seed):
                    numbers[its[place]] += len(rows.names)
        return RowParts(tuple(names), bytes(numbers))

    def split(
        self, data: SpecData | Domain | MixedData, part: str, held_out_part: str
    ) -> tuple[Dataset, Dataset | None]:
        """The training rows and the held-out rows of one of the job's data sets.

        Args:
            data: the settings of the data set.
            part: name of the file with its training rows (see `RowSource`).
            held_out_part: name of the file with its validation rows, if it has a separate set.

        Raises:
            DataError: rows can't be rendered, too many are too long, or none is left.
        """
        assert data.dataset_id is not None, "only a block with domains has none"
        if data.validation_dataset_id is not None:
            made = self._make(part, data.dataset_id, None)
            made |= self._make(held_out_part, data.validation_dataset_id, None)
        else:
            made = self._make(part, data.dataset_id, partial(self._held_out, part, held_out_part))
        if part not in made:
            raise DataError(f"dataset {data.dataset_id!r}: no row is left to train on")
        return made[part], self._limited(made.get(held_out_part), data, part)

    def _held_out(self, part: str, held_out_part: str, rows: int) -> Mapping[int, str]:
        share, seed = self.session.spec.options.validation_split, self.session.spec.options.seed
        if self.classes is None:
            return dict.fromkeys(held_out(rows, share, seed), held_out_part)
        found = self.classes(self.session.folder.rows(part))
        return dict.fromkeys(held_out_of_classes(found, share, seed), held_out_part)

    def _limited(self, validation: Dataset | None, data: SpecData | Domain | MixedData, part: str) -> Dataset | None:
        """The held-out rows, as many as are evaluated; warns if there are none though the job asks for some."""
        spec, peers = self.session.spec, self.session.peers
        asked = data.validation_dataset_id is not None or spec.options.validation_split > 0
        if validation is None and asked:
            single = self.counts[part].source == 1 and data.validation_dataset_id is None
            why = "a single row can't be split" if single else "every held-out row was left out"
            self.session.say(f"{why}; no row is held out", "warning")
        if validation is not None and spec.training.max_validation_steps:
            most = spec.training.max_validation_steps * spec.training.batch_size * peers.size
            validation = validation.select(range(min(most, len(validation))))
        return validation

    def _make(self, part: str, dataset_id: str, divide: Divide | None) -> dict[str, Dataset]:
        """The data sets of one file, by part; parts without a row are missing. Rank 0 writes, all processes read.

        Args:
            part: name of the file.
            dataset_id: for errors.
            divide: from the number of rows, index of a row -> its part, for rows of other parts; None: there are none.
        """
        written = self._write(part, dataset_id, divide) if self.session.peers.leads else None
        agreed = self.session.peers.agreed(written)
        assert agreed is not None
        files, counts = agreed
        self.counts[part] = counts
        self._report(dataset_id, counts)
        return {
            each: concatenate_datasets([Dataset.from_file(file) for file in paths]) for each, paths in files.items()
        }

    def _write(self, part: str, dataset_id: str, divide: Divide | None) -> tuple[dict[str, list[str]], RowCounts]:
        session, path = self.session, self.session.folder.rows(part)
        if self.encode.images is None and any(session.folder.images.glob("*")):
            raise DataError(f"dataset {dataset_id!r}: its rows have images, on which recipe "
                            f"{session.spec.recipe!r} does not train as this job is set up")  # fmt: skip
        with liveness.stage("reading rows"):
            found = list(stretches(path))
            parts = {} if divide is None else divide(sum(each.count for each in found))
        recipe = Recipe(self.encode, self.features, self.vocabulary)
        helpers = cores_of_leader(session.peers.local_size)
        made = make_shards(recipe, Source(path, part, found, parts), self.folder, helpers, session.say)
        if (misfit := first_misfit(made)) is not None:
            raise DataError(
                f"dataset {dataset_id!r}, row {misfit.row}: the tokenizer gives id {misfit.token}, but the model's "
                f"embedding has {self.vocabulary} rows; tokenizer and model do not match"
            )
        counts = total(shard.counts for _, shard in made)
        self._require(dataset_id, counts)
        files: dict[str, list[str]] = {}
        for task, shard in made:
            for each in shard.files:
                files.setdefault(each, []).append(str(task.file(each)))
        return files, counts

    def _require(self, dataset_id: str, counts: RowCounts) -> None:
        """Check that no row was refused, and not too many were left out."""
        if counts.refused.count:
            raise DataError(
                f"dataset {dataset_id!r}: {counts.refused.count} row(s) can't be trained on: {counts.refused.text()}"
            )
        options, dropped = self.session.spec.options, counts.dropped.count
        if dropped > options.max_dropped * counts.source:
            more_room = "Raise options.max_length"
            if isinstance(self.session.spec, WritingSpec):
                block = self.session.spec.generating_block
                more_room = f"Lower {block}.max_completion_length, raise options.max_length"
            raise DataError(
                f"dataset {dataset_id!r}: {dropped} of {counts.source} rows ({dropped / counts.source:.1%}) would be "
                f"left out, more than options.max_dropped = {options.max_dropped:g} allows: {counts.dropped.text()}. "
                f"{more_room} or options.max_dropped, shorten these rows, or cut their beginnings with "
                "options.truncate 'left'"
            )

    def _report(self, dataset_id: str, counts: RowCounts) -> None:
        options, what = self.session.spec.options, f"{counts.source} rows of {dataset_id!r}"
        if counts.cut:
            end = "beginnings" if options.truncate == "left" and self.cut_at is None else "ends"
            cut_at = self.cut_at or f"options.max_length = {options.max_length} tokens; their {end} were cut off"
            system = f", {counts.system_cut} of them with a system message" if counts.system_cut else ""
            self.session.say(f"{counts.cut} of {what} were longer than {cut_at}{system}", "warning")
        if counts.dropped.count:
            self.session.say(
                f"{counts.dropped.count} of {what} were left out ({counts.dropped.count / counts.source:.1%}; "
                f"options.max_dropped allows {options.max_dropped:.1%}): {counts.dropped.text()}",
                "warning",
            )
