"""`train.autotune`: the choice by hand, the search with its failures, and a real stage that tunes itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.engine import stages

from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.errors import BadConfiguration, Killed, Preempted, StageError, Stalled, TrainingFailed
from trimtab_trainer.supervisor import autotune
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.tuning import AUTOTUNE_FILE, GAIN, MARGIN, Measured, Tuning, choose, next_size, table

LIMIT = 1000


def measured(size: int, seconds: float = 1.0, *needs: int, may_double: bool = True) -> Measured:
    return Measured(
        micro_batch_size=size, seconds_per_row=seconds, memory_bytes=100, needs=list(needs or (100,)),
        limit_bytes=LIMIT, may_double=may_double,
    )  # fmt: skip


def test_the_choice_by_hand() -> None:
    assert choose([measured(1, 1.0), measured(2, 0.6), measured(4, 0.5)]) == (4, 0)
    assert choose([measured(1, 1.0), measured(2, 0.6), measured(4, 0.5, 921)]) == (2, 0), "no margin is left"
    assert choose([measured(1, 1.0), measured(2, 0.6), measured(4, 0.599)]) == (2, 0), "what gains nothing takes memory"
    sharded = measured(4, 0.5, 2000, 950, 900, 400)
    assert choose([measured(1, 1.0, 800, 500, 400, 100), sharded]) == (4, 2), "the lowest stage that fits"
    assert choose([measured(2, 0.5, 800, 500, 400, 100), sharded]) == (2, 0), "as fast, without sharding gradients"
    assert choose([measured(1, 1.0, 2000, 930)]) is None


many = st.lists(
    st.tuples(st.floats(0.01, 10), st.lists(st.integers(0, 2000), min_size=4, max_size=4)), min_size=1, max_size=8
)


@given(many)
def test_what_is_chosen_fits_and_nothing_that_fits_is_much_faster(cases: list[tuple[float, list[int]]]) -> None:
    tried = [measured(2**i, seconds, *needs) for i, (seconds, needs) in enumerate(cases)]
    fitting = [each for each in tried if min(each.needs) <= MARGIN * LIMIT]
    chosen = choose(tried)
    if chosen is None:
        assert not fitting
        return
    size, zero = chosen
    (its,) = (each for each in tried if each.micro_batch_size == size)
    assert its.needs[zero] <= MARGIN * LIMIT
    assert all(need > MARGIN * LIMIT for need in its.needs[:zero])
    assert its.seconds_per_row <= (1 + GAIN) * min(each.seconds_per_row for each in fitting)


def test_sizes_double_until_nothing_is_gained_or_nothing_is_left() -> None:
    assert next_size([], 100, None) == 1
    assert next_size([measured(1)], 100, None) == 2
    assert next_size([measured(1), measured(2, 0.5), measured(4, 0.4)], 6, None) == 6, "as many as a step has"
    assert next_size([measured(1)], 1, None) is None
    assert next_size([measured(1), measured(2, 0.5)], 100, 4) is None, "known to be too much"
    assert next_size([measured(1), measured(2, 0.5, may_double=False)], 100, None) is None
    assert next_size([measured(1), measured(2, 1.1)], 100, None) == 4, "one that gains nothing may be chance"
    assert next_size([measured(1), measured(2, 1.1), measured(4, 0.98)], 100, None) is None


class Stage:
    """A stage's folder, with measurements as a function says."""

    def __init__(self, folder: Path, measure: Callable[[int], Measured]) -> None:
        self.folder, self.asked = folder, list[int]()
        self._measure = measure

    def settle(self, attempt: int = 1) -> TrainConfig:
        fence = Fence(self.folder, attempt)
        fence.take()
        return autotune.settle(configure(attempt=attempt), self.folder, fence, 0, self._ask)

    def _ask(self, size: int) -> Measured:
        self.asked.append(size)
        return self._measure(size)

    @property
    def stored(self) -> Tuning:
        return Tuning.model_validate_json((self.folder / AUTOTUNE_FILE).read_bytes())


def configure(**changes: Any) -> TrainConfig:
    prepared = {"uri": "pvc://models/prepared/x", "digest": "sha256:" + "0" * 64}
    return stages.stage(prepared, autotune=True, recipe={"global_batch_size": 8}, **changes)  # type: ignore[arg-type]


def test_an_attempt_that_resumes_finds_the_choice(tmp_path: Path) -> None:
    stage = Stage(tmp_path, lambda size: measured(size, 1 / size))
    first = stage.settle()
    assert (first.recipe.micro_batch_size, first.zero_stage, stage.asked) == (8, 0, [1, 2, 4, 8])
    again = stage.settle(2)
    assert again.recipe == first.recipe
    assert stage.asked == [1, 2, 4, 8], "nothing is measured again"
    assert "| **8** | 125 | 9.31e-08 GiB | 9.31e-08 GiB |" in table(stage.stored)


def test_a_size_for_which_memory_is_short_ends_the_search(tmp_path: Path) -> None:
    def measure(size: int) -> Measured:
        if size == 4:
            raise Killed("no memory", reason="OutOfMemory")
        return measured(size, 1 / size)

    stage = Stage(tmp_path, measure)
    assert stage.settle().recipe.micro_batch_size == 2
    assert stage.stored.trying is None


def test_a_container_that_was_killed_while_measuring_does_not_try_that_size_again(tmp_path: Path) -> None:
    def measure(size: int) -> Measured:
        if size == 4:
            raise SystemExit("killed with everything")  # nothing is caught, nothing is tidied
        return measured(size, 1 / size)

    stage = Stage(tmp_path, measure)
    with pytest.raises(SystemExit):
        stage.settle()
    assert (stage.stored.trying, stage.stored.micro_batch_size) == (4, None)
    assert stage.settle(2).recipe.micro_batch_size == 2
    assert stage.asked == [1, 2, 4]


@pytest.mark.parametrize(
    ("error", "size"),
    [(Preempted("told to stop"), 2), (TrainingFailed("a fault"), 4), (Killed("x", reason="OOMKilled"), 1)],
)
def test_other_failures_end_the_attempt_and_the_next_one_goes_on(tmp_path: Path, error: StageError, size: int) -> None:
    failing = True

    def measure(asked: int) -> Measured:
        if asked == size and failing:
            raise error
        return measured(asked, 1 / asked)

    stage = Stage(tmp_path, measure)
    with pytest.raises(type(error)):
        stage.settle()
    failing = False
    assert stage.settle(2).recipe.micro_batch_size == 8
    assert stage.asked.count(1) == (2 if size == 1 else 1), "what was measured is kept"


def test_the_other_pods_wait_for_the_choice_and_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_POLL_SECONDS", 0.01)
    begun = threading.Event()

    def measure(size: int) -> Measured:
        begun.set()
        time.sleep(0.05)
        return measured(size, 1 / size)

    stage = Stage(tmp_path, measure)
    fence = Fence(tmp_path, 1)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(autotune.settle, configure(), tmp_path, fence, 1, pytest.fail)  # type: ignore[arg-type]
        first = pool.submit(stage.settle)
        assert begun.wait(30)
        assert not other.done(), "there is no choice yet"
        assert other.result(30) == first.result(30)
    assert first.result().recipe.micro_batch_size == 8


def test_a_pod_that_waits_in_vain_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "WAIT_SECONDS", 0.0)
    with pytest.raises(Stalled, match=r"autotune\.json: no choice after 0 s; see the first pod's log"):
        autotune.settle(configure(), tmp_path, Fence(tmp_path, 1), 1, pytest.fail)  # type: ignore[arg-type]


def test_where_nothing_fits_the_message_says_what_would(tmp_path: Path) -> None:
    stage = Stage(tmp_path, lambda size: measured(size, 1.0, 3 * 2**30))
    with pytest.raises(
        BadConfiguration, match=r"with one row at a time a process needs 3 GiB of .*gradientCheckpointing"
    ) as no:
        stage.settle()
    assert no.value.reason == "DoesNotFit"


def test_the_longest_rows_are_measured(tmp_path: Path) -> None:
    artifact = stages.write_prepared(tmp_path, row_counts=[20, 20], batch=4, validation=4)
    data = PreparedData(tmp_path / "volume" / artifact.uri.removeprefix("pvc://models/"))
    lengths = sorted((len(data.row(0, i).input_ids) for i in range(20)), reverse=True)
    view = data.with_longest(3, steps=4)
    assert [len(view.row(0, i).input_ids) for i in range(3)] == lengths[:3]
    assert view.loss_tokens(0, 0, 3) == sum(int(view.row(0, i).loss_mask.sum()) for i in range(3))
    assert (view.info.epoch_rows, view.info.total_steps, view.info.has_validation) == ([3], 4, False)
    many = data.with_longest(23, steps=1)
    assert [len(many.row(0, i).input_ids) for i in range(23)] == [*lengths, *lengths[:3]]


def test_a_stage_tunes_itself_and_its_result_is_that_of_the_same_settings(tmp_path: Path) -> None:
    """Two processes: measured by one, the choice is for both; a later attempt finds choice and result."""
    prepared = stages.write_prepared(tmp_path, row_counts=[8], batch=4)
    config = stages.stage(prepared, autotune=True, processes_per_node=2, recipe={"global_batch_size": 4})
    run, code = stages.run(tmp_path, config)
    assert code == 0, run.output
    chosen = Tuning.model_validate_json((run.folder / AUTOTUNE_FILE).read_bytes())
    assert [each.micro_batch_size for each in chosen.measured] == [1, 2]
    assert all(each.memory_bytes > 2**20 and len(each.needs) == 4 for each in chosen.measured)
    assert not (run.folder / ".autotune").exists()
    card = (run.folder / "model" / "README.md").read_text()
    assert f"Chosen: `microBatchSize` {chosen.micro_batch_size}, `zeroStage` {chosen.zero_stage}." in card
    before = (run.folder / AUTOTUNE_FILE).stat().st_mtime_ns
    again, code = stages.run(tmp_path, config.model_copy(update={"attempt": 2}))
    assert (code, again.report.already_done) == (0, True), again.output
    assert (run.folder / AUTOTUNE_FILE).stat().st_mtime_ns == before
    by_hand = chosen.applied(config.model_copy(update={"autotune": False, "folder": "pvc://models/tiny/by-hand"}))
    other, code = stages.run(tmp_path, by_hand)
    assert code == 0, other.output
    assert stages.same_weights(run, other)
