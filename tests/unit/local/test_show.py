"""Tables and lines."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from trimtab.manifests.admission import ADMISSIONS
from trimtab.progress import Json, Plain
from trimtab.table import age, document, table


def job(step: int, phase: str = "Running") -> dict[str, object]:
    progress = {"step": step, "totalSteps": 100, "tokensPerSecond": 900, "metrics": [{"name": "loss", "value": "1.5"}]}
    stages = [{"name": "base", "phase": phase, "progress": progress}]
    status = {"phase": phase, "reason": "Because", "remainingText": "5s", "progressText": f"{step}%", "stages": stages}
    return {
        "metadata": {"name": "demo", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "status": status,
    }


def test_a_table_has_the_printer_columns() -> None:
    columns = ADMISSIONS["FineTuneJob"].columns
    head, row = table([job(41)], columns, wide=False).splitlines()
    assert head.split() == ["NAME", "PHASE", "STAGE", "PROGRESS", "ETA", "REASON", "AGE"]
    assert row.split()[:5] == ["demo", "Running", "41%", "5s", "Because"]
    assert row.index("41%") == head.index("PROGRESS"), "an absent cell leaves its place empty"
    assert "ENDPOINT" in table([job(1)], columns, wide=True)


def test_documents() -> None:
    assert json.loads(document([job(1)], "json", single=True))["metadata"]["name"] == "demo"
    assert "kind: List" in document([job(1)], "yaml", single=False)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h0m"), (172_799, "47h59m"), (172_800, "2d")]
)
def test_ages(seconds: int, text: str) -> None:
    now = datetime.fromtimestamp(1_800_000_000, UTC)
    then = datetime.fromtimestamp(1_800_000_000 - seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert age(then, now) == text


def test_plain_lines_tell_changes_only(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Plain()
    for step in (1, 2, 3, 12, 13, 13):
        plain.job(job(step))
    plain.job(job(100, "Succeeded"))
    assert capsys.readouterr().err.splitlines() == [
        "demo/base: Running",
        "demo: Running (Because)",
        "demo/base: step 12/100, loss 1.5, 900 tokens/s, 5s left",
        "demo/base: Succeeded",
        "demo: Succeeded (Because)",
    ]


def test_a_guess_of_the_time_left_tells_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    guess = job(12)
    guess["status"] |= {"remainingText": "~5s", "progress": {"guessedAtTokensPerSecond": 880}}  # type: ignore[operator]
    Plain().job(guess)
    assert "900 tokens/s, ~5s left (a guess at 880 tokens/s)" in capsys.readouterr().err


def test_json_lines_are_statuses_that_changed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Json()
    for step in (1, 1, 2):
        lines.job(job(step))
    lines.error("cause; remedy")
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["type"] for line in out] == ["job", "job", "error"]
    assert out[1]["status"]["stages"][0]["progress"]["step"] == 2
