"""The records of all data sets as one stream: recognised or worded by templates, with few-shot examples before them."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from trimtab_trainer.config import PrepareStage
from trimtab_trainer.data.encode import Item, Place
from trimtab_trainer.data.files import DataFile, Row, Rows, read_rows
from trimtab_trainer.data.formats import open_rows
from trimtab_trainer.data.mixture import EXAMPLES_STREAM, POOL_STREAM, TEMPLATE_STREAM
from trimtab_trainer.data.records import Conversation, InvalidRecord, Record, Wordings
from trimtab_trainer.data.references import reference_of
from trimtab_trainer.data.tasks import TaskTemplates
from trimtab_trainer.errors import BadData
from trimtab_trainer.prepare.sources import DataSet
from trimtab_trainer.settings import FewShot

POOL_SIZE = 512
"""Records of a data set that can be few-shot examples: at most so many, and at most half of it."""

Convert = Callable[[Row, int], Record]
"""A row as a record, by the template of that number."""


@dataclass
class Recognised:
    """What was found in the files that were read.

    Attributes:
        formats: of each file, by its number.
        records: how many each file gave.
        examples: file number and line of the records that can be few-shot examples of others.
        references: by file number and line, what a verifier compares the answer with; whoever stores it takes it out.
    """

    formats: dict[int, str] = field(default_factory=dict)
    records: Counter[int] = field(default_factory=Counter)
    examples: set[tuple[int, int]] = field(default_factory=set)
    references: dict[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    """A row of a data set, counted through its files from 0."""

    ordinal: int
    place: Place
    row: Row | InvalidRecord
    convert: Convert


def read_all(sets: Sequence[DataSet], stage: PrepareStage, recognised: Recognised) -> Iterator[Item]:
    """Records of all data sets in order, each with its place; files are numbered through. Notes what was recognised.

    `sets` are those of `stage.data` and, after them, those of its validation.

    Raises:
        BadData: a file is not of a format that the stage can learn from.
        BadConfiguration: a template is not valid.
    """
    first_file = 0
    for number, data in enumerate(sets):
        source = _Source(stage, number, data, first_file, recognised)
        yield from source.records()
        first_file += len(data.files)


def wording_count(stage: PrepareStage, number: int) -> int:
    """Texts that are made of each record of a data set: one for each pass over it, at most one for each template.

    A data set gives at most w_i / min_j w_j of its records to an epoch, so that bounds its passes.
    """
    if number >= len(stage.data):
        return 1
    source = stage.data[number]
    if not source.templates or source.held_out_task is not None:
        return 1
    mixed = [each.weight for each in stage.data if each.in_mixture]
    share = max(1.0, source.weight / min(mixed)) if source.in_mixture else 1.0
    return min(len(source.templates), math.ceil(stage.recipe.epochs * share))


class _Source:
    """One data set's rows, and how they become records."""

    def __init__(
        self, stage: PrepareStage, number: int, data: DataSet, first_file: int, recognised: Recognised
    ) -> None:
        source = data.source
        own = number < len(stage.data)
        place = f"data[{number}]" if own else f"validation.data[{number - len(stage.data)}]"
        self._stage, self._number, self._data = stage, number, data
        self._first_file, self._recognised = first_file, recognised
        self._templates = TaskTemplates(source.templates, place) if source.templates else None
        self._text_too = source.running_text or not source.in_mixture
        self._wordings = wording_count(stage, number)
        self._few_shot = source.few_shot
        self._verifier = stage.verifier

    def records(self) -> Iterator[Item]:
        """All records with their places."""
        examples = None
        if self._few_shot:
            seed, name = self._stage.recipe.seed, self._data.source.uri
            examples = _Examples(self._few_shot, seed, self._number, name, self._rows())
            self._recognised.examples |= examples.places
        for found in self._rows():
            self._recognised.records[found.place.file] += 1
            yield found.place, self._record(found, examples)

    def _rows(self) -> Iterator[_Found]:
        ordinal = 0
        for i, file in enumerate(self._data.files, self._first_file):
            name = self._data.place(file)
            rows, convert, format_name = self._open(DataFile(file.path, name))
            self._recognised.formats[i] = format_name
            for line, row in rows:
                yield _Found(ordinal, Place(self._number, i, name, line), row, convert)
                ordinal += 1

    def _open(self, file: DataFile) -> tuple[Rows, Convert, str]:
        templates = self._templates
        if templates is None:
            known, rows = open_rows(file, self._stage.type, self._text_too)
            return rows, lambda row, _: known.convert(row), known.name
        return read_rows(file, templates.fields), lambda row, t: templates.render(t, row), f"{len(templates)} templates"

    def _record(self, found: _Found, examples: _Examples | None) -> Record | InvalidRecord:
        if isinstance(found.row, InvalidRecord):
            return found.row
        try:
            if self._verifier is not None:
                place = (found.place.file, found.place.line)
                self._recognised.references[place] = reference_of(found.row, self._verifier)
            if self._templates is None and examples is None:
                return found.convert(found.row, 0)
            made = [self._conversation(found, found.row, each, examples) for each in range(self._wordings)]
        except InvalidRecord as error:
            return error
        return Wordings(tuple(made))

    def _conversation(self, found: _Found, row: Row, wording: int, examples: _Examples | None) -> Conversation:
        """The record in its wording of that number: the templates in an order of its own, examples drawn anew."""
        template = 0
        if self._templates is not None:
            key = [TEMPLATE_STREAM, self._stage.recipe.seed, self._number, found.ordinal]
            template = int(np.random.default_rng(key).permutation(len(self._templates))[wording])
        made = found.convert(row, template)
        if not isinstance(made, Conversation):
            raise InvalidRecord("fewShot needs conversations", "remove fewShot, or give messages")
        return made.with_examples(examples.draw(found.ordinal, wording, template, made)) if examples else made


class _Examples:
    """The records of one data set that others get as examples."""

    def __init__(self, settings: FewShot, seed: int, number: int, name: str, rows: Iterator[_Found]) -> None:
        """Choose them from `rows`, which is read to its end; memory holds `POOL_SIZE` of them."""
        self._settings = settings
        self._key = (EXAMPLES_STREAM, seed, number)
        generator = np.random.default_rng([POOL_STREAM, seed, number])
        count = 0

        def keyed() -> Iterator[tuple[float, int, _Found]]:
            nonlocal count
            for found in rows:
                count += 1
                if not isinstance(found.row, InvalidRecord):
                    yield generator.random(), found.ordinal, found

        chosen = [found for _, _, found in heapq.nsmallest(POOL_SIZE, keyed())[: max(2, count // 2)]]
        self._pool = [found for found in chosen if _single_turn(found, 0)]
        self.places = {(found.place.file, found.place.line) for found in self._pool}
        if len(self._pool) < 2:
            raise BadData(
                f"{name}: fewShot finds fewer than two records of one question and one answer, so there are no "
                f"examples to give; remove fewShot, or add such records"
            )

    def draw(self, ordinal: int, wording: int, template: int, question: Conversation) -> list[Conversation]:
        """Examples for a record, in the same template: never the record itself, nor one that asks the same."""
        generator = np.random.default_rng([*self._key, ordinal, wording])
        if generator.random() >= self._settings.proportion:
            return []
        wanted = self._settings.count or int(generator.integers(1, self._settings.maximum or 1, endpoint=True))
        asked = {message.content for message in question.messages}  # its own row would ask just that
        drawn: list[Conversation] = []
        for i in generator.permutation(len(self._pool)):
            found = self._pool[i]
            if len(drawn) == wanted:
                break
            example = _single_turn(found, template)
            if example is not None and example.messages[0].content not in asked:
                drawn.append(example)
                asked.add(example.messages[0].content)
        return drawn


def _single_turn(found: _Found, template: int) -> Conversation | None:
    """The record as one question and one answer; None where it is something else."""
    if isinstance(found.row, InvalidRecord):
        return None
    try:
        made = found.convert(found.row, template)
    except InvalidRecord:
        return None
    fits = isinstance(made, Conversation) and [message.role for message in made.messages] == ["user", "assistant"]
    return made if isinstance(made, Conversation) and fits else None
