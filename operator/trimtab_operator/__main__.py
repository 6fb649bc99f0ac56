"""`python -m trimtab_operator`: run the operator until it is told to stop."""

from __future__ import annotations

import asyncio
import sys

import structlog

from trimtab_operator.core.credentials import CredentialsError
from trimtab_operator.core.leader import WorkEnded
from trimtab_operator.core.log import configure
from trimtab_operator.core.settings import from_environment
from trimtab_operator.process import run


def main() -> int:
    """Run the operator's process; its exit status."""
    configure()
    log = structlog.stdlib.get_logger(__name__)
    try:
        asyncio.run(run(from_environment()))
    except CredentialsError as error:
        log.error("the operator can't start", reason=str(error))
    except OSError as error:
        log.error("the operator can't start; set TRIMTAB_OPERATOR_METRICS_PORT to a free port", reason=str(error))
    except WorkEnded as error:
        log.error("the operator ends, to be started anew", reason=str(error))
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
