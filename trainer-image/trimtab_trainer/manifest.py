"""Write-once folders with a manifest: what makes an artifact an artifact.

`manifest.json` lists every other file of the folder with size and sha256, and the lineage. The artifact's digest is the
sha256 of the bytes of `manifest.json`, so one string fixes all of it. Imports no torch; serving uses it too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trimtab_trainer.errors import CorruptArtifact, InputMissing
from trimtab_trainer.settings import Contract

MANIFEST = "manifest.json"
Kind = Literal["model", "adapter", "prepared", "checkpoint", "reward", "reference", "rollout"]


class FileEntry(Contract):
    """Size in bytes and hex sha256 of one file."""

    size: int
    sha256: str


class Manifest(Contract):
    """Contents of `manifest.json`. `files` maps a path relative to the folder, with `/`, to its entry."""

    version: Literal[1] = 1
    kind: Kind
    files: dict[str, FileEntry]
    lineage: dict[str, Any] = {}


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(folder: Path) -> str:
    """`sha256:…` of the folder's manifest, not verified."""
    try:
        return f"sha256:{file_sha256(folder / MANIFEST)}"
    except FileNotFoundError as error:
        raise InputMissing(f"{folder}: no {MANIFEST}; the folder is not a finished artifact") from error


def seal(folder: Path, kind: Kind, lineage: dict[str, Any]) -> str:
    """Hash every file below `folder`, write its manifest, flush all of it to disk; returns the digest."""
    entries: dict[str, FileEntry] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        entries[path.relative_to(folder).as_posix()] = FileEntry(size=path.stat().st_size, sha256=file_sha256(path))
        _fsync(path)
    manifest = Manifest(kind=kind, files=entries, lineage=lineage)
    target = folder / MANIFEST
    target.write_text(manifest.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
    _fsync(target)
    _fsync(folder)
    return manifest_digest(folder)


def publish(draft: Path, final: Path) -> None:
    """Rename a sealed draft to its final name; both lie on one file system. An existing folder is replaced whole."""
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    _fsync(final.parent)


def read_manifest(folder: Path) -> Manifest:
    """Parse the folder's manifest; `CorruptArtifact` where it can't be."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise InputMissing(f"{folder}: no {MANIFEST}; the folder is not a finished artifact") from error
    except ValidationError as error:
        raise CorruptArtifact(f"{folder / MANIFEST}: not a manifest ({error.error_count()} errors)") from error


def verify(folder: Path, digest: str | None = None) -> Manifest:
    """Check that the folder holds exactly what its manifest says, and the manifest's own digest where one is given.

    Raises:
        InputMissing: there is no manifest.
        CorruptArtifact: a file is missing, too many, or has other bytes; the message names the file.
    """
    if digest is not None and (found := manifest_digest(folder)) != digest:
        raise CorruptArtifact(f"{folder / MANIFEST}: digest is {found}, expected {digest}")
    manifest = read_manifest(folder)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if extra := present - manifest.files.keys():
        raise CorruptArtifact(f"{folder / min(extra)}: not listed in {MANIFEST}")
    for name, entry in manifest.files.items():
        path = folder / name
        if name not in present:
            raise CorruptArtifact(f"{path}: listed in {MANIFEST} but missing")
        if path.stat().st_size != entry.size or file_sha256(path) != entry.sha256:
            raise CorruptArtifact(f"{path}: its bytes differ from {MANIFEST}; restore the file or run the stage again")
    return manifest


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
