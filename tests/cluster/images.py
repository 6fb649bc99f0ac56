"""The product's images, built from its own Dockerfiles without Docker, and brought to a node.

Base images can't be pulled everywhere, so the base is made here, of Debian's packages, and handed to the Dockerfiles as
their `ARG BASE`. Serving takes the set for machines without a GPU. Nothing else differs from `make images`.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.node import PAUSE_IMAGE, Node

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASE = "bookworm"
PACKAGES = ("python3", "python3-venv", "python3-pip", "ca-certificates")
BASE_IMAGE = "localhost/trimtab-base:1"
BASE_VARIABLE = "TRIMTAB_TEST_BASE"
"""A tar of a root file system, in place of one that is made."""


@dataclass(frozen=True)
class Image:
    """One of the product's images."""

    folder: str
    name: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    """`--build-arg`s beside BASE."""


IMAGES = {
    "operator": Image("operator", "docker.io/library/trimtab-operator:0.1.0"),
    "trainer": Image("trainer-image", "docker.io/library/trimtab-trainer:0.1.0"),
    "serving": Image(
        "serving",
        "docker.io/library/trimtab-serving:0.1.0",
        {"REQUIREMENTS": "serving-cpu.txt", "PACKAGES": "libnuma1"},
    ),
}

_BASE = """\
FROM scratch
ADD base.tar /
COPY authorities.pem /etc/ssl/certs/ca-certificates.crt
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
"""
_PAUSE = f'FROM {BASE_IMAGE}\nENTRYPOINT ["/bin/sleep", "infinity"]\n'
"""A sandbox only holds its namespaces."""


class Builder:
    """buildah with all that it stores below one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / "tmp"
        self._temporary.mkdir(parents=True)

    def make_base(self) -> None:
        """A root file system with Python, which trusts the authorities that this machine trusts."""
        context = self._root / "base"
        context.mkdir()
        if made := os.environ.get(BASE_VARIABLE):
            shutil.copy(made, context / "base.tar")
        else:
            include = f"--include={','.join(PACKAGES)}"
            self._run("mmdebstrap", "--quiet", "--variant=minbase", include, RELEASE, str(context / "base.tar"))
        authorities = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        shutil.copy(authorities, context / "authorities.pem")
        (context / "Dockerfile").write_text(_BASE)
        self._buildah("build", f"--tag={BASE_IMAGE}", str(context))
        shutil.rmtree(context)
        pause = self._root / "pause"
        pause.mkdir()
        (pause / "Dockerfile").write_text(_PAUSE)
        self._buildah("build", "--pull-never", f"--tag={PAUSE_IMAGE}", str(pause))

    def build(self, image: Image) -> None:
        """One image from its Dockerfile; layers that another image has are taken from it."""
        arguments = {"BASE": BASE_IMAGE, **image.arguments}
        self._buildah(
            "build",
            "--layers",
            "--pull-never",
            *(f"--build-arg={key}={value}" for key, value in arguments.items()),
            f"--file={image.folder}/Dockerfile",
            f"--tag={image.name}",
            ".",
        )

    def archive(self, name: str, folder: Path) -> None:
        """Writes an image to a file of the folder, uncompressed: it is read once, on this machine."""
        file = name.rpartition("/")[2].partition(":")[0]
        self._buildah("push", "--quiet", name, f"docker-archive:{folder / file}.tar:{name}")

    def clear(self) -> None:
        """Removes what buildah stores, and the packages that it downloaded."""
        self._buildah("rmi", "--all", "--force")
        shutil.rmtree(self._temporary)

    def _buildah(self, command: str, *arguments: str) -> None:
        storage = (f"--root={self._root / 'storage'}", f"--runroot={self._root / 'run'}")
        self._run("buildah", *storage, command, *arguments)

    def _run(self, *command: str) -> None:
        environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self._temporary)}
        log = self._root / "build.log"
        with log.open("ab") as output:
            answer = subprocess.run(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
            )
        if answer.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{' '.join(command)} exited with {answer.returncode}; the end of {log}:\n{tail}")


def load(node: Node, archive: Path) -> None:
    """Brings an image to the node; containerd keeps it unpacked only."""
    node.ctr("images", "import", "--local", "--discard-unpacked-layers", str(archive))
