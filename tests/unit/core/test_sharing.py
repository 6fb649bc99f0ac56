"""Sharing changes nothing that is read, whatever was met before and fell out again."""

from __future__ import annotations

import copy
import json

from hypothesis import given
from hypothesis import strategies as st

from trimtab_operator.core.sharing import Parts

SCALARS = st.none() | st.booleans() | st.sampled_from([0, 1, 1.0, 0.5, "", "a", "True", "x" * 65])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
)


@given(st.lists(JSON, max_size=12), st.integers(1, 4))
def test_a_copy_says_the_same(values: list[object], remembered: int) -> None:
    parts = Parts(remembered)
    before = copy.deepcopy(values)
    copies = [parts.share(value) for value in values]
    assert [json.dumps(each) for each in copies] == [json.dumps(each) for each in before]
    assert values == before


def test_equal_parts_are_one() -> None:
    parts = Parts()
    first, second = (parts.share({"name": name, "conditions": [{"type": "Ready"}]}) for name in ("a", "b"))
    assert first["conditions"] is second["conditions"]


def test_what_is_met_no_more_is_forgotten() -> None:
    parts = Parts(remembered=2)
    first = parts.share(["a"])
    assert parts.share(["a"]) is first
    for number in range(2):
        parts.share([number])
    assert parts.share(["a"]) is not first
