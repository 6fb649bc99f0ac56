"""Configurations for the tests."""

from typing import Any

DIGEST = "sha256:" + "0123456789abcdef" * 4


def config_document(**changes: Any) -> dict[str, Any]:
    """A valid configuration as the operator writes it, with top-level fields replaced."""
    return {
        "contractVersion": 1,
        "kind": "serve",
        "endpoint": {"namespace": "default", "name": "assistant"},
        "revision": "1",
        "servedModelName": "assistant",
        "model": {"uri": "pvc://models/assistant", "digest": DIGEST},
        **changes,
    }
