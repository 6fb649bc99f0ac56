"""`python -m bench.trainer`: the trainer against TRL and against other ways of its own, in turns; prints a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.operator.table import machine

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- bench-trainer: begin -->", "<!-- bench-trainer: end -->"
PEERS = ROOT / ".oracles" / "bin" / "python"
OLDER_TRL = ROOT / ".oracles" / "sources"
"""Before the environment's own on the path: the last TRL with PPO."""


@dataclass(frozen=True)
class Side:
    """One process that trains in turns."""

    name: str
    module: str
    workload: str
    steps: int
    """Of one turn."""


@dataclass(frozen=True)
class Race:
    """Sides that train on the same texts; the first one is compared with each other one."""

    name: str
    unit: str
    measure: str
    """What a rate counts: `tokens` without padding, or `sets`."""
    sides: tuple[Side, ...]
    goals: tuple[float | None, ...]
    """Of each ratio."""


OURS, TRL = "bench.trainer.ours", "bench.trainer.peers"
OUR_PPO, TRL_PPO = "bench.trainer.ppo_ours", "bench.trainer.ppo_peer"
RACES = (
    Race(
        "SFT",
        "tokens",
        "tokens",
        (
            Side("Trimtab, packed", OURS, "sft", 8),
            Side("TRL 1.16, default", TRL, "sft", 6),
            Side("TRL 1.16, packed", TRL, "sft-packed", 6),
        ),
        (2.0, 1.2),
    ),
    Race(
        "DPO",
        "tokens",
        "tokens",
        (
            Side("Trimtab, packed", OURS, "dpo", 4),
            Side("Trimtab, padded, grouped by length", OURS, "dpo-padded", 4),
            Side("TRL 1.16, default", TRL, "dpo", 2),
        ),
        (1.5, None),
    ),
    Race(
        "reward model, rankings of four",
        "rankings",
        "sets",
        (
            Side("Trimtab, K-wise", OURS, "rankings", 6),
            Side("Trimtab, six pairs, packed", OURS, "pairs", 6),
            Side("TRL 1.16, six pairs", TRL, "pairs", 2),
        ),
        (2.5, None),
    ),
    Race(
        "PPO",
        "episodes",
        "sets",
        (Side("Trimtab", OUR_PPO, "ppo", 2), Side("TRL 1.12", TRL_PPO, "ppo", 2)),
        (None,),
    ),
)


@dataclass
class Worker:
    """A side's process and what its turns took."""

    side: Side
    process: subprocess.Popen[str]
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)

    def wait_until_ready(self) -> None:
        """It waits for its turn."""
        self._read()

    def turn(self, measure: str, *, counts: bool) -> None:
        """One turn; rates are kept where it counts."""
        print("go", file=self.process.stdin, flush=True)
        told = json.loads(self._read())
        self.wait_until_ready()
        if counts:
            self.walls.append(told[measure] / told["wall"])
            self.cpus.append(told[measure] / told["cpu"])

    def _read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench-trainer: {self.side.name} ({self.side.workload}) ended; its log is above")
        return line


def run(race: Race, rounds: int, threads: int) -> list[Worker]:
    """All sides in each round, beginning with another one each time; the first round is warm-up."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    workers = []
    for side in race.sides:
        python = sys.executable if side.module in (OURS, OUR_PPO) else str(PEERS)
        command = [python, "-m", side.module, side.workload, str(side.steps)]
        found_at = {"PYTHONPATH": paths(*([OLDER_TRL] if side.module == TRL_PPO else []))}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, **found_at},
            text=True,
            cwd=ROOT,
        )
        workers.append(Worker(side, process))
    try:
        for worker in workers:
            worker.wait_until_ready()
        for i in range(rounds + 1):
            for j in range(len(workers)):
                workers[(i + j) % len(workers)].turn(race.measure, counts=i > 0)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    return workers


def paths(*first: Path) -> str:
    """Where a worker finds the trainer and this package, after what comes first."""
    return os.pathsep.join(map(str, [*first, ROOT, ROOT / "trainer-image"]))


def rows(race: Race, workers: Sequence[Worker]) -> list[str]:
    """Of the table."""
    first, lines = workers[0], []
    for worker, goal in zip(workers, (None, *race.goals), strict=True):
        cells = [f"{median(worker.walls):,.1f}", f"{median(worker.cpus):,.1f}"]
        for own, other in ((first.walls, worker.walls), (first.cpus, worker.cpus)):
            ratios = [a / b for a, b in zip(own, other, strict=True)]
            told = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            cells.append("" if worker is first else told)
        cells.append(f"{goal:g}" if goal else "")
        lines.append(f"| {race.name} ({race.unit}) | {worker.side.name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="bench.trainer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[race.name.split()[0] for race in RACES])
    parser.add_argument("--write", type=Path, help="file whose marked part becomes the table")
    arguments = parser.parse_args()
    lines = [
        "| stage (unit) | side | a second | a CPU second | first / this, wall | … CPU | goal |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for race in RACES:
        if race.name.split()[0] in arguments.only:
            lines += rows(race, run(race, arguments.rounds, arguments.threads))
            print("\n".join(lines), flush=True)
    where = machine().partition(";")[0]
    text = "\n".join([*lines, "", f"{where}; {arguments.threads} thread, {arguments.rounds} rounds."])
    if arguments.write:
        whole = arguments.write.read_text()
        head, tail = whole[: whole.index(BEGIN) + len(BEGIN)], whole[whole.index(END) :]
        arguments.write.write_text(f"{head}\n{text}\n{tail}")


if __name__ == "__main__":
    main()
