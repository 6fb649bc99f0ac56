"""Trimtab's custom resources on the control plane."""

from pathlib import Path

from tests.controlplane.cluster import ControlPlane

CRDS = Path(__file__).resolve().parents[2] / "crds"


def install_crds(control_plane: ControlPlane) -> None:
    """Install or update the CRDs, and wait until the API server serves them."""
    control_plane.kubectl("apply", "--server-side", f"--filename={CRDS}")
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"--filename={CRDS}")
