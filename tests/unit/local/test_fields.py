"""Server-side apply as sets of paths."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trimtab.local.fields import apply, built_in_list_keys, flatten, unflatten

NAMES = st.sampled_from(["a", "b", "spec"])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.text(max_size=2), st.lists(st.integers(0, 2)))
ITEMS = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("xyz")}, optional={"value": LEAVES}), unique_by=lambda i: i["name"]
)
TREES = st.recursive(
    LEAVES,
    lambda below: st.dictionaries(NAMES, below, max_size=3) | st.fixed_dictionaries({"env": ITEMS}),
    max_leaves=8,
)
OBJECTS = st.dictionaries(NAMES, TREES, max_size=3) | st.fixed_dictionaries({"env": ITEMS})


def applied(live: Any, desired: Any, owners: Any, manager: str = "m") -> tuple[Any, Any]:
    return apply(live, desired, owners, manager, built_in_list_keys)


@given(OBJECTS)
def test_flat_and_back(obj: dict[str, Any]) -> None:
    assert unflatten(flatten(obj, built_in_list_keys)) == obj


@given(OBJECTS, OBJECTS)
def test_the_only_manager_gets_what_it_applies(first: dict[str, Any], second: dict[str, Any]) -> None:
    once, owners = applied({}, first, {})
    assert once == first
    twice, owners = applied(once, second, owners)
    assert flatten(twice, built_in_list_keys) == flatten(second, built_in_list_keys)
    assert applied(twice, second, owners) == (twice, owners)


@given(OBJECTS, OBJECTS)
def test_what_another_manager_set_outlives_ours(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    live, owners = applied({}, mine, {}, "mine")
    live, owners = applied(live, theirs, owners, "theirs")
    live, owners = applied(live, {}, owners, "mine")
    assert flatten(live, built_in_list_keys) == flatten(theirs, built_in_list_keys)


def test_a_dropped_item_takes_what_was_defaulted_in_it() -> None:
    live, owners = applied({}, {"env": [{"name": "x"}, {"name": "y"}]}, {})
    live["env"][0]["value"] = "by default"
    live, _ = applied(live, {"env": [{"name": "y"}]}, owners)
    assert live == {"env": [{"name": "y"}]}
