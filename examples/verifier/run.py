"""Make the data, run the job on this machine, and say how often the model's sums are right.

Usage: `python examples/verifier/run.py [WORKDIR]`
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FORMS = ("It is {}.", "{}")
RIGHT = 0.4
"""How often people add correctly."""


def said(total: int, generator: random.Random) -> int:
    """What a person says that the sum is."""
    return total if generator.random() < RIGHT else total + generator.choice((-2, -1, 1, 2))


def make(folder: Path, seed: int = 1) -> None:
    """Write `demonstrations.jsonl`, `sums.jsonl` with the right sums, and `prompts.jsonl`, eight times the same."""
    generator = random.Random(seed)  # noqa: S311
    demonstrations, sums = [], []
    for a, b in ((a, b) for a in range(1, 7) for b in range(1, 7)):
        question = f"What is {a} + {b}?"
        answers = [generator.choice(FORMS).format(said(a + b, generator)) for _ in range(40)]
        demonstrations += [{"prompt": question, "completion": answer} for answer in answers]
        sums.append({"prompt": question, "sum": a + b})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("demonstrations", demonstrations), ("sums", sums), ("prompts", 8 * sums)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> int:
    """The exit code is that of `trimtab local run`."""
    workdir = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(".trimtab/verifier")
    volume = workdir / "volumes/default/verifier"
    make(volume / "data")
    command = [sys.executable, "-m", "trimtab", "local", "run", str(HERE / "job.yaml"), "--workdir", str(workdir)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        (folder,) = volume.glob("models/verifier-*/ppo")
        show(folder)
    return code


def show(folder: Path) -> None:
    """A line for each look at all sums, and what the model says of the first ones before and after."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    print("step   right  nats from sft")
    for row in (row for row in rows if "validationScore" in row):
        print(f"{row['step']:>4}  {row['validationScore']:6.2f}  {row['validationKlSequence']:13.2f}")
    lines = [json.loads(line) for line in (folder / "sampleAnswers.jsonl").read_text(encoding="utf-8").splitlines()]
    for step in (0, max(line["step"] for line in lines)):
        answers = [line["answer"] for line in lines if line["step"] == step]
        print(f"answers at step {step}: {' | '.join(answers)}")


if __name__ == "__main__":
    sys.exit(main())
