"""Verifiers: what counts as right, whatever a model writes."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.algorithms.verifier import build_check, last_number
from trimtab_trainer.verifier_settings import Verifier

GSM8K = "She has 3 * 4 = <<3*4=12>>12 eggs.\nSo she earns 12 * 1,000 = $12,000.\n#### 12,000"


def right(kind: str, answer: str, reference: str = "", **settings: Any) -> bool:
    return build_check(Verifier.model_validate({kind: settings}))(answer, reference)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (GSM8K, "12000"),
        ("The answer is 42.", "42"),
        ("1,2345", "2345"),
        ("1,234,567.5 or so", "1234567.5"),
        ("10-4", "4"),
        ("(3)-4", "4"),
        ("x = -4", "-4"),
        ("x=-4", "-4"),
        ("−4 °C", "-4"),
        ("about .5", "0.5"),
        ("I think...5", "5"),
        ("6.02e23", "6.02e23"),
        ("50 %", "50"),
        ("٤", None),
        ("none", None),
        ("", None),
        ("1e99999999999999999999", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3),
    st.sampled_from(["{}", "{:,}", "It is {}.", "first 7, then {:,} in all", "= {}\n"]),
)
def test_any_number_is_found_as_people_write_it(number: Decimal, form: str) -> None:
    assert last_number(form.format(number)) == number
    assert right("numericAnswer", form.format(number), f"#### {number}")
    assert not right("numericAnswer", form.format(number + 1), f"#### {number}")


@pytest.mark.parametrize(
    ("answer", "reference", "settings", "expected"),
    [
        (GSM8K, "#### 12000", {}, True),
        ("12000.0", "12,000", {}, True),
        ("9007199254740993", "9007199254740992", {}, False),  # equal as floats
        ("no idea", "4", {}, False),
        ("3.14", "3.14159", {}, False),
        ("3.14", "3.14159", {"relativeTolerance": 0.001}, True),
        ("3.14", "-3.14159", {"relativeTolerance": 0.001}, False),
        ("0.3", "0.2", {"absoluteTolerance": 0.1}, True),  # as floats they differ by more
        ("0.301", "0.2", {"absoluteTolerance": 0.1}, False),
        ("1e999999", "-1e999999", {"relativeTolerance": 1}, False),
        ("1e-999999999", "0", {"absoluteTolerance": 1e-9}, True),
        ("the answer is 4, not 5", "4", {"answerPattern": "answer is (?P<answer>[^,]*)"}, True),
        ("it is 4", "4", {"answerPattern": "answer is (?P<answer>[^,]*)"}, False),
    ],
)
def test_numeric_answer(answer: str, reference: str, settings: dict[str, Any], expected: bool) -> None:
    assert right("numericAnswer", answer, reference, **settings) is expected


@pytest.mark.parametrize(
    ("answer", "reference", "settings", "expected"),
    [
        (" Paris\n", "Paris", {}, True),
        ("Paris.", "Paris", {}, False),
        ("paris", "Paris", {}, False),
        ("PARIS", "paris", {"ignoreCase": True}, True),
        ("", "Paris", {}, False),
        ("It is (B).", "B", {"answerPattern": r"\((?P<answer>[A-D])\)"}, True),
        ("(A) is wrong: (B)", "B", {"answerPattern": r"\((?P<answer>[A-D])\)"}, False),
        ("(A) is wrong: (B)", "B", {"answerPattern": r"(?s).*\((?P<answer>[A-D])\)"}, True),
        ("It is B.", "B", {"answerPattern": r"\((?P<answer>[A-D])\)"}, False),
    ],
)
def test_exact_match(answer: str, reference: str, settings: dict[str, Any], expected: bool) -> None:
    assert right("exactMatch", answer, reference, **settings) is expected


@pytest.mark.parametrize(
    ("answer", "pattern", "expected"),
    [
        ("so: yes", "yes", True),
        ("so: yes", "^yes", False),
        ("a\nyes", "(?m)^yes$", True),
        ("YES", "(?i)yes", True),
        ("äöü", r"^\p{L}{3}$", True),
        ("", "^$", True),
    ],
)
def test_regular_expression(answer: str, pattern: str, expected: bool) -> None:
    assert right("regularExpression", answer, pattern=pattern) is expected


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"^\p{L}+$"},
        "age": {"type": "integer", "multipleOf": 0.5},
        "friends": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "Ada"}', True),
        (' {"name": "Ada", "age": 36, "friends": [{"name": "Ägir"}]}\n', True),
        ('{"name": "Ada", "friends": [{"age": 4}]}', False),
        ('{"name": "A1"}', False),
        ('{"name": "Ada", "age": 36.5}', False),
        ('{"name": "Ada", "more": 1}', False),
        ('```json\n{"name": "Ada"}\n```', False),
        ('{"name": "Ada"} {"name": "Ada"}', False),
        ("Ada", False),
        ("", False),
        ('{"name": "Ada", "age": NaN}', False),
        ('{"name": "Ada", "age": Infinity}', False),
        (f'{{"name": "Ada", "age": {"9" * 400}}}', False),  # larger than a float
        (f'{{"name": "Ada", "age": {"9" * 5000}}}', False),  # larger than Python reads
        ('{"name": "Ada", "age": 1e999}', False),
        ("[" * 100_000, False),
        ('{"friends": [' * 500 + "]}" * 500, False),
    ],
)
def test_json_schema(answer: str, expected: bool) -> None:
    for dialect in ({}, {"$schema": "http://json-schema.org/draft-07/schema#"}):
        assert right("jsonSchema", answer, schema={**dialect, **PERSON}) is expected


def test_no_schema_takes_more_than_linear_time() -> None:
    """Wherever the expression stands: `$ref` makes the library choose its validator anew."""
    slow = {"type": "string", "pattern": "^(a+)+$"}
    text = f'"{"a" * 50_000}!"'
    for dialect in ("https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#"):
        schema = {"$schema": dialect, **slow, "items": {"$ref": "#"}}
        assert not right("jsonSchema", text, schema=schema)
        assert not right("jsonSchema", f"[{text}]", schema={**schema, "type": ["array", "string"]})
        assert not right("jsonSchema", text, schema={"$schema": dialect, "anyOf": [slow, {"not": {"not": slow}}]})


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", "(x+x+)+y"])
def test_no_expression_takes_more_than_linear_time(pattern: str) -> None:
    """Each takes a backtracking engine longer than the universe is old."""
    text = "a" * 100_000 + "!"
    assert not right("regularExpression", text, pattern=pattern)
    assert not right("exactMatch", text, "a", answerPattern=f"(?P<answer>{pattern.replace('(', '(?:')})")


@given(st.text(), st.text())
def test_whatever_is_written_gets_a_verdict(answer: str, reference: str) -> None:
    for kind, settings in {
        "exactMatch": {"answerPattern": "(?P<answer>[0-9]+)"},
        "numericAnswer": {"relativeTolerance": 0.1},
        "regularExpression": {"pattern": "[a-z]+[0-9]"},
        "jsonSchema": {"schema": PERSON},
    }.items():
        assert right(kind, answer, reference, **settings) in (True, False)
