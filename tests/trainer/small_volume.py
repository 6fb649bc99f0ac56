"""A volume that is soon full, without root."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLD = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[2]}", "tmpfs", sys.argv[1]], check=True)
print("mounted", flush=True)
sys.stdin.read()
"""


@contextmanager
def small_volume(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` (e.g. "2m"), mounted in a user namespace of its own and reached through that process' root."""
    folder.mkdir(parents=True)
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", _HOLD, str(folder), size]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stderr
        if holder.stdout.readline() != b"mounted\n":
            raise RuntimeError(
                f"can't mount a tmpfs in a user namespace: {holder.stderr.read().decode()}; "
                "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
            )
        try:
            yield Path(f"/proc/{holder.pid}/root{folder}")
        finally:
            holder.stdin.close()
