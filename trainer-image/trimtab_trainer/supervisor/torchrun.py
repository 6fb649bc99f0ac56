"""`torchrun` itself, except that it writes down what its `main` throws away: which process failed, and how.

Used as `python -m trimtab_trainer.supervisor.torchrun ARGUMENTS-OF-TORCHRUN`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trimtab_trainer.supervisor.processes import die_with_parent
from trimtab_trainer.supervisor.run_folder import RUN_FOLDER_VARIABLE, RunFolder


def main() -> int:
    """Run torchrun with this process's arguments; 1 when a training process failed."""
    die_with_parent()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        codes = {int(rank): failure.exitcode for rank, failure in error.failures.items()}
        RunFolder(Path(os.environ[RUN_FOLDER_VARIABLE])).write_exit_codes(codes)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
