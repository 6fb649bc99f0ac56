"""From `pvc://` and `file://` URIs to paths, with the table that the pod carries in `TRIMTAB_VOLUMES`."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from trimtab_trainer.config import VOLUMES_VARIABLE
from trimtab_trainer.errors import BadConfiguration, InputMissing


def local_path(uri: str) -> Path:
    """Directory or file that a `pvc://claim/path` or `file:///path` URI names; it need not exist.

    Raises:
        BadConfiguration: another scheme, or a path that climbs out of its volume.
        InputMissing: the claim is not mounted here.
    """
    parts = urlsplit(uri)
    path = PurePosixPath(unquote(parts.path).lstrip("/"))
    if ".." in path.parts:
        raise BadConfiguration(f"{uri}: '..' is not allowed in a path")
    if parts.scheme == "file" and not parts.netloc:
        return Path("/") / path
    if parts.scheme != "pvc":
        raise BadConfiguration(f"{uri}: expected pvc://CLAIM/PATH")
    table: dict[str, str] = json.loads(os.environ.get(VOLUMES_VARIABLE, "{}"))
    if parts.netloc not in table:
        raise InputMissing(f"{uri}: the claim {parts.netloc!r} is not mounted in this pod (mounted: {sorted(table)})")
    return Path(table[parts.netloc]) / path
