"""Warnings are read about children that have not got on for a while, seldom, and their words stay the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from trimtab_operator.core.complaint_reader import MOST_AT_ONCE, PAUSE_SECONDS, ComplaintReader
from trimtab_operator.core.complaints import Complaint, ComplaintBoard, Subject
from trimtab_operator.core.errors import Forbidden
from trimtab_operator.core.kube import Kind, Object, Ref
from trimtab_operator.core.settings import Settings

OWNER = Ref("FineTuneJob", "team", "job")
JOB = Subject("team", "uid-1")
QUOTA = "exceeded quota: compute, requested: pods=1, used: pods=2, limited: pods=2"
SETTINGS = Settings(complaint_seconds=20)


class Api:
    """Holds Events; any other use of it is an error."""

    def __init__(self) -> None:
        self.events: list[Object] = []
        self.asked: list[str] = []
        self.refuses = False

    async def list_objects(
        self, kind: Kind, *, namespace: str | None = None, labels: Any = None, fields: Mapping[str, str] | None = None
    ) -> list[Object]:
        assert (kind.kind, namespace, labels) == ("Event", "team", None)
        assert fields is not None
        assert fields["type"] == "Warning"
        self.asked.append(fields["regarding.uid"])
        if self.refuses:
            raise Forbidden(403, "Forbidden", "no right to list events")
        return self.events


def event(note: str, at: str, reason: str = "FailedCreate") -> Object:
    return {"metadata": {"name": "e"}, "reason": reason, "note": note, "deprecatedLastTimestamp": at}


@pytest.fixture
def api() -> Api:
    return Api()


def reader(api: Api, *subjects: Subject) -> tuple[ComplaintReader, ComplaintBoard]:
    board = ComplaintBoard()
    board.watch(OWNER, subjects or (JOB,))
    return ComplaintReader(api, board, SETTINGS), board  # type: ignore[arg-type]


async def test_patience_then_one_question_a_minute(api: Api) -> None:
    asking, board = reader(api)
    api.events = [event(f'Error creating: pods "job-0-abcde" is forbidden: {QUOTA}', "2026-01-01T00:00:02Z")]
    assert await asking.ask(0) == []
    assert await asking.ask(19) == []
    assert api.asked == []
    assert await asking.ask(20) == [OWNER]
    assert board.answers(OWNER) == {JOB: Complaint("FailedCreate", QUOTA)}
    assert await asking.ask(20 + PAUSE_SECONDS - 1) == []
    api.events = [event(f'Error creating: pods "job-0-vwxyz" is forbidden: {QUOTA}', "2026-01-01T00:01:00Z")]
    assert await asking.ask(20 + PAUSE_SECONDS) == [], "another pod's name is no news"
    assert len(api.asked) == 2


async def test_the_newest_warning_counts(api: Api) -> None:
    asking, board = reader(api)
    series = {"series": {"lastObservedTime": "2026-01-01T00:03:00.000000Z"}}
    api.events = [
        event("attach", "2026-01-01T00:02:00Z", "FailedAttachVolume"),
        event("mount", "2026-01-01T00:00:00Z", "FailedMount") | series,
    ]
    await asking.ask(0)
    await asking.ask(20)
    assert board.answers(OWNER) == {JOB: Complaint("FailedMount", "mount")}


async def test_a_child_that_got_on_meanwhile_waits_anew(api: Api) -> None:
    asking, board = reader(api)
    await asking.ask(0)
    board.watch(OWNER, ())
    await asking.ask(10)
    board.watch(OWNER, [JOB])
    await asking.ask(15)
    await asking.ask(30)
    assert api.asked == []


async def test_many_children_take_turns_and_a_refusal_ends_nothing(api: Api) -> None:
    subjects = [Subject("team", f"uid-{index}") for index in range(MOST_AT_ONCE + 1)]
    asking, _ = reader(api, *subjects)
    api.refuses = True
    await asking.ask(0)
    assert await asking.ask(20) == []
    assert len(api.asked) == MOST_AT_ONCE
    await asking.ask(25)
    assert sorted(api.asked) == sorted(subject.uid for subject in subjects)
