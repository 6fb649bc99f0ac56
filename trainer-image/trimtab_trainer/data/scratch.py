"""Names of downloaded files, made safe."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from trimtab_trainer.errors import UnsafeInput


def target_for(name: str, folder: Path) -> Path:
    """Where a remote file goes below `folder`; its parents are made.

    Raises:
        UnsafeInput: the name would lead out of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\0" in name:
        raise UnsafeInput(f"{name!r} is not a name for a file below a folder")
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def read_secret(folder: Path | None) -> dict[str, str]:
    """The keys of a mounted Secret: one file each. Hidden files are the kubelet's own."""
    if folder is None or not folder.is_dir():
        return {}
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {path.name: path.read_text(encoding="utf-8").strip() for path in files}
