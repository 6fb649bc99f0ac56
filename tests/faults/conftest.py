"""The control plane of the whole sweeps, as in the tier whose tests they extend."""

from tests.controlplane.conftest import control_plane, kubernetes_binaries, namespace

__all__ = ["control_plane", "kubernetes_binaries", "namespace"]
