"""Conditions keep their transition time, and texts their bounds."""

from datetime import UTC, datetime, timedelta, timezone

from trimtab_operator.core.conditions import MAX_MESSAGE, find_condition, set_condition, shorten, timestamp

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
LATER = FIRST + timedelta(hours=1)


def test_the_transition_time_moves_with_the_status_only() -> None:
    start = set_condition([], "Ready", False, "Starting", "soon", 1, FIRST)
    assert start == [
        {
            "type": "Ready",
            "status": "False",
            "reason": "Starting",
            "message": "soon",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ]
    same = set_condition(start, "Ready", False, "StillStarting", "sooner", 2, LATER)
    assert same == [{**start[0], "reason": "StillStarting", "message": "sooner", "observedGeneration": 2}]
    assert set_condition(same, "Ready", False, "StillStarting", "sooner", 2, LATER) == same
    for status, text in ((True, "True"), (None, "Unknown")):
        (flipped,) = set_condition(same, "Ready", status, "R", "", 2, LATER)
        assert (flipped["status"], flipped["lastTransitionTime"]) == (text, "2026-01-01T01:00:00Z")


def test_the_order_stays_and_the_argument_too() -> None:
    two = set_condition(set_condition([], "A", True, "R", "", 1, FIRST), "B", True, "R", "", 1, FIRST)
    copy = [dict(entry) for entry in two]
    changed = set_condition(two, "A", False, "R", "", 1, LATER)
    assert two == copy
    assert [(entry["type"], entry["status"]) for entry in changed] == [("A", "False"), ("B", "True")]
    assert find_condition(changed, "B") == two[1]
    assert find_condition(changed, "C") is None


def test_long_texts_keep_both_ends() -> None:
    (entry,) = set_condition([], "A", True, "R", "a" * 5000 + "b" * 5000, 1, FIRST)
    assert len(entry["message"]) == MAX_MESSAGE
    assert entry["message"][0] + entry["message"][-1] == "ab"
    assert shorten("x" * 10, 10) == "x" * 10
    assert len(shorten("x" * 11, 10)) == 10


def test_times_are_written_in_utc() -> None:
    assert timestamp(datetime(2026, 1, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))) == "2026-01-01T00:03:04Z"
