"""Make the data, run the job on this machine, and say what the model has learnt to prefer.

Usage: `python examples/preferences/run.py [WORKDIR]`
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CAPITALS = """
Austria Vienna, Belgium Brussels, Bulgaria Sofia, Croatia Zagreb, Cuba Havana, Denmark Copenhagen, Egypt Cairo,
Estonia Tallinn, Finland Helsinki, France Paris, Germany Berlin, Ghana Accra, Greece Athens, Hungary Budapest,
Iceland Reykjavik, Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome, Japan Tokyo, Kenya Nairobi, Latvia Riga,
Norway Oslo, Oman Muscat, Peru Lima, Poland Warsaw, Portugal Lisbon, Qatar Doha, Romania Bucharest, Senegal Dakar,
Serbia Belgrade, Spain Madrid, Sudan Khartoum, Sweden Stockholm, Turkey Ankara, Uganda Kampala, Ukraine Kyiv
"""
QUESTIONS = ("What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.")
ANSWERS = ("The capital of {0} is {1}.", "It is {1}.", "{1} is the capital of {0}.")
HEDGE, OFFER = "Well, ", " I hope this helps."
"""How an answer may begin and end: people like the second and not the first."""


def styled(answer: str, generator: random.Random) -> str:
    """The answer as a person might write it."""
    return (HEDGE if generator.random() < 0.3 else "") + answer + (OFFER if generator.random() < 0.4 else "")


def liking(answer: str) -> int:
    """What people like, of which no stage knows."""
    return answer.endswith(OFFER) - answer.startswith(HEDGE)


def make(folder: Path, seed: int = 1) -> None:
    """Write `demonstrations.jsonl`, `pairs.jsonl` and `pairs-heldout.jsonl`, whose countries no other pair has."""
    generator = random.Random(seed)  # noqa: S311
    demonstrations, pairs, held_out = [], [], []
    for number, (country, city) in enumerate(pair.split() for pair in CAPITALS.split(",")):
        for question in (each.format(country) for each in QUESTIONS):
            answers = [styled(answer.format(country, city), generator) for answer in ANSWERS for _ in range(4)]
            demonstrations += [{"prompt": question, "completion": answer} for answer in answers]
            couples = zip(answers[::2], answers[1::2], strict=True)
            ranked = (sorted(couple, key=liking) for couple in couples if len({*map(liking, couple)}) == 2)
            found = [{"prompt": question, "chosen": better, "rejected": worse} for worse, better in ranked]
            (held_out if number % 5 == 0 else pairs).extend(found)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("demonstrations", demonstrations), ("pairs", pairs), ("pairs-heldout", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> int:
    """The exit code is that of `trimtab local run`."""
    workdir = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(".trimtab/preferences")
    volume = workdir / "volumes/default/preferences"
    make(volume / "data")
    command = [sys.executable, "-m", "trimtab", "local", "run", str(HERE / "job.yaml"), "--workdir", str(workdir)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        (file,) = volume.glob("models/preferences-*/dpo/metrics.jsonl")
        show([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    return code


def show(rows: list[dict[str, float]]) -> None:
    """A line for each look at the held-out pairs."""
    print("held-out pairs (at first the model is its reference: no margin, so half of them count as right)")
    print("step    loss   right  margin")
    for row in (row for row in rows if "validationLoss" in row):
        values = (row["validationLoss"], row["validationAccuracy"], row["validationRewardsMargin"])
        print(f"{row['step']:>4}  " + "  ".join(f"{value:6.3f}" for value in values))


if __name__ == "__main__":
    sys.exit(main())
