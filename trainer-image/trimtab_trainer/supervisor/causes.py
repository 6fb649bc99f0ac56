"""Which of several failed processes is the reason. Pure but for reading the kernel's out-of-memory counter."""

from __future__ import annotations

import signal
from pathlib import Path

from trimtab_trainer.config import ExitCode, FailureReport
from trimtab_trainer.supervisor.run_folder import Cause

_CGROUP_MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")


def choose_cause(
    causes: list[Cause], exit_codes: dict[int, int], stage: str, oom_kills: int, torchrun: int = 1
) -> Cause:
    """The one failure to report.

    A cause that a process recorded itself comes first; then a process that died of a signal, which could record
    nothing; then one that only noticed that another had gone (that one may have run in another pod).

    Args:
        causes: what the processes recorded.
        exit_codes: exit code by rank of the processes that failed first; negative: a signal's number.
        stage: the stage's name.
        oom_kills: processes that the kernel killed for want of memory during the attempt.
        torchrun: its own exit code; negative: a signal's number, and then it could not say how its processes ended.
    """
    primary = [cause for cause in causes if not cause.secondary]
    if primary:
        return primary[0]
    spoken = {cause.rank for cause in causes}
    # torchrun itself ends the other processes with SIGTERM, so that signal is never the cause
    died = {
        rank: -code for rank, code in exit_codes.items() if code < 0 and -code != signal.SIGTERM and rank not in spoken
    }
    if died:
        rank, number = min(died.items())
        return _died_of_signal(f"rank {rank}", rank, number, stage, oom_kills)
    if torchrun < 0 and not exit_codes:
        return _died_of_signal("torchrun", 0, -torchrun, stage, oom_kills)
    if causes:
        return causes[0]
    details = ", ".join(f"rank {rank}: exit code {code}" for rank, code in sorted(exit_codes.items()))
    message = f"the training processes ended without a word ({details or 'torchrun failed'}); the log has their output"
    return _cause(min(exit_codes, default=0), ExitCode.TRAINING_FAILED, "ProcessFailed", message, stage)


def oom_kills() -> int:
    """Processes of this container that the kernel has killed for want of memory; 0 where that can't be known."""
    try:
        lines = _CGROUP_MEMORY_EVENTS.read_text(encoding="ascii").split("\n")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _died_of_signal(who: str, rank: int, number: int, stage: str, oom_kills: int) -> Cause:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL and oom_kills:
        message = f"{who} was killed for want of memory; raise resources.limits.memory or lower train.microBatchSize"
        return _cause(rank, ExitCode.KILLED, "OOMKilled", message, stage)
    reason = "Killed" if number == signal.SIGKILL else "ProcessCrashed"
    return _cause(rank, ExitCode.KILLED, reason, f"{who} died of {name}; the log has its last lines", stage)


def _cause(rank: int, exit_code: ExitCode, reason: str, message: str, stage: str) -> Cause:
    return Cause(rank=rank, exit_code=exit_code, report=FailureReport(reason=reason, message=message, stage=stage))
