"""The data sets of a stage as local files with digests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trimtab_trainer.config import DataSource
from trimtab_trainer.data.fetch import Source, fetch
from trimtab_trainer.data.files import DataFile, container_suffix
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


def _digest(file: DataFile) -> str:
    try:
        return file_sha256(file.path)
    except PermissionError as error:
        raise InputMissing(f"{file.name}: {error.strerror} ({file.path}); make it readable") from error
