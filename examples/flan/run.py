"""Copy the five FLAN chain-of-thought files into the job's volume and run the job on this machine.

The running text to replay is what every Python installation carries: the topics of its language reference.

Usage: `TRIMTAB_FLAN_DATA=FOLDER python examples/flan/run.py [WORKDIR]`
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).parent
FILES = tuple(f"{name}_train.tsv" for name in ("gsm8k", "creak", "aqua", "strategyqa", "qasc"))


def main() -> int:
    """The exit code is that of `trimtab local run`; 2 where the data are missing."""
    folder = os.environ.get("TRIMTAB_FLAN_DATA")
    if not folder:
        print("TRIMTAB_FLAN_DATA is not set: name the folder with the FLAN CoT files in it", file=sys.stderr)
        return 2
    missing = [name for name in FILES if not (Path(folder) / name).is_file()]
    if missing:
        print(f"TRIMTAB_FLAN_DATA={folder}: missing {', '.join(missing)}", file=sys.stderr)
        return 2
    workdir = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(".trimtab/flan")
    data = workdir / "volumes/default/flan/data"
    data.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(Path(folder) / name, data / name)
    text = "".join(json.dumps({"text": topic}) + "\n" for _, topic in sorted(topics.items()))
    (data / "text.jsonl").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "trimtab", "local", "run", str(HERE / "job.yaml"), "--workdir", str(workdir)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
