"""The pure parts: learning rate, batches, watchdog, choice of the cause, exceptions into exit codes, metrics rows."""

from __future__ import annotations

import errno
import json
import math
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.algorithms.schedule import learning_rate
from trimtab_trainer.config import ExitCode, FailureReport
from trimtab_trainer.engine.batches import micro_batch_count, plan_steps, rows_of_rank
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.failures import to_stage_error
from trimtab_trainer.progress.heartbeat import Heartbeat, Phase
from trimtab_trainer.progress.metrics_log import cut_rows, read_rows
from trimtab_trainer.settings import Recipe, Schedule
from trimtab_trainer.supervisor.causes import choose_cause
from trimtab_trainer.supervisor.launch import node_rank, rendezvous
from trimtab_trainer.supervisor.run_folder import Cause
from trimtab_trainer.supervisor.watchdog import is_stalled


def test_learning_rate_by_hand() -> None:
    recipe = Recipe(learning_rate=1.0, minimum_learning_rate=0.1, warmup_ratio=0.2, schedule=Schedule.COSINE)
    rates = [learning_rate(recipe, step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 4 / 8)) / 2)
    linear = recipe.model_copy(update={"schedule": Schedule.LINEAR})
    assert learning_rate(linear, 6, 10) == pytest.approx(0.55)
    constant = recipe.model_copy(update={"schedule": Schedule.CONSTANT})
    assert {learning_rate(constant, step, 10) for step in range(2, 10)} == {1.0}


@given(st.sampled_from(Schedule), st.floats(0, 1), st.integers(1, 300), st.floats(1e-9, 1), st.floats(0, 1))
def test_learning_rate_stays_between_zero_and_its_peak(
    schedule: Schedule, warmup: float, total: int, peak: float, part: float
) -> None:
    recipe = Recipe(learning_rate=peak, minimum_learning_rate=peak * part, warmup_ratio=warmup, schedule=schedule)
    rates = [learning_rate(recipe, step, total) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert max(rates) == pytest.approx(peak) or round(warmup * total) == total


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_every_row_is_taken_once_in_order_by_exactly_one_rank(
    epoch_rows: list[int], batch: int, world: int, micro: int
) -> None:
    total = sum(-(-rows // batch) for rows in epoch_rows)
    steps = list(plan_steps(epoch_rows, batch, total))
    assert [step.index for step in steps] == list(range(total))
    for epoch, rows in enumerate(epoch_rows):
        assert [i for step in steps if step.epoch == epoch for i in range(step.start, step.stop)] == list(range(rows))
    for step in steps:
        taken = [rows_of_rank(step.start, step.stop, rank, world) for rank in range(world)]
        assert sorted(i for own in taken for i in own) == list(range(step.start, step.stop))
        count = micro_batch_count(step.stop - step.start, world, micro)
        assert all(len(own) <= count * micro for own in taken)
        assert len(taken[0]) > (count - 1) * micro, "no rank runs an empty micro-batch more than needed"
    assert list(plan_steps(epoch_rows, batch, total, first=total // 2)) == steps[total // 2 :]


@pytest.mark.parametrize(
    ("phase", "configured", "median", "silence", "stalled"),
    [
        (Phase.TRAINING, 60, 1.0, 61, True),
        (Phase.TRAINING, 60, 1.0, 59, False),
        (Phase.TRAINING, None, 1.0, 299, False),
        (Phase.TRAINING, None, 1.0, 301, True),
        (Phase.TRAINING, None, 100.0, 999, False),
        (Phase.TRAINING, None, 100.0, 1001, True),
        (Phase.LOADING, 60, 0.0, 1799, False),
        (Phase.LOADING, 60, 0.0, 1801, True),
        (Phase.SAVING, 3600, 1.0, 3599, False),
    ],
)
def test_watchdog(phase: Phase, configured: int | None, median: float, silence: float, stalled: bool) -> None:
    beat = Heartbeat(phase=phase, at=1000.0, median_step_seconds=median)
    assert is_stalled(beat, configured, 1000.0 + silence) is stalled


def cause(rank: int, code: ExitCode, *, secondary: bool = False) -> Cause:
    return Cause(rank=rank, exit_code=code, report=FailureReport(reason="Some", message="…"), secondary=secondary)


def test_the_first_cause_wins_over_what_followed_from_it() -> None:
    full = cause(1, ExitCode.STORAGE_ERROR)
    noticed = cause(0, ExitCode.KILLED, secondary=True)
    assert choose_cause([noticed, full], {0: 137, 1: 74}, "s", 0) == full
    killed = choose_cause([noticed], {0: 137, 1: -9}, "s", 0)
    assert (killed.exit_code, killed.report.reason, killed.rank) == (137, "Killed", 1)
    assert choose_cause([noticed], {1: -9}, "s", 1).report.reason == "OOMKilled"
    assert choose_cause([], {0: -int(signal.SIGSEGV)}, "s", 0).report.reason == "ProcessCrashed"
    assert choose_cause([noticed], {0: 137, 1: -15}, "s", 0) == noticed
    assert choose_cause([], {0: 1}, "s", 0).exit_code == 70
    launcher = choose_cause([], {}, "s", 0, torchrun=-9)
    assert (launcher.exit_code, launcher.report.reason) == (137, "Killed")
    assert choose_cause([noticed], {1: -9}, "s", 0, torchrun=-9).report.message.startswith("rank 1 died of SIGKILL")


def test_exceptions_become_exit_codes() -> None:
    assert to_stage_error(OSError(errno.ENOSPC, "No space left on device")).exit_code == 74
    hidden = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert to_stage_error(hidden).exit_code == 74
    assert (
        to_stage_error(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")).reason == "PeerLost"
    )
    assert to_stage_error(KeyError("x")).exit_code == 70


def test_rows_after_the_checkpoint_and_a_torn_line_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "validationLoss": 1.0}, *({"step": step, "loss": 1.0} for step in range(1, 6))]
    rows.insert(4, {"step": 3, "validationLoss": 0.5})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    assert cut_rows(file, 3) == 2
    assert read_rows(file) == rows[:5]
    assert cut_rows(file, 3) == 0


def test_launch_says_what_is_missing() -> None:
    assert rendezvous({"TRIMTAB_RENDEZVOUS": "pod-0.headless:29500"}, 2) == ("pod-0.headless", 29500)
    assert rendezvous({}, 1)[0] == "127.0.0.1"
    with pytest.raises(BadConfiguration, match="TRIMTAB_RENDEZVOUS is not set"):
        rendezvous({}, 2)
    with pytest.raises(BadConfiguration, match="JOB_COMPLETION_INDEX='2': expected 0 to 1"):
        node_rank({"JOB_COMPLETION_INDEX": "2"}, 2)
