"""The objects on disk: SQLite, so that each write is whole or absent after `kill -9`, and others may read meanwhile."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trimtab_operator.core.kube import Object, Ref

_TABLE = """
CREATE TABLE IF NOT EXISTS objects (
    kind TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
    version INTEGER NOT NULL, object TEXT NOT NULL, owners TEXT NOT NULL,
    PRIMARY KEY (kind, namespace, name)
) WITHOUT ROWID
"""


@dataclass
class Record:
    """An object and the fields that each manager owns."""

    obj: Object
    owners: dict[str, list[str]] = field(default_factory=dict)


class State:
    """The table of objects in one file."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the file, which a writer makes where it is absent.

        Raises:
            sqlite3.OperationalError: there is no such file to read.
        """
        mode = "ro" if read_only else "rwc"
        self._database = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=30
        )
        if not read_only:
            path.chmod(0o600)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(_TABLE)

    def load(self) -> Iterator[tuple[Ref, Record]]:
        """Every object, by kind, namespace and name."""
        rows = self._database.execute("SELECT kind, namespace, name, object, owners FROM objects ORDER BY 1, 2, 3")
        for kind, namespace, name, obj, owners in rows:
            yield Ref(kind, namespace, name), Record(json.loads(obj), json.loads(owners))

    def version(self) -> int:
        """The newest resourceVersion ever given."""
        return int(self._database.execute("PRAGMA user_version").fetchone()[0])

    def put(self, ref: Ref, record: Record) -> None:
        """Write one object; its resourceVersion becomes the newest."""
        version = int(record.obj["metadata"]["resourceVersion"])
        with self._transaction(version):
            self._database.execute(
                "REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?)",
                (ref.kind, ref.namespace, ref.name, version, json.dumps(record.obj), json.dumps(record.owners)),
            )

    def remove(self, ref: Ref, version: int) -> None:
        """Remove one object at that resourceVersion."""
        with self._transaction(version):
            self._database.execute(
                "DELETE FROM objects WHERE kind = ? AND namespace = ? AND name = ?", (ref.kind, ref.namespace, ref.name)
            )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _transaction(self, version: int) -> sqlite3.Connection:
        self._database.execute("BEGIN IMMEDIATE")
        self._database.execute(f"PRAGMA user_version = {version:d}")
        return self._database
