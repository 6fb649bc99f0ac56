"""Make the data, then let `trimtab local run` train, serve and ask: what `make demo` calls.

python examples/quickstart/demo.py [WORKDIR]
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CLAIM = Path("volumes/default/quickstart")


def main() -> int:
    """Run the example in WORKDIR, `.trimtab/quickstart` by default; the exit code is that of `trimtab local run`."""
    workdir = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(".trimtab/quickstart")
    data = workdir / CLAIM / "data"
    started = time.monotonic()
    if not (data / "sft-heldout.jsonl").exists():
        print(f"Making the data in {data}", flush=True)
        subprocess.run([sys.executable, str(HERE / "make_data.py"), str(data)], check=True)
    ask = [sys.executable, str(HERE / "ask.py"), str(data / "sft-heldout.jsonl"), "--svg", str(workdir / "answers.svg")]
    run = [sys.executable, "-m", "trimtab", "local", "run", str(HERE / "job.yaml"), "--workdir", str(workdir)]
    code = subprocess.run([*run, "--exec", shlex.join(ask)], check=False).returncode
    print(
        f"make demo: {'done' if code == 0 else f'failed with exit code {code}'} in {time.monotonic() - started:.0f} s"
    )
    if code == 0:
        print(f"Serve it again: {Path(sys.executable).parent / 'trimtab'} local serve --workdir {workdir}")
    return code


if __name__ == "__main__":
    sys.exit(main())
