"""Who may start on this machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trimtab.local.slots import Demand, Machine, admit, demand

TWO_CORES = Machine(2, 1)


def train(uid: str, cores: float = 2, group: str | None = None, accelerators: int = 0) -> Demand:
    return Demand(uid, group or uid, False, cores, accelerators)


def serve(uid: str, cores: float = 1, accelerators: int = 0) -> Demand:
    return Demand(uid, uid, True, cores, accelerators)


def admitted(running: list[Demand], waiting: list[Demand], hold: bool = False) -> list[str]:
    return [uid for uid, why in admit(running, waiting, TWO_CORES, hold_serving=hold).items() if why is None]


def test_parallel_branches_queue_in_order() -> None:
    assert admitted([], [train("a"), train("b")]) == ["a"]
    assert admitted([], [train("a", 1), train("b", 1), train("c", 1)]) == ["a", "b"]
    assert admitted([train("a", 1)], [train("b", 2), train("c", 1)]) == [], "c does not overtake b"


def test_one_runs_even_where_it_asks_for_more_than_there_is() -> None:
    assert admitted([], [train("a", 64)]) == ["a"]
    assert admitted([train("x", 1)], [train("a", 64)]) == []


def test_the_pods_of_one_job_start_together() -> None:
    pair = [train("a-0", 2, "a"), train("a-1", 2, "a")]
    assert admitted([], pair) == ["a-0", "a-1"]
    assert admitted(pair[:1], pair[1:]) == ["a-1"]
    assert admitted([train("x", 1)], pair) == []


def test_serving_waits_for_training_but_not_for_serving() -> None:
    assert admitted([], [serve("s"), serve("t"), serve("u")]) == ["s", "t", "u"]
    assert admitted([], [serve("s"), train("a")], hold=True) == ["a"]
    assert admitted([serve("s"), serve("t"), serve("u")], [train("a")]) == ["a"]


def test_accelerators_are_never_shared() -> None:
    assert admitted([serve("s", 1, 1)], [train("a", 1, accelerators=1)]) == []
    why = admit([], [train("a", 1, accelerators=8)], TWO_CORES, hold_serving=False)["a"]
    assert why == "Insufficient accelerators: 8 asked for, 1 of 1 free here"


DEMANDS = st.builds(
    lambda n, group, serving, cores, accelerators: Demand(str(n), group, serving, cores, accelerators),
    st.integers(0, 10**6),
    st.sampled_from("abcdef"),
    st.just(False),
    st.floats(0.1, 8),
    st.integers(0, 1),
)


@given(st.lists(DEMANDS, min_size=1, unique_by=lambda d: d.uid))
def test_something_always_runs_and_groups_are_whole(waiting: list[Demand]) -> None:
    verdicts = admit([], waiting, Machine(2, 10**6), hold_serving=False)
    assert any(why is None for why in verdicts.values())
    for group in {pod.group for pod in waiting}:
        assert len({verdicts[pod.uid] is None for pod in waiting if pod.group == group}) == 1


def test_demands_are_read_from_pods() -> None:
    owner = {"kind": "Job", "uid": "j", "controller": True}
    metadata = {"uid": "u", "ownerReferences": [owner]}
    container = {"resources": {"limits": {"cpu": "1500m", "nvidia.com/gpu": 1}, "requests": {"cpu": "500m"}}}
    assert demand({"metadata": metadata, "spec": {"containers": [container]}}, TWO_CORES) == Demand(
        "u", "j", False, 0.5, 1
    )
    assert demand({"metadata": metadata, "spec": {"containers": [{}]}}, TWO_CORES).cores == 2
    assert demand({"metadata": {"uid": "s"}, "spec": {"containers": [{}]}}, TWO_CORES) == Demand("s", "s", True, 1, 0)
