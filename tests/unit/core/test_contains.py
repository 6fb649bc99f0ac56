"""What counts as already live."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_operator.core.contains import contains

LIVE = {
    "spec": {
        "replicas": 1,
        "template": {
            "spec": {
                "dnsPolicy": "ClusterFirst",
                "containers": [
                    {"name": "injected", "image": "sidecar"},
                    {
                        "name": "main",
                        "image": "a",
                        "args": ["x", "y"],
                        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                        "ports": [{"containerPort": 8000, "protocol": "TCP"}],
                        "resources": {"limits": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "2"}},
                        "volumeMounts": [
                            {"name": "v", "mountPath": "/a", "readOnly": True},
                            {"name": "v", "mountPath": "/b"},
                        ],
                    },
                ],
            }
        },
    }
}


def main(**fields: Any) -> dict[str, Any]:
    return {"spec": {"template": {"spec": {"containers": [{"name": "main", **fields}]}}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "a"},
        {"env": [{"name": "B", "value": "2"}]},
        {"ports": [{"containerPort": 8000}]},
        {"args": ["x", "y"]},
        {"resources": {"limits": {"cpu": "1000m", "memory": "1024Mi", "nvidia.com/gpu": 2}}},
        {"volumeMounts": [{"name": "v", "mountPath": "/b"}, {"name": "v", "mountPath": "/a"}]},
        {"command": [], "lifecycle": {}},
    ],
)
def test_live(fields: dict[str, Any]) -> None:
    assert contains(LIVE, main(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "b"},
        {"env": [{"name": "B", "value": "1"}]},
        {"env": [{"name": "C", "value": "1"}]},
        {"ports": [{"containerPort": 8001}]},
        {"args": ["x"]},
        {"args": ["y", "x"]},
        {"resources": {"limits": {"cpu": "1001m"}}},
        {"resources": {"requests": {"cpu": "1"}}},
        {"volumeMounts": [{"name": "v", "mountPath": "/b", "readOnly": True}]},
        {"command": ["x"]},
        {"image": None},
    ],
)
def test_not_live(fields: dict[str, Any]) -> None:
    assert not contains(LIVE, main(**fields))


def test_a_truth_value_is_no_number() -> None:
    assert contains({"a": 1.0}, {"a": 1})
    assert not contains({"a": 1}, {"a": True})
    assert not contains({"a": False}, {"a": 0})


JSON = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


@given(JSON, st.dictionaries(st.sampled_from("xyz"), JSON, min_size=1))
def test_a_value_contains_itself_and_keys_may_be_added(value: Any, more: dict[str, Any]) -> None:
    assert contains(value, value)
    assert contains({"v": value, **more}, {"v": value})
    assert not contains({"v": value}, {"v": value, **{key: [more] for key in more}})


def test_one_number_for_two_protocols_is_two_ports() -> None:
    names = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    assert contains({"ports": names[::-1]}, {"ports": names})
    assert contains({"ports": [*names, {"port": 80, "protocol": "TCP"}]}, {"ports": names})
    assert not contains({"ports": names[1:]}, {"ports": names})
