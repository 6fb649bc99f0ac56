"""How a run is shown: bars on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from trimtab_operator.core.kube import Object

_PERCENT_STEP = 10


class Display(Protocol):
    """Takes what happens; shows what is new in it."""

    def job(self, obj: Object) -> None:
        """A FineTuneJob has changed."""

    def endpoint(self, obj: Object) -> None:
        """A ModelEndpoint has changed."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def error(self, text: str) -> None:
        """Why the command fails: cause, place and remedy."""

    def pause(self) -> None:
        """Somebody else writes to the terminal from now on."""


def display(*, as_json: bool) -> Display:
    """The display that fits where the output goes."""
    if as_json:
        return Json()
    return Bars() if sys.stderr.isatty() else Plain()


class Plain:
    """One line a change, on standard error; a tenth of a stage's steps is a change."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}
        self._percent: dict[str, int] = {}

    def job(self, obj: Object) -> None:
        """Say which stage is where, and why nothing goes on."""
        status, name = obj.get("status", {}), obj["metadata"]["name"]
        for stage in status.get("stages", []):
            where = f"{name}/{stage['name']}"
            share = _share(stage)
            if share - self._percent.get(where, 0) >= _PERCENT_STEP and stage["phase"] == "Running":
                self._percent[where] = share
                self.note(f"{where}: {_speed(stage)}{_eta(status)}")
            self._say(where, stage["phase"] + (f": {stage['message']}" if stage.get("message") else ""))
        reason = status.get("reason")
        self._say(name, f"{status.get('phase', 'Pending')}{f' ({reason})' if reason else ''}")

    def endpoint(self, obj: Object) -> None:
        """Say whether it answers, and where."""
        status = obj.get("status", {})
        reason = f" ({status['reason']})" if status.get("reason") else ""
        url = f" at {status['url']}" if status.get("phase") == "Healthy" else ""
        self._say(f"endpoint {obj['metadata']['name']}", f"{status.get('phase', 'Progressing')}{reason}{url}")

    def note(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """One line."""
        self.note(f"error: {text}")

    def pause(self) -> None:
        """Nothing is drawn, so nothing is in the way."""

    def _say(self, what: str, text: str) -> None:
        if self._said.get(what) != text:
            self._said[what] = text
            self.note(f"{what}: {text}")


class Bars(Plain):
    """Plain lines above one bar for each running stage."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bars = Progress(*columns, console=self._console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def job(self, obj: Object) -> None:
        """Move the bars; say what bars do not show."""
        status, name = obj.get("status", {}), obj["metadata"]["name"]
        for stage in status.get("stages", []):
            where = f"{name}/{stage['name']}"
            self._percent[where] = 100  # the bar says it
            if stage["phase"] == "Running" and stage.get("progress"):
                if where not in self._tasks:
                    self._bars.start()
                    self._tasks[where] = self._bars.add_task(where, total=None, text="")
                progress = stage["progress"]
                self._bars.update(
                    self._tasks[where],
                    total=progress["totalSteps"],
                    completed=progress["step"],
                    text=_speed(stage) + _eta(status),
                )
            elif where in self._tasks:
                self._bars.remove_task(self._tasks.pop(where))
        super().job(obj)

    def note(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def pause(self) -> None:
        """Take the bars away."""
        self._bars.stop()


class Json:
    """One JSON object a line on standard output: each status as it is, when it changes."""

    def __init__(self) -> None:
        self._said: dict[str, Any] = {}

    def job(self, obj: Object) -> None:
        """The whole status."""
        self._status("job", obj)

    def endpoint(self, obj: Object) -> None:
        """The whole status."""
        self._status("endpoint", obj)

    def note(self, text: str) -> None:
        """A message."""
        self._write({"type": "note", "message": text})

    def error(self, text: str) -> None:
        """A message."""
        self._write({"type": "error", "message": text})

    def pause(self) -> None:
        """Nothing is drawn."""

    def _status(self, kind: str, obj: Object) -> None:
        namespace, name, status = obj["metadata"]["namespace"], obj["metadata"]["name"], obj.get("status", {})
        if self._said.get(f"{kind} {namespace}/{name}") != status:
            self._said[f"{kind} {namespace}/{name}"] = status
            self._write({"type": kind, "namespace": namespace, "name": name, "status": status})

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)


def _share(stage: Object) -> int:
    progress = stage.get("progress") or {}
    total = progress.get("totalSteps", 0)
    return 100 * int(progress.get("step", 0)) // total if total else 0


def _speed(stage: Object) -> str:
    """Step, loss and tokens a second, as far as they are known."""
    progress = stage.get("progress") or {}
    parts = [f"step {progress.get('step', 0)}/{progress.get('totalSteps', '?')}"]
    parts += [f"loss {each['value']}" for each in progress.get("metrics", []) if each["name"] == "loss"]
    if progress.get("tokensPerSecond"):
        parts.append(f"{progress['tokensPerSecond']} tokens/s")
    return ", ".join(parts)


def _eta(status: Object) -> str:
    """Time left of the running stage; a guess tells the speed that it assumes."""
    if not status.get("remainingText"):
        return ""
    speed = status.get("progress", {}).get("guessedAtTokensPerSecond")
    return f", {status['remainingText']} left" + (f" (a guess at {speed} tokens/s)" if speed is not None else "")
