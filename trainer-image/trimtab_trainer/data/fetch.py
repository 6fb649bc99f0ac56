"""From a URI to local files. Volumes are read in place; all else is streamed into a scratch folder.

| URI | |
| --- | --- |
| `pvc://claim/path`, `file:///path` | a file, or a folder with all that lies below it |
| `https://host/path` | one file |
| `s3://`, `gs://`, `az://bucket/path` | an object, or all objects below a prefix |
| `hf://org/name`, `hf://org/name/path` | a repository, or a file or folder of it, at a pinned revision |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from trimtab_trainer.data import hub, objects, web
from trimtab_trainer.data.files import DataFile
from trimtab_trainer.errors import BadConfiguration, InputMissing, UnsafeInput
from trimtab_trainer.volumes import local_path

Wanted = Callable[[str], bool]
"""Says whether to take a file of a folder, by its relative name; may raise to refuse the whole folder."""


@dataclass(frozen=True)
class Source:
    """What to fetch. `secret` is a folder with one file a key; `revision` a commit of a Hub repository."""

    uri: str
    revision: str | None = None
    secret: Path | None = None


def fetch(source: Source, kind: Literal["model", "dataset"], wanted: Wanted, scratch: Path) -> list[DataFile]:
    """Local files of a source, sorted by name. A file that the URI itself names is always wanted.

    Args:
        source: what to fetch.
        kind: which of the Hub's name spaces `hf://` means.
        wanted: chooses the files of a folder.
        scratch: an own folder for what is downloaded; made when needed.

    Raises:
        BadConfiguration: the URI can't be used.
        InputMissing: nothing is there, or it may not be read.
        UnsafeInput: a name or a link leads out of the folder.
    """
    scheme = urlsplit(source.uri).scheme
    if source.secret is not None and scheme not in ("s3", "gs", "az", "hf"):
        raise BadConfiguration(f"{source.uri}: {scheme}:// takes no secret; remove secretRef")
    if source.revision is not None and scheme != "hf":
        raise BadConfiguration(f"{source.uri}: only hf:// has revisions; remove the revision")
    if scheme in ("pvc", "file"):
        files = _local(source.uri, wanted)
    elif scheme == "https":
        files = [web.download(source.uri, scratch)]
    elif scheme in ("s3", "gs", "az"):
        files = objects.download(source.uri, source.secret, wanted, scratch)
    elif scheme == "hf":
        files = hub.download(source.uri, source.revision, source.secret, kind, wanted, scratch)
    elif scheme == "oci":
        raise BadConfiguration(f"{source.uri}: oci:// is not supported yet; use hf://, s3://, gs://, az:// or pvc://")
    else:
        raise BadConfiguration(f"{source.uri}: unknown scheme; use hf://, s3://, gs://, az://, https:// or pvc://")
    if not files:
        raise InputMissing(f"{source.uri}: no usable file there; check the path")
    return sorted(files, key=lambda file: file.name)


def _local(uri: str, wanted: Wanted) -> list[DataFile]:
    path = local_path(uri)
    if path.is_file():
        parts = urlsplit(uri)
        if parts.scheme == "pvc":
            _require_inside(path, local_path(f"pvc://{parts.netloc}"))
        return [DataFile(path, path.name)]
    if not path.is_dir():
        raise InputMissing(f"{uri}: no such file or folder ({path}); check the uri")
    files = []
    for entry in sorted(path.rglob("*")):
        name = entry.relative_to(path)
        if any(part.startswith(".") for part in name.parts) or (entry.is_dir() and not entry.is_symlink()):
            continue
        if wanted(name.as_posix()):
            _require_inside(entry, path)
            if entry.is_file():
                files.append(DataFile(entry, name.as_posix()))
    return files


def _require_inside(path: Path, folder: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UnsafeInput(f"{path} is a link that leads out of {folder}; copy the file instead")
