"""`python -m trimtab_operator`: run the operator until it is told to stop."""

from __future__ import annotations

import asyncio

import kopf

from trimtab_operator.core.log import configure
from trimtab_operator.main import SETTINGS


def main() -> None:
    """Run kopf with our handlers in the namespaces of the settings."""
    configure()
    namespaces = SETTINGS.watch_namespaces
    asyncio.run(kopf.operator(standalone=True, clusterwide=not namespaces, namespaces=namespaces))


if __name__ == "__main__":
    main()
