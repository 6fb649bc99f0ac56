"""The API server's audit log, read as it grows: who wrote what, and when."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

OPERATOR, USER = "operator", "admin"
"""The names of who is measured, and of who creates the jobs."""
_FIRST_ERROR = 400


@dataclass(frozen=True)
class Write:
    """One write that the API server carried out. Times in seconds since the epoch, by the server's clock."""

    user: str
    verb: str
    resource: str
    """With its subresource, as in `finetunejobs/status`."""
    name: str
    received: float
    answered: float


class AuditLog:
    """Every call of `read` takes in what is new; `writes` has it all, in the order of the answers."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0
        self.writes: list[Write] = []

    def read(self) -> list[Write]:
        """All writes so far."""
        with self._file.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                event = json.loads(line)
                if event["responseStatus"]["code"] < _FIRST_ERROR:
                    self.writes.append(_write(event))
        return self.writes

    def by(self, user: str, resource: str) -> list[Write]:
        """What one user wrote of one resource, so far."""
        return [write for write in self.read() if (write.user, write.resource) == (user, resource)]


def _write(event: dict[str, Any]) -> Write:
    target = event["objectRef"]
    parts = (target["resource"], target.get("subresource"))
    return Write(
        user=event["user"]["username"],
        verb=event["verb"],
        resource="/".join(part for part in parts if part),
        name=target.get("name", ""),
        received=datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp(),
        answered=datetime.fromisoformat(event["stageTimestamp"]).timestamp(),
    )
