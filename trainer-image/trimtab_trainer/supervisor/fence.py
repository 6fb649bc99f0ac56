"""The fence between attempts: the newest attempt's number in a file beside the checkpoints.

Pods have no access to the API server, and a node that lost its network may run an old attempt for a while. So each
attempt writes its number, and whatever publishes something checks first that no newer one has come.
"""

from __future__ import annotations

import os
from pathlib import Path

from trimtab_trainer.errors import CorruptArtifact, Superseded


class Fence:
    """Attempt `attempt` of the stage in `folder`."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self.attempt = attempt
        self._file = folder / "attempt"

    def take(self) -> None:
        """Make this attempt the newest one; `Superseded` where a newer one has been here."""
        self.check()
        draft = self._file.with_name(f".attempt-{self.attempt}")
        draft.write_text(f"{self.attempt}\n", encoding="ascii")
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(self._file)
        self.check()

    def check(self) -> None:
        """Raise `Superseded` if a newer attempt has taken over."""
        try:
            newest = int(self._file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return
        except ValueError as error:
            raise CorruptArtifact(
                f"{self._file}: not a number; write the number of the last attempt into it"
            ) from error
        if newest > self.attempt:
            raise Superseded(
                f"{self._file}: attempt {newest} has taken over; attempt {self.attempt} stops and saves nothing more"
            )
