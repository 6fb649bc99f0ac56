"""The data sets of a stage as local files with digests, and their records as one stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trimtab_trainer.config import DataSource, StageType
from trimtab_trainer.data.encode import Item, Place
from trimtab_trainer.data.fetch import Source, fetch
from trimtab_trainer.data.files import DataFile, container_suffix
from trimtab_trainer.data.formats import open_records
from trimtab_trainer.errors import InputMissing
from trimtab_trainer.manifest import file_sha256

# What lies beside data on the Hub and in people's folders, in a container that data could have too.
_ABOUT = ("readme", "license", "licence", "notice", "dataset_info", "dataset_dict", "state.json", "manifest.json")


@dataclass(frozen=True)
class DataSet:
    """One entry of `data`: its local files, and the sha256 of each."""

    source: DataSource
    files: list[DataFile]
    digests: list[str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.path.stat().st_size for file in self.files)

    def place(self, file: DataFile) -> str:
        """URI of one of the files, for messages; without a query, which can hold a signature."""
        uri = self.source.uri.partition("?")[0].rstrip("/")
        return uri if PurePosixPath(uri).name == PurePosixPath(file.name).name else f"{uri}/{file.name}"

    def identity(self) -> list[list[str]]:
        """Names and digests: what the data are, wherever they lie."""
        return [[file.name, digest] for file, digest in zip(self.files, self.digests, strict=True)]


@dataclass
class Recognised:
    """What was found in the files that were read: for each file its format, and how many records it gave."""

    formats: dict[int, str] = field(default_factory=dict)
    records: Counter[int] = field(default_factory=Counter)


def wanted_data_file(name: str) -> bool:
    """Whether a file of a folder is taken as data."""
    base = PurePosixPath(name).name.lower()
    return bool(container_suffix(name)) and not base.startswith(_ABOUT)


def fetch_all(sources: Sequence[DataSource], scratch: Path) -> list[DataSet]:
    """Fetch and hash every data set.

    Raises:
        InputMissing: something is not there.
        BadConfiguration: a URI can't be used.
    """
    found = []
    for i, source in enumerate(sources):
        secret = Path(source.secret_path) if source.secret_path else None
        files = fetch(Source(source.uri, source.revision, secret), "dataset", wanted_data_file, scratch / str(i))
        found.append(DataSet(source, files, [_digest(file) for file in files]))
    return found


def read_all(sets: Sequence[DataSet], stage: StageType, recognised: Recognised) -> Iterator[Item]:
    """Records of all data sets in order, each with its place; files are numbered through. Notes what was recognised."""
    number = 0
    for i, data in enumerate(sets):
        for file in data.files:
            place = data.place(file)
            known, items = open_records(DataFile(file.path, place), stage)
            recognised.formats[number] = known.name
            for line, record in items:
                recognised.records[number] += 1
                yield Place(i, number, place, line), record
            number += 1


def _digest(file: DataFile) -> str:
    try:
        return file_sha256(file.path)
    except PermissionError as error:
        raise InputMissing(f"{file.name}: {error.strerror} ({file.path}); make it readable") from error
