"""Content-addressed folders that several pods may write at the same time."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from trimtab_trainer import manifest
from trimtab_trainer.errors import CorruptArtifact, InputMissing


def fresh_folder(path: Path) -> Path:
    """An empty folder; what an interrupted run of the same job left there is removed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def is_intact(folder: Path, digest: str) -> bool:
    """Whether the folder is there, whole, and has this digest."""
    try:
        manifest.verify(folder, digest)
    except (InputMissing, CorruptArtifact):
        return False
    return True


def publish_addressed(draft: Path, parent: Path, digest: str) -> Path:
    """Move a sealed draft to `parent/<hex of digest>`. Where another run was first and its folder is whole, that stays.

    Returns the final folder.
    """
    final = parent / digest.removeprefix("sha256:")
    try:
        draft.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if is_intact(final, digest):
            shutil.rmtree(draft)
        else:
            manifest.publish(draft, final)
    return final


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one step, so that a reader sees all of the old or all of the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
